"""vLLM as a peer: a separate process with its own Python, which loads a model once and answers requests."""

import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any

import torch

from bench.sampling.engines import Engine, Work

ROOT = Path(__file__).parents[2]
LONGEST = 1024  # maximum tokens of a text
CACHE_GIB = 4


class Vllm:
    """A running vLLM. threads: of PyTorch's own operators; None: vLLM's choice. In both cases its kernels use all cores
    that `torch` uses here.
    """

    def __init__(self, python: str, model: Path, threads: int | None, log: IO[bytes]):
        self.log = log
        self.note = f"vLLM's threads for PyTorch: {'its choice' if threads is None else threads}"
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB), "HF_HUB_OFFLINE": "1"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = _cores(torch.get_num_threads())
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
        if openmp.is_file():  # recommended by vLLM's manual
            environment["LD_PRELOAD"] = str(openmp)
        self.process = subprocess.Popen(
            [python, "-m", "bench.sampling.vllm_worker", str(model.resolve()), str(LONGEST)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").split("\n")
            raise RuntimeError("\n".join([f"vLLM ended with {code}", *said[-12:]]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, work: Work, *, peak: bool) -> dict[str, Any]:
        """The answer of the worker."""
        assert self.process.stdin is not None
        request = {"prompts": work.contexts, "n": work.n, "tokens": work.tokens, "peak": peak}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def engine(self, work: Work) -> Engine:
        """An engine. Its seconds are measured in its own process, without communication."""

        def run() -> float:
            answer = self.ask(work, peak=False)
            work.check(answer["lengths"])
            return float(answer["seconds"])

        return Engine(self.note, run, lambda: self.ask(work, peak=True)["peak"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def fastest_vllm(python: str, model: Path, work: Work, log: IO[bytes]) -> Vllm:
    """The faster of its own choice of threads and ours, each run once after a warm-up."""
    best: tuple[float, Vllm] | None = None
    for threads in (None, torch.get_num_threads()):
        found = Vllm(python, model, threads, log)
        found.ask(work.part, peak=False)
        taken = found.engine(work.part).run()
        slower = found if best is not None and best[0] <= taken else best and best[1]
        if slower is not found:
            best = (taken, found)
        if slower is not None:
            slower.close()
    assert best is not None
    return best[1]


def _cores(count: int) -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:count]))
