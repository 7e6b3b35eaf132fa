"""Groups are shared among ranks: each one once, at about equal cost, equally on every rank; so are thoughts."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from drawn_groups import make_group, make_sequence
from hypothesis import given
from hypothesis import strategies as st

from bench.scaling import ASKED, balance
from dwrl_fast import ranks
from dwrl_fast.batching.balance import CLOSE, Cost, balanced
from dwrl_fast.batching.layout import Layout
from dwrl_fast.encode import Thought
from dwrl_fast.errors import ConfigError
from dwrl_fast.ranks import Ranks
from dwrl_fast.sampling import Rating, split

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 10**12), max_size=40), st.integers(1, 9))
def test_every_place_once_and_nothing_left_to_exchange(costs: list[int], count: int) -> None:
    found = balanced(costs, count)
    assert sorted(place for own in found for place in own) == list(range(len(costs)))
    assert len(found) == count and all(own == sorted(own) for own in found) and found == balanced(costs, count)
    loads = [sum(costs[i] for i in own) for own in found]
    most = max(range(count), key=loads.__getitem__)
    if loads[most] * count > CLOSE * sum(loads):
        for rank in set(range(count)) - {most}:
            for given in found[most]:
                for taken in (0, *(costs[i] for i in found[rank])):
                    moved = costs[given] - taken
                    assert max(loads[most] - moved, loads[rank] + moved) >= loads[most]


@pytest.mark.parametrize("data", ["hh", "rmb"])
def test_real_lengths_are_shared_within_five_percent(data: str) -> None:
    """With 8 ranks: minibatches of 64 and more in every draw, the default of 32 groups in the median."""
    for row in balance(data, 100, 200, 20):
        assert row["median"] <= ASKED and (row["most"] <= ASKED or row["minibatch"] < 64), row


def test_the_cost_of_a_group() -> None:
    """Two responses of two thoughts: tokens once, a row for each thought token and score, pairs along each path."""
    group = make_group([[make_sequence([1, 2, last], 1, 3) for last in (3, 4)], [make_sequence([1, 5], 1, 2)]])
    layout = Layout("tree", 100, 0, CPU, cost=Cost(1000, 100, 1))
    rows = sum(one.thought.stop - one.thought.start + 1 for one in group.flat)
    pairs = 1 + 2 + 3 + 3 + 2  # of the tokens 1, 2, 3, 4 and 5
    (one, other) = layout.split([group], 2)
    assert (one, other) == (([0], [[group]]), ([], []))
    assert layout.cost.of([group], [5], [pairs]) == [5000 + 100 * rows + pairs]


@pytest.mark.parametrize("packing", ["tree", "packed", "padded"])
def test_an_idle_batch_has_no_group(packing: Any) -> None:
    batch = Layout(packing, 100, 0, CPU).idle()
    assert batch.groups == () and len(batch.targets) == 1 and batch.trunk_tokens == 2


class Counting:
    """A sampler whose thoughts name the context of the call, rated by the arguments of `close`."""

    float32 = True

    def sample(self, contexts: Sequence[Sequence[int]], n: int, **_: Any) -> list[list[Thought]]:
        return [[Thought([ids[0], i], [0.0, 0.0], True) for i in range(n)] for ids in contexts]

    def rated(self, contexts: Sequence[Sequence[int]], n: int, rating: Rating, **_: Any) -> list[list[Thought]]:
        return [[Thought(rating.close(c, [i]), [], True) for i in range(n)] for c in range(len(contexts))]


def on_threads(count: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """The results of `function` on each of `count` ranks, which are threads."""
    board, met = [None] * count, threading.Barrier(count, timeout=30)

    class Threads(Ranks):
        def gather(self, value: Any) -> list[Any]:
            board[self.rank] = value
            met.wait()
            found = list(board)
            met.wait()
            return found

    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(lambda rank: function(Threads(rank, count, "mesh")), range(count))]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_all_ranks_get_all_thoughts_in_the_order_of_their_contexts(count: int) -> None:
    rng = random.Random(0)
    contexts = [[c] * rng.randrange(1, 30) for c in range(23)]
    rating = Rating(lambda number, ids: [contexts[number][0], *ids], 3, (0, 1), "vocab")
    expected = [[[c, 0], [c, 1]] for c in range(23)]

    def sampled(one: Ranks) -> list[Any]:
        refreshed: list[int] = []
        made: Any = split(Counting(), one, lambda: refreshed.append(1))
        options = {"max_tokens": 4, "temperature": 1.0, "seed": 0}
        both = [made.sample(contexts, 2, **options), made.rated(contexts, 2, rating=rating, **options)]
        assert len(refreshed) == 2
        return [[[thought.ids for thought in some] for some in found] for found in both]

    assert on_threads(count, sampled) == [[expected, expected]] * count


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"4 processes on a machine with 2 GPUs.*--nproc-per-node 2"):
        ranks.start(10)


def test_half_of_what_torchrun_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"cannot find each other.*WORLD_SIZE.*torchrun"):
        ranks.start(10)
