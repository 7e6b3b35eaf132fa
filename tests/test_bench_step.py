"""The benchmark of whole updates: its minibatches have the stated lengths, and its variants compute the same."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from bench import harness
from bench.harness import Case, Variant, furthest, measure
from bench.training import lengths, step
from bench.training.flops import head_flops, trunk_flops
from bench.training.plain_update import plain
from bench.training.step import CASES, saved_bytes, trunk_variants
from bench.training.trl_update import grpo_trainer, trl_update
from bench.training.update import Setting, Way, fastest, ours, setting
from dwrl_fast import ops
from dwrl_fast.batching.layout import Layout
from dwrl_fast.batching.tree import TreeBatch
from dwrl_fast.ops import oracle

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1009,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Setting]:
    """Two short pairs and a small model; one thread, so that the figures are the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield setting(SHAPE, lengths.synthetic(2, 7, 5), lengths.thought_lengths(6, 16))
    torch.set_num_threads(threads)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("name", lengths.FILES)
def test_drawn_pairs_have_the_lengths_and_the_sharing_they_claim(name: str) -> None:
    thoughts = list(range(3, 3 + 8 * lengths.PAIRS))
    groups = lengths.groups(lengths.drawn(name), thoughts, 32003)
    tree, packed = (Layout(packing, 10**6, 0, CPU).batches(groups)[0] for packing in ("tree", "packed"))
    table = lengths.LENGTHS[name]
    rest = sum(thoughts) + len(thoughts) * lengths.TAIL
    contexts = [2 * (x + lengths.EVALUATE) + chosen + rejected for x, chosen, rejected, _ in table]
    assert packed.trunk_tokens == packed.naive_tokens == 4 * sum(contexts) + rest
    shared = sum(x + both for x, *_, both in table) + (len(table) - 1) * lengths.HEADER
    assert tree.trunk_tokens == sum(contexts) + rest - shared
    assert tree.head_rows == packed.head_rows == sum(thoughts) + len(thoughts)


@pytest.mark.parametrize("name", ["hh", *(pytest.param(k, marks=pytest.mark.slow) for k in list(lengths.FILES)[1:])])
def test_the_table_of_lengths_is_that_of_the_real_rows(
    name: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "SHARED", shared)
    found = lengths.pairs(name)
    assert "not here" not in found.source
    rows = []
    for chosen, rejected in found.contexts:
        sizes = [c.response.stop - c.response.start for c in (chosen, rejected)]
        rows.append((chosen.response.start, *sizes, common(chosen.ids, rejected.ids) - chosen.response.start))
        assert len(chosen.ids) - chosen.response.stop == lengths.EVALUATE
    assert rows == lengths.LENGTHS[name]
    assert len(found.tail) == lengths.TAIL
    assert common(*(both[0].ids for both in found.contexts[:2])) == lengths.HEADER


def test_without_the_real_rows_ids_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "SHARED", tmp_path)
    assert "not here" in lengths.pairs("rmb").source


def test_thoughts_have_the_mean_they_are_drawn_at() -> None:
    for mean in (1, 40, 200):
        sizes = lengths.thought_lengths(mean, 64)
        assert min(sizes) >= 1
        assert abs(sum(sizes) / 64 - mean) < 0.1 + 0.3 * (mean == 1)
    assert len(set(sizes)) > 32


def test_every_variant_computes_the_same_losses_and_gradients(tiny: Setting) -> None:
    expected = harness.tensors(ours(tiny, "tree").run())
    assert len(expected) == 8  # of each phase the loss and three gradients
    assert all(x.isfinite().all() and x.norm() > 0 for x in expected)
    for way in (ours(tiny, "packed"), ours(tiny, "padded"), *plain(tiny)):
        apart, _ = furthest(harness.tensors(way.run()), expected)
        assert apart < 1e-4, way.note


