"""The GPU benchmarks, on tiny shapes without a GPU."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import TREES, plan_of
from rich.console import Console
from torch import Tensor

from bench.gpu import calls, sampling
from bench.gpu import parts as gpu
from bench.harness import Case, Row, Variant, measure
from bench.operators import linear_policy_loss, tree_attention, varlen
from bench.operators.tree_attention import SMALL, Heads, attended, equal_work, minibatch
from dwrl_fast import ops
from dwrl_fast.ops.oracle import tree_mask
from dwrl_fast.sampling import forward

TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_the_head() -> None:
    case = linear_policy_loss.case(64, 32, 501, torch.bfloat16, True, untrained=0.7, clipped=0, gpu=True)
    only = {"float64", "dwrl_fast", "bare products", linear_policy_loss.PRODUCTS, "plain PyTorch, trained rows"}
    rows = {row.variant: row for row in measure(case, repeats=1, seconds=10, quick=False, only=only)}
    assert set(rows) == only - {"float64"}
    for row in rows.values():
        assert not row.skipped and not row.disagrees, row
        assert row.flop_rate and row.floors
    assert rows[linear_policy_loss.PRODUCTS].floors == 1
    assert rows["dwrl_fast"].difference
    console = Console(record=True, width=120)
    linear_policy_loss.summary(list(rows.values()), console)
    assert "asked at most 1.15" in console.export_text()


def test_pairs_are_counted() -> None:
    for tree, plan in TREES.items():
        assert attended(plan) == int(tree_mask(plan).sum()), tree


def test_equal_work_is_as_much() -> None:
    for plan in (minibatch("hh", 40, 4), minibatch("rmb", 200, 4)):
        even = equal_work(plan)
        assert abs(int(even.stop[-1]) / int(plan.stop[-1]) - 1) < 0.1
        assert abs(attended(even) / attended(plan) - 1) < 0.1


def test_attention_in_float64() -> None:
    """Attention sequence by sequence equals attention over the tree, with shared key heads."""
    plan = plan_of([(7, -1), (5, 0), (3, 1), (4, 1), (6, 0), (2, 4), (9, -1)])
    for heads in (SMALL, Heads(6, 2, 8)):
        flat, gradient = tree_attention.drawn(36, heads, torch.float32)
        exact = tree_attention.exact(plan, flat, gradient)
        ours = next(v for v in tree_attention.variants(plan, heads, torch.float32) if v.name == "definition")
        assert ours.run is not None
        for x, y in zip(ours.run(), exact, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a group", "many roots"])
def test_flash_attention_by_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of a peer describe the tree: its operators, replaced by float64 versions, give the result of the
    definition.
    """
    plan, heads = TREES[name], Heads(4, 2, 8)
    flat, gradient = tree_attention.drawn(int(plan.stop[-1]), heads, torch.float64)
    where = varlen.segments(plan, torch.device("cpu"))
    assert (where.keys is None) == (name == "many roots" and bool((plan.parent < 0).all()))
    out = ops.tree_attention(flat[0], flat[1], flat[2], plan, backend="reference")
    want = torch.autograd.grad(out, flat, gradient)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of one segment, aligned at the ends."""
        back = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        k, v = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        logits = (q.transpose(0, 1) @ k.mT * 8**-0.5).masked_fill(back < 0, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(0, 1)

    def by_segment(q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor) -> Tensor:
        parts = (x.split(y.diff().tolist()) for x, y in ((q, bounds_q), (k, bounds_k), (v, bounds_k)))
        return torch.cat([causal(*each) for each in zip(*parts, strict=True)])

    def forward(query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, **_: object) -> tuple:
        return by_segment(query, key, value, cum_seq_q, cum_seq_k), None

    def backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, **_: object
    ) -> tuple[Tensor, ...]:
        given = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            out = by_segment(given[0], given[1], given[2], cum_seq_q, cum_seq_k)
        return torch.autograd.grad(out, given, grad_out)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    for x, y in zip(varlen.attention(where, flat, gradient), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_reference_is_not_a_row() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    variants = [
        Variant("exact", lambda: exact, reference=True),
        Variant("near", lambda: exact.float() * 1.001, flops=1e9),
        Variant("twice", lambda: exact.float() * 2),
    ]

    rows: list[Row] = list(measure(Case("case", lambda: variants, floor="near"), 1, 1.0, False))
    assert [row.variant for row in rows] == ["near", "twice"]
    assert [row.disagrees for row in rows] == [False, True]
    assert rows[0].difference is not None and abs(rows[0].difference - 1e-3) < 1e-5
    assert rows[0].flop_rate and rows[0].floors == 1 and rows[1].flop_rate is None


def test_bits() -> None:
    """A NaN equals itself, and -0 differs from 0."""
    values = iter([torch.tensor([0.0, torch.nan]), torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan])])
    assert calls.differing(lambda: (next(values),), 2) == 1


def test_every_call_of_the_head_runs() -> None:
    """With Triton's interpreter, which must be selected before Triton is imported."""
    script = (
        "import torch\nfrom bench.gpu import calls\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for name, call in calls.head_calls(7, 8, 77, dtype, 'cpu'):\n"
        "        print(name, calls.differing(call, 1))\n"
        "((name, call),) = calls.loss_calls(1500, 'cpu')\nprint(name, calls.differing(call, 1))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        cwd=gpu.ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 13 and all(line.endswith(" 0") for line in lines), lines


def test_the_calls_of_the_sampler() -> None:
    """With the C++ operators on the CPU. The last tokens get the same result from the cache as in one call with all
    tokens.
    """
    found = dict(calls.cache_calls(*calls.SMALL_CACHE, "cpu"))
    assert len(found) == 8 and not any(calls.differing(call, 1) for call in found.values())
    for dtype in ("float32", "bfloat16"):
        for options in ("", ", with a window and soft-cap"):
            whole = found[f"cache_attention, all at once, {dtype}, Q 115{options}"]()[0]
            last = found[f"cache_attention, the last tokens, {dtype}, Q 3{options}"]()[0]
            torch.testing.assert_close(
                last, whole[[104, 109, 114]], rtol=2e-2 if dtype == "bfloat16" else 1e-5, atol=0.01
            )
    ((_, draw),) = calls.draw_calls(1003, "cpu")
    assert calls.differing(draw, 1) == 0


def test_sampling_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny shape on the CPU, where no pass is a graph."""
    monkeypatch.setattr(sampling, "SHAPES", {"tiny": sampling.SHAPES["smollm2-135m"] | TINY})
    monkeypatch.setattr(sampling, "ceilings", lambda: {"bytes_per_second": 1e9, "bf16_flop_per_second": 1e10})
    console = Console(record=True, width=120)
    args = argparse.Namespace(pairs=2, tokens=6, rounds=2, seconds=60)
    found = sampling.measured("tiny", args, console)
    assert {row["variant"]: len(row["seconds"]) for row in found["rows"]} == {"tree, graphs": 2, "tree": 2, "plain": 2}
    # 5 passes read a megabyte of weights each.
    assert 5e-3 < found["bound_seconds"] < 1 and forward.GRAPHED > 0
    assert "share of the bound" in console.export_text()


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "head"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no CUDA device" in capsys.readouterr().err


def test_skips_are_read() -> None:
    case = '<testcase classname="t" name="{}">{}</testcase>'.format
    skip = '<skipped message="{}">somewhere</skipped>'.format
    cases = [
        case("ran", ""),
        case("failed", "<failure>why</failure>"),
        case("none", skip("there is no CUDA device")),
        case("package", skip("liger-kernel is not installed (No module)")),
    ]
    found = gpu.read_tests(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert found["ran"] == 1 and found["failed"] == ["t::failed"]
    assert set(found["skipped"]) == {"t::package"} and set(found["refused"]) == {"t::none"}


@pytest.mark.parametrize(
    ("output", "status", "errors", "is_clean"),
    [
        ("a: ran\n========= ERROR SUMMARY: 0 errors\n", 0, 0, True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\nb: ran\n", 0, 0, True),
        ("========= ERROR SUMMARY: 0 errors\n", 0, 0, False),
        ("a: ran\n========= ERROR SUMMARY: 0 errors\n", 1, 0, False),
        ("a: ran\n=========     at policy_rows_kernel+0x1f0\n========= ERROR SUMMARY: 3 errors\n", 0, 3, False),
        ("========= Error: Device not supported\n", 0, None, False),
        ("a: ran\n", 0, None, False),
    ],
)
def test_a_sanitizer_is_read(output: str, status: int, errors: int | None, is_clean: bool) -> None:
    found = gpu.read_sanitizer(output) | {"status": status}
    assert found["errors"] == errors and gpu.clean(found) == is_clean
    assert found["kernels"] == (["policy_rows_kernel"] if errors else [])


def job(tmp_path: Path, seconds: float = 60) -> gpu.Job:
    return gpu.Job(tmp_path / "any_part", seconds)


def test_a_part_is_stopped(tmp_path: Path) -> None:
    slow = "import time; time.sleep(60)"
    script = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {slow!r}])"
    status, output = job(tmp_path, 5).command(sys.executable, "-c", script)
    assert status == 124 and "begun" in output
    assert (tmp_path / "any_part.txt").read_text() == output


def test_a_table_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"case": "c", "variant": "dwrl_fast", "skipped": "", "disagrees": True}
    for skipped, ok in (("", True), ("it broke", False)):
        report = json.dumps({"rows": [row | {"skipped": skipped}]})
        write = lambda self, *args, report=report: (Path(args[4]).write_text(report) and 0, "")  # noqa: E731
        monkeypatch.setattr(gpu.Job, "command", write)
        found = gpu.table(job(tmp_path), "bench.any")
        assert found["ok"] == ok and found["disagree"] == ["c: dwrl_fast"]


@pytest.mark.parametrize(("value", "ok"), [(0.98, True), (0.2, False)])
def test_a_run_outside_the_cpus_interval_is_told(
    value: float, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    from bench.learning import intervals

    def command(self: gpu.Job, *args: str) -> tuple[int, str]:
        Path(args[args.index("--json") + 1]).write_text('{"seeds": []}')
        console = Console(record=True, width=80, quiet=False)
        console.print(intervals.comparison("means", [("after", 0.979, value, (0.9, 1.0))]))
        return 0, console.export_text()

    monkeypatch.setattr(gpu.Job, "command", command)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    given = job(tmp_path), "bench.any", "cpu_any.json"
    assert gpu.against_cpu(*given) == {"ok": False, "missing": ["cpu_any.json"]}
    (tmp_path / "cpu_any.json").touch()
    found = gpu.against_cpu(*given)
    assert found["ok"] == ok and bool(found["outside"]) != ok


def test_real_pairs_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu.lengths, "SHARED", tmp_path)
    assert not gpu.pairs(job(tmp_path))["ok"]
    assert "DWRL_FAST_SHARED" in capsys.readouterr().out


def test_a_part_without_its_model_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "MODEL", tmp_path / "no-model")
    for part in (gpu.pretrained, gpu.lora):
        assert part(job(tmp_path))["missing"][0] == "no-model"
        assert "no-model" in (said := capsys.readouterr().out) and "make smollm2" in said


def test_a_stopped_table_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The part continues the table that an earlier part left."""

    def command(self: gpu.Job, *args: str) -> tuple[int, str]:
        path = Path(args[args.index("--json") + 1])
        cells = json.loads(path.read_text())["cells"] if path.exists() else []
        path.write_text(json.dumps({"cells": [*cells, "a run"]}))
        return (124 if len(cells) < 1 else 0), ""

    monkeypatch.setattr(gpu.Job, "command", command)
    for name in ("MODEL", "PAIRS"):
        monkeypatch.setattr(gpu, name, tmp_path)
    first = gpu.pretrained(job(tmp_path))
    assert first == {"cells": ["a run"], "ok": False, "status": 124} and "UNFINISHED" in capsys.readouterr().out
    assert gpu.pretrained(job(tmp_path)) == {"cells": ["a run", "a run"], "ok": True, "status": 0}


def test_each_command_of_the_adapters_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(self: gpu.Job, *args: str) -> tuple[int, str]:
        if "--json" in args:
            Path(args[args.index("--json") + 1]).write_text('{"findings": []}')
        return (4 if "dwrl_fast.doctor" in args and "--load_in_4bit" in args else 0), ""

    monkeypatch.setattr(gpu.Job, "command", command)
    monkeypatch.setattr(gpu, "MODEL", tmp_path)
    found = gpu.lora(job(tmp_path))
    assert not found["ok"] and [found[name]["status"] for name in found if name != "ok"] == [0, 4, 0]
    assert found["doctor"]["report"] == {"findings": []}
