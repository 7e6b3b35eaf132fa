"""An engine that fails within a batch is restarted, and the result equals that of an uninterrupted run."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeLlm, FakeVllm, serving
from test_resume import same_weights, untimed
from test_trainer import make_trainer
from tiny import tiny_config

from dwrl_fast.config import TrainConfig
from dwrl_fast.embedded.tokenizer import IDS
from dwrl_fast.errors import SamplerError
from dwrl_fast.ranks import ALONE
from dwrl_fast.sampling.vllm import adapter
from dwrl_fast.sampling.vllm.colocated import Colocated
from dwrl_fast.training.checkpoint import checkpoints
from dwrl_fast.training.runlog import read_metrics

WORDS = [IDS[digit] for digit in "0123456789"]
BATCH = 4 * 2 * 3  # requests of a rollout batch: rows, responses, thoughts
LATEST = r"--resume_from_checkpoint latest"


class Fault:
    """Raises an error when `when` is true for the number of finished requests. `fired` counts the errors."""

    def __init__(self, when: Callable[[int, int], bool]) -> None:
        self.when, self.fired = when, 0

    def __call__(self, finished: int) -> None:
        if self.when(finished, self.fired):
            self.fired += 1
            raise RuntimeError("the engine core died")


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    return tiny_config(folder, max_steps=3, use_vllm=True, **changes)


def engines(monkeypatch: pytest.MonkeyPatch, strike: Callable[[int], None]) -> list[FakeLlm]:
    """Replace vLLM by fake engines. The list gets each engine that is created."""
    made: list[FakeLlm] = []
    finished = [0]

    def make(folder: str, **options: Any) -> FakeLlm:
        made.append(FakeLlm(WORDS, finished, strike))
        return made[-1]

    monkeypatch.setattr(adapter, "check_cpu_heads", lambda config: None)
    monkeypatch.setattr(adapter, "sampling_params", lambda ask: ask)
    monkeypatch.setattr(adapter, "make_llm", make)
    return made


@pytest.fixture(scope="module")
def whole(module_folder: Path) -> Path:
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        made = engines(patch, lambda finished: None)
        make_trainer(config_of(module_folder), module_folder / "whole").train()
    assert len(made) == 1
    return module_folder / "whole"


def same(run: Path, whole: Path) -> bool:
    """Whether thoughts, weights and metrics are equal, except the number of engine restarts."""
    files = sorted((whole / "thoughts").iterdir())
    assert len(files) == 3
    thoughts = all(path.read_bytes() == (run / "thoughts" / path.name).read_bytes() for path in files)
    rows = [[row | {"engine_restarts": 0} for row in untimed(each)] for each in (run, whole)]
    return thoughts and rows[0] == rows[1] and same_weights(run, whole)


def test_an_engine_that_dies_is_started_again_and_the_batch_sampled_again(
    module_folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault(lambda finished, fired: finished == BATCH + 7 and not fired)
    made = engines(monkeypatch, fault)
    make_trainer(config_of(module_folder), tmp_path / "run").train()
    assert fault.fired == 1 and len(made) == 2 and made[0].dead, "the fault has fired"
    assert made[0].finished[0] == 3 * BATCH + 7, "the whole batch was sampled again"
    assert [row["engine_restarts"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 0]
    assert caplog.text.count("vLLM in this process failed (RuntimeError: the engine core died). It is restarted") == 1
    assert same(tmp_path / "run", whole)


def test_what_is_compared_would_show_an_engine_without_its_weights(
    module_folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines(monkeypatch, Fault(lambda finished, fired: finished == BATCH + 7 and not fired))
    load = Colocated.load

    def loads(self: Colocated, *given: Any) -> None:
        if not self.restarts or self.loaded != given:
            load(self, *given)

    monkeypatch.setattr(Colocated, "load", loads)
    make_trainer(config_of(module_folder), tmp_path / "run").train()
    assert not same(tmp_path / "run", whole)


def test_an_engine_that_dies_again_ends_the_run_which_goes_on_from_there(
    module_folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(lambda finished, fired: finished >= 2 * BATCH + 3)
    made = engines(monkeypatch, fault)
    config = config_of(module_folder, save_steps=0)
    with pytest.raises(SamplerError, match=f"failed again after a restart .*the engine core died.*{LATEST}"):
        make_trainer(config, tmp_path / "run").train()
    assert fault.fired == 2 and len(made) == 2
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-000002"], "nothing before is lost"
    engines(monkeypatch, lambda finished: None)
    make_trainer(
        dataclasses.replace(config, resume_from_checkpoint="latest", output_dir=str(tmp_path / "run")), tmp_path / "run"
    ).train()
    assert same(tmp_path / "run", whole)


def test_an_engine_that_cannot_be_started_again_is_named(
    module_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: str, **options: Any) -> FakeLlm:
        raise RuntimeError("no memory for the cache")

    def strikes(finished: int) -> None:
        monkeypatch.setattr(adapter, "make_llm", fails)
        raise RuntimeError("the engine core died")

    made = engines(monkeypatch, strikes)
    with pytest.raises(SamplerError, match=f"could not be restarted .no memory for the cache.*{LATEST}"):
        make_trainer(config_of(module_folder), tmp_path / "run").train()
    assert ALONE.mesh is None and len(made) == 1


# Servers


@pytest.fixture
def fake() -> Iterator[tuple[FakeVllm, str]]:
    made = FakeVllm()
    made.length = 1024
    with serving(made) as url:
        yield made, url


def served(folder: Path, url: str, **changes: Any) -> TrainConfig:
    changes = {"vllm_mode": "server", "vllm_server_base_url": (url,), "vllm_server_timeout": 10.0} | changes
    return config_of(folder, save_steps=0, **changes)


@pytest.mark.slow
def test_a_restarted_server_is_counted_and_one_that_stays_away_ends_the_run(
    module_folder: Path, tmp_path: Path, fake: tuple[FakeVllm, str], caplog: pytest.LogCaptureFixture
) -> None:
    server, url = fake
    make_trainer(served(module_folder, url), tmp_path / "whole").train()
    asked, fired = 0, list[str]()

    def counting(body: dict[str, Any]) -> None:
        nonlocal asked
        asked += body["seed"] is not None
        if asked == BATCH + 7 and not fired:
            fired.append("restart")
            server.restart()

    server.restart()
    server.fault = counting
    make_trainer(served(module_folder, url), tmp_path / "run").train()
    assert fired == ["restart"]
    assert [row["engine_restarts"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 0]
    assert caplog.text.count("the latest are sent again") == 1
    assert same(tmp_path / "run", tmp_path / "whole")

    def leaving(body: dict[str, Any]) -> None:
        nonlocal asked
        asked += body["seed"] is not None
        server.gone = asked > BATCH + 7

    server.restart()
    asked, server.fault = 0, leaving
    with pytest.raises(SamplerError, match=rf"no vLLM server answers at {url}(.|\n)*api_server(.|\n)*{LATEST}"):
        make_trainer(served(module_folder, url, vllm_server_timeout=2.0), tmp_path / "lost").train()
    assert server.gone and [path.name for path in checkpoints(tmp_path / "lost")] == ["checkpoint-000001"]
    server.gone, server.fault = False, lambda body: None
    server.restart()
    make_trainer(
        served(module_folder, url, resume_from_checkpoint="latest", output_dir=str(tmp_path / "lost")),
        tmp_path / "lost",
    ).train()
    assert same(tmp_path / "lost", tmp_path / "whole")