def test_counters_of_the_plain_recipe(tiny: Setting) -> None:
    one, both = (way.counters for way in plain(tiny))
    assert one["naive tokens"] == both["naive tokens"] == ours(tiny, "packed").counters["trunk tokens"]
    for found in (one, both):
        assert found["head rows"] == found["trunk tokens"] == found["naive tokens"] + found["padding"]
    assert both["padding"] >= one["padding"] > 0


@pytest.mark.parametrize("size", [4, 16])
def test_trl_computes_the_clipped_objective_of_ours(tiny: Setting, size: int) -> None:
    """Loss and gradient of GRPOTrainer equal those of our operator with the same weights."""
    pytest.importorskip("trl")
    sequences = [sequence for group in tiny.groups for sequence in group.flat]
    advantages = torch.randn(len(sequences), generator=torch.Generator().manual_seed(1))
    theirs = copy.deepcopy(tiny.lm)
    found = trl_update(grpo_trainer(theirs), sequences, tiny.old, advantages, size)
    loss = found.run()
    counted = found.counters
    assert counted["naive tokens"] == sum(sequence.thought.stop for sequence in sequences)
    assert counted["trunk tokens"] == counted["naive tokens"] + counted["padding"]

    model = tiny.runtime.model
    (batch,) = tiny.runtime.layout.batches(tiny.groups)
    assert batch.old_logprob is not None
    place = {id(sequence): i for i, sequence in enumerate(sequences)}
    order = torch.tensor([place[id(sequence)] for group in batch.groups for sequence in group.flat])
    head = model(batch, tokens=True)
    each = (1 / (len(sequences) * batch.lengths))[batch.segment_ids]
    result = ops.linear_policy_loss(
        head.token, head.weight, batch.targets, batch.old_logprob, advantages[order][batch.segment_ids], each
    )
    assert ops.read_stats(result.stats)["clipped"] > 0
    weight = model.lm.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(result.loss, weight)
    torch.testing.assert_close(loss, result.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.get_input_embeddings().weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_trunk_variants_agree_and_hold_memory_as_they_hold_tokens() -> None:
    tree, packed = trunk_variants(SHAPE, 64, 32, 40)
    assert tree.run is not None
    assert packed.run is not None
    apart, _ = furthest(harness.tensors(packed.run()), harness.tensors(tree.run()))
    assert apart < 1e-4
    tokens, memory = (packed.counters[k] / tree.counters[k] for k in ("trunk tokens", "saved MiB"))
    assert tokens == 8 * (64 + 32 + 40) / (64 + 2 * 32 + 8 * 40)
    assert 0.8 * tokens < memory < 1.2 * tokens


def test_model_flops_are_those_of_the_products_that_are_computed(tiny: Setting) -> None:
    """Compared with PyTorch's own count, whose attention uses all keys."""
    lm, tokens = copy.deepcopy(tiny.lm), 12
    lm.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=torch.arange(tokens)[None], use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == trunk_flops(lm, tokens, tokens**2) + head_flops(lm, tokens)


def test_a_tree_attends_to_what_its_mask_shows(tiny: Setting) -> None:
    (batch,) = tiny.runtime.layout.batches(tiny.groups)
    assert isinstance(batch, TreeBatch)
    rows = len(batch.score_rows) * 4 / 3 + len(batch.token_rows)
    computed = trunk_flops(tiny.lm, batch.trunk_tokens, int(oracle.tree_mask(batch.plan).sum()))
    found = {packing: ours(tiny, packing).counters for packing in ("tree", "packed", "padded")}
    assert found["tree"]["model GFLOP"] == pytest.approx((computed + head_flops(tiny.lm, rows / 2)) / 1e9)
    for other in ("packed", "padded"):
        assert found[other]["model GFLOP"] == found[other]["naive GFLOP"] == found["tree"]["naive GFLOP"]
    assert found["tree"]["model GFLOP"] < found["packed"]["model GFLOP"]


def test_models_that_share_weights_change_apart(tiny: Setting) -> None:
    assert all(a is b for a, b in zip(tiny.lm.parameters(), tiny.runtime.model.lm.parameters(), strict=True))
    assert tiny.lm.config._attn_implementation == "sdpa"
    assert tiny.runtime.model.lm.config._attn_implementation == "sdpa+tree"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cases_of_a_gpu_on_a_small_model(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untied = SHAPE | {"model_type": "qwen2", "tie_word_embeddings": False}
    monkeypatch.setattr(step, "QWEN_7B", {k: v for k, v in untied.items() if k != "num_hidden_layers"})
    monkeypatch.setattr(step, "SYNTHETIC", (24, 20, 16))
    monkeypatch.setattr(step, "TOKEN_BUDGET", 400)
    monkeypatch.setattr(step, "GPU_PAIRS", {"512-512-416": 3, "hh": 1})
    monkeypatch.setattr(step, "trl_missing", lambda: "it is left out here")
    rows = [
        row for case in step.gpu_cases(2, checkpointing) for row in measure(case, repeats=3, seconds=0.1, quick=False)
    ]
    assert [row.variant for row in rows] == 2 * ["tree", "packed", "padded", "trl"]
    assert not any(row.disagrees for row in rows)
    console = Console(width=160)
    step.summary(rows, console)
    console.print(step.utilisation(rows, 1e12))
    shown = capsys.readouterr().out
    assert "packed takes" in shown and "asked are 2.0" in shown
    tree, packed, padded, trl = rows[:4]
    assert trl.skipped == "it is left out here"
    assert packed.counters["trunk tokens"] == 3 * 8 * (24 + 20 + 16)
    assert tree.counters["trunk tokens"] == 3 * (24 + 2 * 20 + 8 * 16)
    assert padded.counters["head rows"] == padded.counters["trunk tokens"]
    assert tree.flop_rate and packed.flop_rate and tree.seconds_median
    assert tree.flop_rate == pytest.approx(1e9 * tree.counters["model GFLOP"] / tree.seconds_median)


def test_a_ladder_ends_where_memory_does() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError

    fits, too_large = Way("fits", lambda: None, {}), Way("does not", fails, {})
    assert fastest([fits, too_large, fits]) is fits
    assert fastest([too_large]) is None


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    # The product saves x and the weight, the exponential saves its result, and the square saves that result too.
    assert saved_bytes(lambda: (x @ weight).exp().square(), [weight]) == 2 * x.nbytes


def test_seconds_come_in_the_unit_of_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "timed", lambda run: 6.0)
    pass_of_3 = Variant("a", lambda: torch.ones(1), times=3, note="so", counters={"tokens": 5})
    (row,) = measure(Case("case", lambda: [pass_of_3], per="token"), repeats=3, seconds=1.0, quick=False)
    assert (row.seconds_median, row.seconds_iqr, row.unit) == (2.0, 0.0, "seconds per token")
    assert (row.note, row.counters["tokens"]) == ("so", 5)
    (row,) = measure(Case("case", lambda: [Variant("a", lambda: torch.ones(1))]), repeats=3, seconds=1.0, quick=False)
    assert (row.seconds_median, row.unit) == (6.0, "seconds")


def test_quick_runs_one_case() -> None:
    assert [case.name for case in CASES if case.quick] == ["trunk-heavy/hh"]


def test_a_case_counts_products_of_the_head_of_the_model_that_it_names() -> None:
    heads = {"trunk-heavy": 512 * 32003, "head-heavy": 256 * 151936, "trunk": 512 * 32003}
    assert [case.unit for case in CASES] == [heads[case.name.partition("/")[0]] for case in CASES]
    data = [f"{name}{suffix}" for name in lengths.FILES for suffix in ("", "-200")]
    steps = [f"{model}/{name}" for model in ("trunk-heavy", "head-heavy") for name in data]
    assert [case.name for case in CASES] == [*steps, "trunk/256-128-160x4", "trunk/512-512-416x4"]
