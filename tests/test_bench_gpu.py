"""What the benchmarks run on a GPU alone, on tiny shapes without one."""

import torch
from attention_cases import TREES, plan_of
from rich.console import Console

from bench import linear_policy_loss, tree_attention
from bench.harness import Case, Row, Variant, measure
from bench.tree_attention import SMALL, Heads, attended, equal_work, minibatch
from dwrl_fast.reference import tree_mask


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
    assert "asked at most 1.2" in console.export_text()


def test_pairs_are_counted() -> None:
    for tree, plan in TREES.items():
        assert attended(plan) == int(tree_mask(plan).sum()), tree


def test_equal_work_is_as_much() -> None:
    for plan in (minibatch("hh", 40, 4), minibatch("rmb", 200, 4)):
        even = equal_work(plan)
        assert abs(int(even.stop[-1]) / int(plan.stop[-1]) - 1) < 0.1
        assert abs(attended(even) / attended(plan) - 1) < 0.1


def test_attention_in_float64() -> None:
    """Sequence by sequence as over the tree, with shared key heads; and every way of the GPU's case runs."""
    plan = plan_of([(7, -1), (5, 0), (3, 1), (4, 1), (6, 0), (2, 4), (9, -1)])
    for heads in (SMALL, Heads(6, 2, 8)):
        flat, gradient = tree_attention.drawn(36, heads, torch.float32)
        exact = tree_attention.exact(plan, flat, gradient)
        found = tree_attention.gpu_variants(plan, heads, torch.float32, flat, gradient, "reference")
        for variant in found[:2]:
            assert variant.run is not None
            for x, y in zip(variant.run(), exact, strict=True):  # type: ignore[call-overload]
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


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
