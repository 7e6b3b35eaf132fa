"""Runs the GPU tests and benchmarks, part by part.

    python -m bench.gpu PART ...

Each part ends within ten minutes and writes bench/results/<gpu>_<part>.json with machine, versions and commit, and its
output next to it.

`--list` shows all parts. No settings of the GPU are changed. For a copy without git, give the commit with --commit.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import command
from bench.machine import ceilings, machine
from bench.training import lengths
from dwrl_fast.doctor.options import ROWS
from dwrl_fast.training.runlog import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
TOOLS = ("memcheck", "racecheck", "initcheck")
REPEATS = 100
MODEL, PAIRS = ROOT / "models" / "smollm2", ROOT / "data" / "on-topic"
PREPARE = "`make smollm2` fetches the model; docs/pretrained.md has the command that prepares the pairs."
MISSING_PACKAGE = re.compile(r"liger-kernel is not installed")
INSTEAD = """there is no CUDA device, but every part needs one. Without a GPU you can run
    python -m pytest tests/test_ops_triton.py    the kernels through Triton's interpreter, and compiled for three GPUs
    python -m pytest tests/test_bench_gpu.py     what the parts run, on tiny shapes
    python -m bench.gpu.roofline                 what to expect, counted"""


Outcome = dict[str, Any]  # the part's report: "ok", and its findings


class Job(NamedTuple):
    """A running part: the path of its log, tables and plots, and the time limit of its commands."""

    name: Path  # without a suffix
    seconds: float

    def command(self, *args: str, **environment: str) -> tuple[int, str]:
        """Run a command. Returns exit status (124 after a timeout) and output, which is also printed and logged."""
        started, lines = time.monotonic(), []
        limited = ("timeout", "--signal=KILL", str(self.seconds), *args)  # also stops its child processes
        with (
            self.name.with_suffix(".txt").open("a") as log,
            subprocess.Popen(
                limited, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, start_new_session=True,
            ) as process,
        ):  # fmt: skip
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    log.write(line)
                    lines.append(line)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # an interrupt does not reach a separate session
                raise
        return (124 if time.monotonic() - started >= self.seconds else process.returncode), "".join(lines)

    def benchmark(self, module: str, *options: str) -> tuple[Outcome, str]:
        """The report of `python -m module --json` ("ok" if it succeeded and wrote the report), and its output."""
        path = self.name.with_suffix(".json")
        path.unlink(missing_ok=True)
        status, output = self.command(sys.executable, "-m", module, "--json", str(path), *options)
        report = json.loads(path.read_text()) if path.exists() else {}
        return report | {"ok": status == 0 and bool(report), "status": status}, output


class Part(NamedTuple):
    """One part of the GPU tests."""

    does: str
    minutes: int  # time limit
    run: Callable[[Job], Outcome]


def table(job: Job, module: str, *options: str, ours: str = "dwrl_fast") -> Outcome:
    """A benchmark with its own report. It fails if the variant `ours` could not run."""
    report, _ = job.benchmark(module, "--plot", str(job.name.with_suffix(".png")), *options)
    rows = report.get("rows", [])
    own = [row for row in rows if row["variant"] == ours]
    failed = [f"{row['case']}: {row['skipped']}" for row in own if row["skipped"]]
    wrong = [f"{row['case']}: {row['variant']}" for row in rows if row["disagrees"]]
    return report | {"ok": report["ok"] and bool(own) and not failed, "disagree": wrong, "failed": failed}


def tests(job: Job) -> Outcome:
    """Every test marked gpu. A skipped test is a failure, unless a package is not installed."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        status, _ = job.command(
            sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "--durations=10",
            f"--junitxml={xml}", *files,
        )  # fmt: skip
        found = (
            read_tests(xml.read_text()) if xml.exists() else {"ran": 0, "refused": {}, "failed": ["there is no report"]}
        )
    ok = status == 0 and bool(found["ran"]) and not found["failed"] and not found["refused"]
    return found | {"ok": ok, "status": status}


def read_tests(xml: str) -> dict[str, Any]:
    """Test names by outcome: ran, failed, skipped (a package is missing), refused (skipped for another reason)."""
    found: dict[str, Any] = {"ran": 0, "failed": [], "skipped": {}, "refused": {}}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(name)
        elif skipped is not None:
            reason = f"{skipped.get('message')}: {skipped.text}"
            found["skipped" if MISSING_PACKAGE.search(reason) else "refused"][name] = reason
        else:
            found["ran"] += 1
    return found


