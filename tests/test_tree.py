"""The tree layout against a trie that stores every prefix as a tuple, and against the padded layout."""

import dataclasses
from collections.abc import Iterator
from random import Random

import pytest
import torch
from drawn_groups import drawn_groups, make_group, make_sequence, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_dialog, tiny_model
from torch import Tensor

from dwrl_fast import log
from dwrl_fast.batching.layout import Layout, Packing
from dwrl_fast.batching.padded import padded_batch
from dwrl_fast.batching.tree import TreeBatch, split_tree, tree_batch, tree_sizes
from dwrl_fast.data import Preference
from dwrl_fast.dialog import TokenSequence
from dwrl_fast.encode import Group, response_requests
from dwrl_fast.ops.oracle import tree_mask
from dwrl_fast.sampling import sample_groups
from dwrl_fast.sampling.transformers import TransformersSampler

CPU = torch.device("cpu")
quick = settings(max_examples=100, deadline=None, derandomize=True)
Prefix = tuple[int, ...]


def flat(groups: list[Group]) -> list[TokenSequence]:
    return [sequence for group in groups for sequence in group.flat]


def prefixes(ids: list[int]) -> Iterator[Prefix]:
    return (tuple(ids[:size]) for size in range(1, len(ids) + 1))


def expected_order(groups: list[Group]) -> list[Prefix]:
    """Every prefix once, in depth-first order. The prefixes of earlier sequences come first."""
    first: dict[Prefix, int] = {}
    for number, sequence in enumerate(flat(groups)):
        for prefix in prefixes(sequence.ids):
            first.setdefault(prefix, number)
    return sorted(first, key=lambda prefix: [first[part] for part in prefixes(list(prefix))])


def stored_order(batch: TreeBatch) -> list[Prefix]:
    """The prefix that ends at each row, computed from the parents."""
    found: list[Prefix] = []
    for start, stop, parent in zip(
        *map(Tensor.tolist, (batch.plan.start, batch.plan.stop, batch.plan.parent)), strict=True
    ):
        above: Prefix = found[batch.plan.stop[parent] - 1] if parent >= 0 else ()
        own = batch.input_ids[start:stop].tolist()
        found += [above + prefix for prefix in prefixes(own)]
    return found


@quick
@given(drawn_groups())
def test_every_prefix_is_stored_once_in_depth_first_order(groups: list[Group]) -> None:
    batch = tree_batch(groups, CPU)
    assert stored_order(batch) == expected_order(groups)
    assert batch.position_ids.tolist() == [len(prefix) - 1 for prefix in stored_order(batch)]
    assert batch.trunk_tokens == len(batch.input_ids) == len(expected_order(groups))


@quick
@given(drawn_groups())
def test_head_rows_are_those_of_the_sequences(groups: list[Group]) -> None:
    batch = tree_batch(groups, CPU)
    stored = stored_order(batch)
    assert [stored[row] for row in batch.score_rows] == [tuple(s.ids) for s in flat(groups)]
    trained = [(n, s.ids, t) for n, s in enumerate(flat(groups)) for t in range(s.thought.start, s.thought.stop)]
    assert [stored[row] for row in batch.token_rows] == [tuple(ids[:t]) for _, ids, t in trained]
    assert batch.targets.tolist() == [ids[t] for _, ids, t in trained]
    assert batch.segment_ids.tolist() == [number for number, _, _ in trained]
    assert batch.head_rows == len(trained) + len(flat(groups))
    assert batch.naive_tokens == sum(len(s.ids) for s in flat(groups)) and batch.padding == 0


@quick
@given(drawn_groups())
def test_nodes(groups: list[Group]) -> None:
    batch = tree_batch(groups, CPU)
    plan = batch.plan
    assert all(getattr(plan, field.name).dtype == torch.int64 for field in dataclasses.fields(plan))
    start, stop, parent = map(Tensor.tolist, (plan.start, plan.stop, plan.parent))
    assert (
        start == [0, *stop[:-1]]
        and stop[-1] == batch.trunk_tokens
        and all(a < b for a, b in zip(start, stop, strict=True))
    )
    path: list[int] = []
    for node, above in enumerate(parent):
        assert above in (-1, *path), "depth first"
        path = [*path[: path.index(above) + 1 if above >= 0 else 0], node]
        assert parent.count(node) != 1, "a node with one child is one node"


