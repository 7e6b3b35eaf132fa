"""The benchmarks of sampling and of whole iterations: thoughts have the right lengths, and the counts are right."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import iteration, rounds
from bench.sampling import __main__ as sampling
from bench.sampling import counts, engines, texts, vllm_peer
from bench.sampling.engines import Work
from bench.training import lengths
from bench.training.update import loaded
from dwrl_fast.sampling.prefixes import prefix_tree
from dwrl_fast.scoring import Runtime

SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1009, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
START = list(range(100, 140))
WORK = Work([[*START, *range(i, i + 30)] for i in (10, 200, 300)], 2, 5)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield loaded(SHAPE)[1].runtime
    torch.set_num_threads(threads)


def test_a_ratio_is_of_the_same_rounds() -> None:
    found = rounds.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert found == (3.0, 2.0, 4.0)
    assert str(found) == "3.00 (2.00 to 4.00)"


def test_every_way_runs_once_a_round() -> None:
    seen: list[str] = []

    def way(name: str, seconds: float) -> float:
        seen.append(name)
        return seconds

    found = rounds.in_turn({"a": lambda: way("a", 1.0), "b": lambda: way("b", 2.0)}, rounds=6, seconds=60)
    assert found == {"a": [1.0] * 6, "b": [2.0] * 6}
    assert all(set(seen[i : i + 2]) == {"a", "b"} for i in range(0, 12, 2))
    assert len({tuple(seen[i : i + 2]) for i in range(0, 12, 2)}) == 2
    assert rounds.in_turn({"a": lambda: 1.0}, rounds=6, seconds=0.0) == {"a": [1.0]}


@pytest.mark.parametrize("kind", texts.BOUNDS)
def test_drawn_contexts_are_as_long_as_they_say(kind: str, tmp_path: Path) -> None:
    found = texts.texts(kind, 3, tmp_path)
    least, most = texts.BOUNDS[kind]
    assert len(found.contexts) == 6 and "drawn" in found.source
    assert all(least <= len(ids) <= most for ids in found.contexts)
    assert max(map(max, found.folded(50).contexts)) < 50


def test_every_way_writes_all_tokens(runtime: Runtime) -> None:
    ways = [*engines.plain(runtime, WORK), engines.of_sampler(engines.tree_sampler(runtime), WORK, "tree")]
    assert [way.run() > 0 for way in ways] == [True] * len(ways)
    peak = ways[-1].peak()
    assert peak is None or peak >= 0


def test_a_way_that_writes_less_is_refused() -> None:
    short = engines.engine(lambda: [5, 5, 5, 4, 5, 5], WORK, "one thought is short")
    few = engines.engine(lambda: [5], WORK, "thoughts are missing")
    for each in (short, few):
        with pytest.raises(ValueError, match="thoughts of"):
            each.run()


def test_the_fastest_of_each_ladder_ends_where_it_no_longer_gains() -> None:
    ran: list[str] = []
    whole = Work([[i] for i in range(32)], 2, 5)

    def ladders(work: Work) -> list[Iterator[engines.Engine]]:
        size = len(work.contexts)

        def way(name: str, seconds: float) -> engines.Engine:
            def run() -> float:
                ran.append(f"{name}{size}")
                return seconds

            return engines.Engine(name, run, lambda: size)

        first = [way("a", 3.0), way("b", 2.0), way("c", 2.5), way("d", 1.0)]
        return [iter(first), iter([way("e", 1.5)])]

    found = engines.fastest(ladders, whole)
    assert (found.note, found.peak()) == ("e", 32)  # swept on a part, to be timed on all
    assert ran == ["a8", "a8", "b8", "c8", "e8"]
    assert whole.part.contexts == [[0], [1], [8], [9], [16], [17], [24], [25]] and WORK.part is WORK


@pytest.mark.parametrize("cache", [None, "static"])
def test_trl_writes_all_tokens(runtime: Runtime, cache: str | None) -> None:
    pytest.importorskip("trl")
    (way,) = engines.trl(runtime, WORK, cache)
    assert way.run() > 0


def test_the_tree_is_counted_as_its_texts_share(runtime: Runtime) -> None:
    found = counts.tree_counts(engines.tree_sampler(runtime), WORK)
    tree = {node for end in prefix_tree(WORK.contexts) for node in end.path()}
    assert found.prefill == sum(len(node.ids) for node in tree) == 40 + 3 * 30
    assert found.decode == 3 * 2 * 4
    assert found.head == 3 + 3 * 2 * 4
    assert found.passes == 5
    # Each pass reads the shared part once, every context's own part once, and every thought separately.
    assert found.cached == 5 * 40 + 5 * 3 * 30 + 6 * (1 + 2 + 3 + 4)
    assert found.attended == 2 * 3 * sum(70 + t for t in range(1, 5))
    assert found.prefill_attended == 40 * 41 // 2 + 3 * sum(range(41, 71))


def test_the_plain_loop_is_counted_by_what_it_computes(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WORK._replace(contexts=[WORK.contexts[0][:50], *WORK.contexts[1:]])
    passed: list[tuple[int, int]] = []
    forward = type(runtime.model.lm).forward

    def counting(self: Any, input_ids: Any, attention_mask: Any, **options: Any) -> Any:
        passed.append((input_ids.numel(), attention_mask.numel()))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(type(runtime.model.lm), "forward", counting)
    engines.of_sampler(engines.plain_sampler(runtime, 4), work, "").run()
    found = counts.plain_counts(work, 4)
    assert sum(tokens for tokens, _ in passed) == found.prefill + found.decode
    assert len(passed) == found.passes == 2 * 5
    prefills = [step for i, step in enumerate(passed) if i % 5 == 0]
    assert sum(tokens for tokens, _ in prefills) == found.prefill == 2 * 70 + 70
    assert sum(keys for i, (_, keys) in enumerate(passed) if i % 5) == found.cached


def test_bounds_follow_counts(runtime: Runtime) -> None:
    rate, lm = counts.Rates(decode=2.0, prefill=4.0, read=8.0), runtime.model.lm
    nothing = counts.Counts(0, 0, 0, 0, 0, 0, 0)
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert counts.cached_bytes(lm) == 2 * 2 * 16 * 4
    found = counts.bound(lm, nothing._replace(prefill=3), rate)
    assert found.flops == pytest.approx(3 * 2 * layers) and found.computing == pytest.approx(found.flops / 4)
    found = counts.bound(lm, nothing._replace(head=3), rate)
    assert found.flops == pytest.approx(3 * 2 * 1009 * 32) and found.computing == pytest.approx(found.flops / 2)
    found = counts.bound(lm, nothing._replace(passes=1, cached=10), rate)
    assert found.read == sum(p.nbytes for p in lm.parameters()) + 10 * counts.cached_bytes(lm)
    assert found.reading == found.read / 8


WORKER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    lengths = [asked["tokens"]] * (len(asked["prompts"]) * asked["n"])
    print(json.dumps({"peak": 7} if asked["peak"] else {"seconds": 2.5, "lengths": lengths[LESS:]}), flush=True)
"""