def sanitizer(job: Job) -> Outcome:
    """compute-sanitizer over one run of every call, without the caching allocator, which would hide invalid
    accesses.
    """
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        print(
            "NOT RUN: compute-sanitizer is not on the PATH, nor in /usr/local/cuda/bin (it comes with CUDA's toolkit)"
        )
        return {"ok": False, "problem": "compute-sanitizer is missing"}
    share = Job(job.name, job.seconds / len(TOOLS))
    found = {}
    for name in TOOLS:
        status, output = share.command(
            tool, "--tool", name, "--print-limit", "20", sys.executable, "-m", "bench.gpu.calls",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        found[name] = read_sanitizer(output) | {"status": status}
        print(f"{name}: {'CLEAN' if clean(found[name]) else 'NOT CLEAN'} {found[name]}", flush=True)
    return {"ok": all(map(clean, found.values())), **found}


def read_sanitizer(output: str) -> dict[str, Any]:
    """The error count of its summary (None if there is none), the kernels that it names, whether it refused the device,
    and the number of finished calls.
    """
    summary = re.findall(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)", output)
    kernels = re.findall(r"=+ +at (?:0x\w+ in )?(?:void )?([\w:<>]+)", output)
    return {
        "errors": int(summary[-1]) if summary else None,
        "kernels": sorted(set(kernels)),
        "refused": "Device not supported" in output,
        "calls": len(re.findall(r": ran$", output, re.MULTILINE)),
    }


def clean(found: dict[str, Any]) -> bool:
    """Whether all calls ran without errors, according to `read_sanitizer`."""
    return found["errors"] == 0 and found["status"] == 0 and not found["refused"] and found["calls"] > 0


def repeats(job: Job) -> Outcome:
    """Repeated runs on the same inputs in deterministic mode."""
    status, output = job.command(
        sys.executable, "-m", "bench.gpu.calls", "--repeats", str(REPEATS), CUBLAS_WORKSPACE_CONFIG=":4096:8"
    )
    last = output.strip().rpartition("\n")[2]
    found = json.loads(last) if status == 0 and last.startswith("{") else {}
    ok = bool(found) and not any(found.values())
    return {"ok": ok, "repeats": REPEATS, "differing": found, "status": status}


def not_run(missing: Sequence[Path], remedy: str) -> Outcome:
    """The outcome of a part whose files are missing."""
    print(f"NOT RUN: there is no {', no '.join(map(str, missing))}. {remedy}")
    return {"ok": False, "missing": [path.name for path in missing]}


def against_cpu(job: Job, module: str, stored: str, *options: str) -> Outcome:
    """A training run, compared with the prediction intervals of the stored CPU runs."""
    if not (RESULTS / stored).exists():
        return not_run([RESULTS / stored], f"`python -m {module} --json` writes it on a CPU.")
    report, output = job.benchmark(module, "--against", str(RESULTS / stored), *options)
    outside = re.findall(r"^.*\bOUTSIDE\b.*$", output, re.MULTILINE)
    return report | {"ok": report["ok"] and not outside, "outside": outside}


def pairs(job: Job) -> Outcome:
    """bench.learning.overfit on the tokenizers and files of DWRL_FAST_SHARED."""
    tokenizers = lengths.SHARED / "tokenizers"
    files = [lengths.SHARED / lengths.FILES[name] for name in ("hh", "gsm8k_real")]
    if missing := [path for path in (tokenizers, *files) if not path.exists()]:
        return not_run(missing, "Set DWRL_FAST_SHARED to the folder above data/.")
    given = ("--tokenizers", str(tokenizers), "--data", *map(str, files))
    return against_cpu(job, "bench.learning.overfit", "cpu_overfit.json", *given)


def pretrained(job: Job) -> Outcome:
    """Every method on a pretrained model and real pairs. A run of this part continues the table of the last one."""
    if missing := [path for path in (MODEL, PAIRS) if not path.exists()]:
        return not_run(missing, PREPARE)
    path = job.name.with_suffix(".json")
    status, _ = job.command(
        sys.executable, "-m", "bench.learning.pretrained", "--budget", "gpu", "--model", str(MODEL),
        "--data", str(PAIRS), "--json", str(path),
    )  # fmt: skip
    if status == 124:
        print("UNFINISHED: run this part again; it continues after the last finished run.")
    return (json.loads(path.read_text()) if path.exists() else {}) | {"ok": status == 0, "status": status}


def lora(job: Job) -> Outcome:
    """The doctor on a pretrained model, with 4-bit LoRA and without; then a training with 4-bit LoRA."""
    if not MODEL.exists():
        return not_run([MODEL], PREPARE)
    model = ("--model_name_or_path", str(MODEL), "--template", "brief", "--max_completion_length", "32")
    bits = ("--use_peft", "--load_in_4bit")
    share = Job(job.name, job.seconds / 3)
    found: Outcome = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, more in {"doctor": (), "doctor, 4 bits": bits}.items():
            path = Path(folder) / f"{len(found)}.json"
            status, _ = share.command(sys.executable, "-m", "dwrl_fast.doctor", *model, *more, "--json", str(path))
            found[name] = {"status": status, "report": json.loads(path.read_text()) if path.exists() else None}
        path = Path(folder) / "run"
        options = ["--dataset_name", str(ROWS), "--output_dir", str(path), "--learning_rate", "2e-4"]
        options += ["--rollout_batch_size", "4", "--minibatch_size", "2", "--save_steps", "0"]
        status, _ = share.command(sys.executable, "-m", "dwrl_fast.train", *model, *bits, *options)
        path /= "metrics.jsonl"
        found["train, 4 bits"] = {"status": status, "metrics": read_metrics(path) if path.exists() else []}
    return found | {"ok": not any(each["status"] for each in found.values())}


PARTS = {
    "tests": Part("every test that needs a GPU, against float64; a skip without a GPU is a failure", 9, tests),
    "sanitizer": Part("memcheck, racecheck and initcheck over every kernel and backend", 9, sanitizer),
    "repeats": Part(f"{REPEATS} repeats in deterministic mode, equal bit for bit", 5, repeats),
    "head": Part(
        "linear_policy_loss on real heads, its three products and its peers", 9,
        lambda job: table(job, "bench.operators.linear_policy_loss", "--seconds", "60"),
    ),
    "logprob": Part(
        "linear_logprob on real heads, and its peers", 5,
        lambda job: table(job, "bench.operators.linear_logprob", "--seconds", "40"),
    ),
    "attention": Part(
        "tree_attention on Qwen2.5-7B's heads, and equal work in ordinary sequences", 8,
        lambda job: table(job, "bench.operators.tree_attention", "--seconds", "40"),
    ),
    "step": Part(
        "a DWRL minibatch on the shape of Qwen2.5-7B", 9,
        lambda job: table(job, "bench.training.step", "--seconds", "30", ours="tree"),
    ),
    "sampling": Part(
        "thoughts over a shared cache, with CUDA graphs and without, and the plain loop", 6,
        lambda job: job.benchmark("bench.gpu.sampling")[0],
    ),
    "train": Part(
        "what make train runs, and a second seed, against the CPU's seeds", 9,
        lambda job: against_cpu(job, "bench.learning.embedded_seeds", "cpu_embedded_seeds.json", "--seeds", "0", "1"),
    ),
    "pairs": Part("overfitting real pairs, with real tokenizers, against the CPU's accuracies", 9, pairs),
    "pretrained": Part("every method on models/smollm2 and data/on-topic; continues a stopped table", 9, pretrained),
    "plan": Part(
        "the plan's times and memory, and real steps", 8, lambda job: job.benchmark("bench.plan")[0],
    ),
    "lora": Part("the doctor, and training with 4-bit LoRA, on models/smollm2", 8, lora),
}  # fmt: skip


def gpu_name() -> str:
    """The name of the GPU in lower case, for file names."""
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
    return "_".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))