@quick
@given(drawn_groups(), st.booleans())
def test_all_else_is_as_in_the_padded_layout(groups: list[Group], mask_truncated: bool) -> None:
    batch = tree_batch(groups, CPU, mask_truncated=mask_truncated)
    padded = padded_batch(groups, 9, CPU, mask_truncated=mask_truncated)
    for name in ("targets", "segment_ids", "lengths", "trained", "old_logprob", "slots", "valid"):
        torch.testing.assert_close(getattr(batch, name), getattr(padded, name), rtol=0, atol=0, msg=name)
    for name in ("groups", "naive_tokens", "head_rows"):
        assert getattr(batch, name) == getattr(padded, name), name
    for name in ("score_rows", "token_rows"):
        ids = padded.input_ids.flatten()[getattr(padded, name)]
        assert batch.input_ids[getattr(batch, name)].tolist() == ids.tolist(), name
    assert padded.padding == (padded.input_ids == 9).sum() == (padded.attention_mask == 0).sum()
    assert padded.trunk_tokens - padded.padding == batch.naive_tokens >= batch.trunk_tokens
    old = [value for g in groups for row in g.thoughts for each in row for value in each.logprobs]
    assert batch.old_logprob is not None and batch.old_logprob.tolist() == old
    ended = [each.ended for g in groups for row in g.thoughts for each in row]
    assert batch.trained.tolist() == (ended if mask_truncated else [True] * len(ended))
    numbers = torch.arange(len(batch.score_rows))
    assert batch.grid(numbers)[batch.valid].tolist() == numbers.tolist()


@quick
@given(drawn_groups(), st.randoms(use_true_random=False))
def test_the_order_of_groups_changes_no_content(groups: list[Group], random: Random) -> None:
    batch, again = tree_batch(groups, CPU), tree_batch(groups, CPU)
    for name in ("input_ids", "position_ids", "score_rows", "token_rows"):
        assert torch.equal(getattr(batch, name), getattr(again, name)), name
    shuffled = random.sample(groups, len(groups))
    other = tree_batch(shuffled, CPU)
    assert sorted(stored_order(other)) == sorted(stored_order(batch))
    assert len(other.plan.start) == len(batch.plan.start)


@pytest.mark.parametrize("packing", ["tree", "packed", "padded"])
def test_a_layout_trains_cut_thoughts_unless_told_and_counts_tokens(packing: Packing) -> None:
    """Two thoughts of one response; the first is truncated. Layouts are equal whatever batches they have made."""
    group = whole([1, 2, 3], [1, 4])
    for mask_truncated, trained in ((False, [True, True]), (True, [False, True])):
        layout = Layout(packing, 100, 9, CPU, mask_truncated)
        (batch,) = layout.batches([group])
        assert batch.trained.tolist() == trained
        layout.batches([group])
        assert layout.tokens == {"naive": 10, "computed": {"tree": 8, "packed": 10, "padded": 12}[packing]}
        fresh = Layout(packing, 100, 9, CPU, mask_truncated)
        assert layout == fresh and repr(layout) == repr(fresh) and fresh.tokens == {}
    assert Layout(packing, 100, 9, CPU) == Layout(packing, 100, 9, CPU, False)


def nodes(groups: list[Group]) -> list[tuple[int, list[int]]]:
    """(parent, own tokens) of each node."""
    batch = tree_batch(groups, CPU)
    spans = zip(batch.plan.parent.tolist(), batch.plan.start.tolist(), batch.plan.stop.tolist(), strict=True)
    return [(parent, batch.input_ids[start:stop].tolist()) for parent, start, stop in spans]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([whole([1, 2, 3])], [(-1, [1, 2, 3])]),
        ([whole([1, 2, 3], [1, 2, 3])], [(-1, [1, 2, 3])]),
        ([whole([1, 2, 3], [1, 2])], [(-1, [1, 2, 3])]),
        ([whole([1, 2], [1, 2, 3])], [(-1, [1, 2, 3])]),
        ([whole([1, 2], [1, 2, 3], [1, 2, 4])], [(-1, [1, 2]), (0, [3]), (0, [4])]),
        ([whole([5, 2, 3], [4, 2, 3])], [(-1, [5, 2, 3]), (-1, [4, 2, 3])]),
        ([whole([1, 3], [1, 2], [1, 4])], [(-1, [1]), (0, [3]), (0, [2]), (0, [4])]),
        ([whole([1, 2, 3, 4], [1, 5], [1, 2, 3, 6])], [(-1, [1]), (0, [2, 3]), (1, [4]), (1, [6]), (0, [5])]),
        ([whole([1, 2, 3]), whole([7]), whole([1, 2, 4])], [(-1, [1, 2]), (0, [3]), (0, [4]), (-1, [7])]),
        (
            [make_group([[make_sequence([1, k, 0], 2, 3), make_sequence([1, k, 9], 2, 3)] for k in range(5)])],
            [(-1, [1]), *((p, own) for k in range(5) for p, own in ((0, [k]), (3 * k + 1, [0]), (3 * k + 1, [9])))],
        ),
    ],
    ids=[
        *(
            "one",
            "identical",
            "prefix after",
            "prefix before",
            "prefix of two",
            "nothing shared",
            "one-token thoughts",
            "nested",
        ),
        *("a prompt met again", "ranking of five"),
    ],
)
def test_shapes_of_trees(groups: list[Group], expected: list[tuple[int, list[int]]]) -> None:
    assert nodes(groups) == expected


