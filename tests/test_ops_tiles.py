"""Plans as tiles: every visible key of a tile is listed once, and every reader of a tile of keys is visited once."""

import pytest
import torch
from attention_cases import TREES, Plan, drawn, plan_of

from dwrl_fast.ops import oracle, tiles

CPU = torch.device("cpu")
PLANS = {**TREES, "drawn": drawn(60, 40, 0.5, seed=3)}


def forest_of(plan: Plan) -> tiles.Forest:
    return tiles.forest(plan, int(plan.stop[-1]))


@pytest.mark.parametrize("window", [None, 1, 13])
@pytest.mark.parametrize("name", PLANS)
def test_lists_of_keys(name: str, window: int | None) -> None:
    """Every key that a query of the tile sees is listed once. All queries of the tile see the keys listed as shared."""
    seen = oracle.tree_mask(PLANS[name], window)
    for tile in (1, 16, 64):
        order, bounds, shared, keys, _, _ = forest_of(PLANS[name]).queries(tile, window, CPU)
        assert sorted(order.tolist()) == list(range(-(-len(seen) // tile)))
        for t, (low, high) in enumerate(bounds.unfold(0, 2, 1).tolist()):
            listed, rows = keys[low:high], seen[t * tile : (t + 1) * tile]
            assert len(listed.unique()) == len(listed)
            needed = set(rows.any(0).nonzero().squeeze(1).tolist())
            assert needed == set(listed.tolist()) if window is None else needed <= set(listed.tolist())
            assert rows[:, listed[: shared[t]].long()].all()


@pytest.mark.parametrize("name", PLANS)
def test_the_mask_is_where_subtrees_end(name: str) -> None:
    """Query t sees key u if u <= t < below[u]. A window also limits the difference of their positions."""
    below, place = map(torch.from_numpy, forest_of(PLANS[name]).tokenwise())
    token = torch.arange(len(below))
    sees = (token[:, None] >= token) & (token[:, None] < below)
    assert torch.equal(sees, oracle.tree_mask(PLANS[name]))
    assert torch.equal(sees & (place[:, None] - place < 13), oracle.tree_mask(PLANS[name], 13))


@pytest.mark.parametrize("longest", [1, 30, 10**6])
@pytest.mark.parametrize("name", PLANS)
def test_runs_of_queries(name: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a tile cover the range of its readers without gaps or overlaps. The parts of split tiles are in
    order.
    """
    monkeypatch.setattr(tiles, "SHORTEST_RUN", longest)
    monkeypatch.setattr(tiles, "RUN_UNIT", 1)
    monkeypatch.setattr(tiles, "PROGRAMS", 10**9)
    seen = oracle.tree_mask(PLANS[name])
    for tile in (1, 16, 64):
        runs, split, parts, *_ = tiles._read(PLANS[name]).keys(tile, 4, CPU)
        walked: dict[int, list[int]] = {t: [] for t in range(-(-len(seen) // tile))}
        numbers: dict[int, tuple[int, int]] = {}
        for t, low, high, part in runs.tolist():
            assert 0 < high - low <= longest
            walked[t] += range(low, high)
            if part >= 0:
                numbers[part] = t, low
        for t, rows in walked.items():
            last = int(seen[:, t * tile : (t + 1) * tile].any(1).nonzero().max())
            assert sorted(rows) == list(range(t * tile, last + 1))
        assert sorted(numbers) == list(range(parts))
        for t, low, high in split.tolist():
            of = [numbers[part] for part in range(low, high)]
            assert len(of) > 1 and {tile for tile, _ in of} == {t} and of == sorted(of)
        assert len(runs) == parts + len(walked) - len(split)


def test_runs_keep_a_gpu_busy() -> None:
    """The work for a root that all tokens read is divided among programs. The number of programs limits the memory for
    a long sequence.
    """
    for plan in (plan_of([(20, -1), *[(2000, 0)] * 30]), plan_of([(64 * 1024, -1)])):
        runs, _, parts, *_ = forest_of(plan).keys(64, 4, CPU)
        lengths = runs[:, 2] - runs[:, 1]
        assert int(lengths.max()) <= int(lengths.sum()) * 4 / tiles.PROGRAMS + tiles.RUN_UNIT
        assert parts * 4 <= 2 * tiles.PROGRAMS


def test_a_plan_is_read_once() -> None:
    plan = drawn(20, 5, 0.4)
    found = forest_of(plan)
    queries, keys = found.queries(16, None, CPU), found.keys(16, 2, CPU)
    assert forest_of(plan) is found and found.queries(16, None, CPU) is queries and found.keys(16, 2, CPU) is keys
    assert found.queries(16, 3, CPU) is not queries and found.keys(16, 4, CPU) is not keys
    flat = plan._replace(parent=torch.full_like(plan.parent, -1))
    assert all(len(path) == 1 for path in forest_of(flat).paths)
    before = len(tiles._FORESTS)
    del plan, flat, found, queries, keys
    assert len(tiles._FORESTS) == before - 1


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([(200, -1)], "the tree has 200 tokens; q has U = 269"),
        ([(100, -1), (100, 0), (69, 5)], "not on the path to node 1"),
        ([(100, -1), (100, -1), (69, 0)], "depth-first order"),
    ],
)
def test_a_plan_that_is_no_tree(nodes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiles.forest(plan_of(nodes), 269)
    gap = plan_of([(100, -1), (169, 0)])
    with pytest.raises(ValueError, match="must follow one another"):
        tiles.forest(gap._replace(start=gap.start * 2), 269)