def run_part(name: str, folder: Path) -> bool:
    """Run one part and write its report into `folder`. Returns whether it passed."""
    part = PARTS[name]
    job = Job(folder / f"{gpu_name()}_{name}", 60.0 * part.minutes)
    job.name.with_suffix(".txt").unlink(missing_ok=True)
    start = time.monotonic()
    measured = ceilings()
    torch.cuda.empty_cache()  # the part runs in another process
    found = part.run(job)
    seconds = time.monotonic() - start
    report: Outcome = {"benchmark": name, "machine": machine(), "ceilings": measured} | found | {"seconds": seconds}
    job.name.with_suffix(".json").write_text(json.dumps(report, indent=1))
    print(f"{name}: {'ok' if found['ok'] else 'NOT OK'}, {seconds:.0f} s, {job.name}.json", flush=True)
    return bool(found["ok"])


def main() -> None:
    """The command: run the parts named, or list what there is."""
    parser = command.parser("gpu", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--list", action="store_true", help="what each part does, and after how long it is stopped")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where reports go (default bench/results)")
    parser.add_argument("--commit", help="of which this is a copy (or DWRL_FAST_COMMIT)")
    args = parser.parse_args()
    if args.list or not args.parts:
        for name, part in PARTS.items():
            print(f"{name:10} {part.minutes:2} minutes at most: {part.does}")
        return
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error(INSTEAD)
    if args.commit:
        os.environ["DWRL_FAST_COMMIT"] = args.commit
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = [run_part(name, args.out.resolve()) for name in args.parts]  # run all parts, also after a failure
    raise SystemExit(0 if all(outcomes) else 1)