def test_without_sharing_every_sequence_is_a_root() -> None:
    batch = tree_batch([whole([1, 2, 3], [1, 2])], CPU, shared=False)
    assert batch.input_ids.tolist() == [1, 2, 3, 1, 2] and batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert (batch.plan.start.tolist(), batch.plan.stop.tolist()) == ([0, 3], [3, 5])
    assert batch.plan.parent.tolist() == [-1, -1]
    groups = [whole([1, 2], [1, 3]), whole([1])]
    assert tree_sizes(groups, shared=False) == [(4, 6), (1, 1)]
    assert tree_sizes(groups) == [(3, 5), (1, 1)]
    assert [len(micro) for micro in split(groups, 4)] == [2]


def test_a_changed_thought_moves_no_other() -> None:
    before, after = (tree_batch([whole([1, 5, 6], [1, x, x], [1, 4, 4])], CPU) for x in (8, 2))
    assert torch.equal(before.token_rows, after.token_rows) and torch.equal(before.score_rows, after.score_rows)
    assert (before.input_ids != after.input_ids).nonzero().flatten().tolist() == [3, 4]


def test_the_plan_says_who_sees_whom() -> None:
    """A plain model with the plan's mask computes the same as with one sequence per row."""
    model, dialog = tiny_model(), tiny_dialog()
    prompts = [("3 1 4", "6", "2 2 2 2"), ("1", "1", "0"), ("3 1 4", "6", "7")]
    rows = [Preference(({"role": "user", "content": x},), (a, b)) for x, a, b in prompts]
    sampler = TransformersSampler(model.lm, dialog.stop_ids, dialog.pad_id, batch_size=64)
    requests = response_requests(rows, dialog)
    groups = sample_groups(requests, dialog, sampler, 4, max_tokens=6, temperature=1.0, seed=0)
    batch, padded = tree_batch(groups, CPU), padded_batch(groups, dialog.pad_id, CPU)
    depth: list[int] = []
    for above in batch.plan.parent.tolist():
        depth.append(depth[above] + 1 if above >= 0 else 0)
    assert max(depth) >= 3 and batch.trunk_tokens < 0.6 * batch.naive_tokens
    mask = torch.where(tree_mask(batch.plan), 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        found = model.lm.base_model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], attention_mask=mask
        ).last_hidden_state[0]
        expected = model(padded, tokens=True)
    torch.testing.assert_close(found[batch.score_rows], expected.score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[batch.token_rows], expected.token, rtol=1e-5, atol=1e-5)


def unique(group: Group) -> int:
    return len({prefix for sequence in group.flat for prefix in prefixes(sequence.ids)})


@quick
@given(st.lists(drawn_groups(), min_size=1, max_size=3), st.integers(1, 40))
def test_batches_hold_whole_groups_within_the_budget(drawn: list[list[Group]], budget: int) -> None:
    groups = [group for each in drawn for group in each]
    batches = split(groups, budget)
    assert sorted(id(group) for batch in batches for group in batch) == sorted(map(id, groups))
    for number, batch in enumerate(batches):
        assert len(batch) == 1 or sum(map(unique, batch)) <= budget
        assert len(batch) == 1 or tree_batch(batch, CPU).trunk_tokens <= budget
        for earlier in batches[:number]:
            filled = [sum(map(unique, [g for g in earlier if unique(g) >= unique(group)])) for group in batch]
            assert all(size + unique(group) > budget for size, group in zip(filled, batch, strict=True)), (
                "it fitted before"
            )
    assert [unique(batch[0]) for batch in batches] == sorted((unique(b[0]) for b in batches), reverse=True)


def split(groups: list[Group], budget: int) -> list[list[Group]]:
    return split_tree(groups, [size for size, _ in tree_sizes(groups)], budget)


def test_the_largest_groups_are_placed_first() -> None:
    groups = [whole(list(range(size))) for size in (3, 6, 4, 7)]
    assert [list(map(unique, batch)) for batch in split(groups, 10)] == [[7, 3], [6, 4]]


def test_the_budget_counts_unique_tokens() -> None:
    shared = [whole([n, *range(6), 6], [n, *range(6), 7]) for n in range(2)]
    assert [len(batch) for batch in split(shared, 18)] == [2]
    assert [len(batch) for batch in split(shared, 17)] == [1, 1]


def test_a_group_beyond_the_budget_is_said(caplog: pytest.LogCaptureFixture) -> None:
    log.warn_once.cache_clear()
    groups = [whole([1, 2, 3, 4, 5]), whole([2, 3, 4])]
    for _ in range(2):
        assert [list(map(unique, batch)) for batch in split(groups, 3)] == [[5], [3]]
    assert [record.getMessage().partition("; ")[0] for record in caplog.records] == [
        "a preference group exceeds --token_budget 3"
    ]