@pytest.mark.parametrize("less", [0, 1])
def test_vllm_is_asked_in_a_process_of_its_own(less: int, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/worker.py\n")
    python.chmod(0o755)
    (tmp_path / "worker.py").write_text(WORKER.replace("LESS", str(less)))
    with (tmp_path / "log").open("w+b") as log:
        found = vllm_peer.Vllm(str(python), tmp_path, 1, log)
        way = found.engine(WORK)
        if less:
            with pytest.raises(ValueError, match="thoughts of"):
                way.run()
        else:
            assert (way.run(), way.peak()) == (2.5, 7)
        found.close()
        assert found.process.returncode == 0


def test_a_vllm_that_does_not_start_says_why(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    python.chmod(0o755)
    with (tmp_path / "log").open("w+b") as log, pytest.raises(RuntimeError, match=r"(?s)ended with 3.*no such model"):
        vllm_peer.fastest_vllm(str(python), tmp_path, WORK, log)


def test_a_stage_within_another_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(iteration, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    stages = iteration.Stages()
    with stages("outer"):
        now[0] += 1
        with stages("inner"):
            now[0] += 3
    assert stages.seconds == {"outer": 1.0, "inner": 3.0} and stages.shares() == {"outer": 0.25, "inner": 0.75}
    stages.begin()
    assert not stages.seconds


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates large enough to change a weight."""
    monkeypatch.setattr(iteration, "RATE", 1e-2)


@pytest.mark.usefixtures("moving")
def test_both_iterations_update_the_model() -> None:
    pytest.importorskip("trl")
    policy, rollout = iteration.trained(SHAPE)
    pairs, tokens = lengths.synthetic(2, 12, 9), 4
    weight = policy.model.lm.base_model.layers[0].mlp.down_proj.weight
    stages = []
    for way in (
        iteration.ours(policy, rollout, pairs, tokens, engines.tree_sampler(policy.runtime), "tree"),
        iteration.grpo(policy.runtime, pairs, tokens),
    ):
        before = weight.detach().clone()
        assert way.seconds() > 0
        assert not torch.equal(before, weight)
        stages.append(set(way.stages.seconds))
    assert stages == [
        {"sampling", "laying out", "phase score", "phase thought"},
        {"sampling", "laying out", "update"},  # and no old log-probs
    ]


@pytest.mark.parametrize("command", [sampling, iteration])
def test_the_commands(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, report = tmp_path / "figures.json", {"--case": "short"} if command is sampling else {"--data": "hh"}
    monkeypatch.setattr(command, "DRAWN", SHAPE)
    monkeypatch.setattr(command, "trl_missing", lambda: "it is left out here")
    monkeypatch.setattr(counts, "READ", 1 << 20)
    monkeypatch.setattr(counts, "LEAST", 1e6)
    monkeypatch.setattr(lengths, "SHARED", tmp_path)
    arguments = [word for pair in report.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--threads", "1", "--json", str(file), *arguments])
    command.main()
    shown = capsys.readouterr().out
    assert "no trl: it is left out here" in shown
    (case,) = json.loads(file.read_text())["cases"]
    names = ["tree", "plain", "plain, best"] if command is sampling else ["ours", "plain loop"]
    assert [row["variant"] for row in case["rows"]] == names
    assert all(len(row["seconds"]) == 3 for row in case["rows"])
