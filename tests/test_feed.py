"""Feeds: a seeded order that covers every epoch, shares equal to the weights, lazy reading, and exact resumption."""

import gzip
import itertools
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dwrl_fast.compute import step_seed
from dwrl_fast.data import START, Position, Preference, Reader, Row, open_rows, read_preferences
from dwrl_fast.errors import CheckpointError, ConfigError, DataError
from dwrl_fast.feed import Feed, Shuffled, Source, Streamed
from dwrl_fast.log import warn_once


def usable(row: Preference) -> tuple[str, Counter[str]]:
    return "", Counter()


def preferences(count: int, name: str = "rows") -> list[Preference]:
    prompt = ({"role": "user", "content": "?"},)
    return [Preference(prompt, (str(i), "no"), source=f"{name}:{i + 1}") for i in range(count)]  # type: ignore[arg-type]


def one(source: Source, **changes: Any) -> Feed:
    return Feed([source], [1.0], **{"batch_size": 4, "epochs": 2, "max_steps": -1, **changes})


class Generated:
    """A RowSource of `count` rows, which are created on demand; `read` counts them."""

    def __init__(self, count: int) -> None:
        self.name, self.count, self.read = "generated", count, 0

    def rows(self, start: Position = START) -> Iterator[Row]:
        for i in range(start.line, self.count):
            self.read += 1
            yield Row(i + 1, {"prompt": "?", "chosen": str(i), "rejected": "no"}, Position(i + 1))


def streamed(source: Any, buffer: int, seed: int = 0, check: Any = usable, **options: Any) -> Streamed:
    reader = Reader(source, consecutive=True, **options)
    return Streamed(reader, check, buffer_size=buffer, seed=seed)


def numbers(source: Source, count: int) -> list[int]:
    return [int(source.draw().responses[0]) for _ in range(count)]


def test_in_memory_an_epoch_is_the_permutation_of_its_seed() -> None:
    feed = one(Shuffled("rows", preferences(10), 0))
    batches = [feed.next() for _ in range(feed.steps)]
    found = [int(row.responses[0]) for batch in batches for row in batch]
    drawn = [np.random.default_rng(step_seed(0, "order", epoch)).permutation(10).tolist() for epoch in range(2)]
    assert found == drawn[0] + drawn[1] and [len(batch) for batch in batches] == [4] * 5
    feed = one(Shuffled("rows", preferences(10), 1), epochs=1)
    assert [len(feed.next()) for _ in range(feed.steps)] == [4, 4, 2], "the last batch of a run may be smaller"
    assert one(Shuffled("rows", preferences(10), 0), max_steps=7).steps == 7
    large = one(Shuffled("rows", preferences(300), 0), batch_size=256, epochs=1)
    assert large.minibatches(32) == 8 + 2, "a last, partial rollout batch ends the schedule"


def test_a_batch_of_more_rows_than_there_are_is_said(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    one(Shuffled("rows", preferences(3), 0))
    assert "takes 4 rows of rows, which has 3: a batch then holds some rows twice" in caplog.text


def test_the_first_batch_of_ten_million_rows_reads_the_buffer_only() -> None:
    source = Generated(10_000_000)
    feed = one(streamed(source, 10_000), batch_size=256, max_steps=100)
    assert source.read == 0
    feed.next()
    assert source.read == 10_000 + 256
    feed.next()
    assert source.read == 10_000 + 2 * 256


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(8000):
            file.write(json.dumps({"prompt": "?" * 300, "chosen": str(i), "rejected": "no"}) + "\n")
    source = streamed(open_rows(path), 100)
    source.draw()
    tracemalloc.start()
    seen = numbers(source, 7999)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(seen)) == 7999
    assert peak < path.stat().st_size / 4, "7,999 small integers, and a buffer"


def test_a_stream_is_shuffled_by_its_seed_and_covers_each_epoch() -> None:
    def run(buffer: int, seed: int) -> list[int]:
        return numbers(streamed(Generated(50), buffer, seed), 100)

    found = run(10, 0)
    assert found == run(10, 0) != run(10, 1)
    assert sorted(found[:50]) == sorted(found[50:]) == list(range(50)) and found[:50] != found[50:]
    assert all(row < place + 10 for place, row in enumerate(found[:50])), "no row comes before it is in the buffer"
    assert run(1, 0) == [*range(50), *range(50)], "with a buffer of one the file's own order"
    whole = run(1000, 0)
    assert sorted(whole[:50]) == list(range(50)) and min(whole[:10]) < 25 < max(whole[:10])
    late = [run(10, seed)[:50].index(0) for seed in range(300)]
    assert 6 < np.mean(late) < 13, "a row waits as many draws as there are rows in the buffer, on average"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=7), st.integers(1, 400))
def test_every_source_is_within_one_row_of_its_share_at_any_time(weights: list[float], rows: int) -> None:
    sources = [Shuffled(f"s{i}", preferences(5, f"s{i}"), 0) for i in range(len(weights))]
    feed = Feed(sources, weights, batch_size=1, epochs=1, max_steps=rows)
    shares = np.array(weights) / sum(weights)
    furthest = 0.0
    for t in range(1, rows + 1):
        feed.next()
        furthest = max(furthest, np.abs(shares * t - [source.drawn for source in sources]).max())
    assert furthest <= 1 - 1 / (2 * len(weights) - 2) + 1e-9, "Tijdeman's bound"
    assert feed.drawn == rows


def test_a_mixture_of_seven_to_three(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    a, b = (Shuffled(f"{name}.jsonl", preferences(size, f"{name}.jsonl"), 0) for name, size in (("a", 60), ("b", 40)))
    feed = Feed([a, b], [7, 3], batch_size=10, epochs=2, max_steps=-1)
    batches = [[row.source[0] for row in feed.next()] for _ in range(feed.steps)]
    assert feed.steps == 20, "an epoch of a mixture is as many rows as its files have together"
    assert all(Counter(batch) == {"a": 7, "b": 3} for batch in batches)
    assert feed.result() == {
        "rows": 100,
        "sources": {"a": {"rows": 60, "drawn": 140}, "b": {"rows": 40, "drawn": 60}},
    }
    assert not caplog.text


def test_sources_of_a_mixture_have_orders_of_their_own() -> None:
    first, second = (Shuffled("s", preferences(20), 0, stream) for stream in ("order", "order 1"))
    assert numbers(first, 20) != numbers(second, 20)


# Resuming


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of which every seventh has an empty response and every fifth is dropped when it is drawn."""
    return [
        {"prompt": "?", "chosen": f"{i}" if i % 7 else "", "rejected": "long" if i % 5 == 0 else "no"}
        for i in range(count)
    ]


def rankings(count: int) -> list[dict[str, Any]]:
    """Rankings of three pairs per row, or of two pairs and a tie, which is dropped."""
    return [
        {"prompt": "?", "responses": [f"{i}", f"{i} b", f"{i} c"], "ranks": [1, 2, 2 + i % 2]} for i in range(count)
    ]


def singles(count: int) -> list[dict[str, Any]]:
    """Prompts with one, two or three completions; one completion is unusable."""
    rows = [
        {"prompt": f"{i}", "completion": f"{i}-{k}", "score": float(k)} for i in range(count // 2) for k in range(i % 4)
    ]
    rows[5]["completion"] = ""
    return rows


def no_long(row: Preference) -> tuple[str, Counter[str]]:
    return ("too long" if "long" in row.responses else ""), Counter({"conversations trimmed": 1})


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("make", [pairs, rankings, singles])
def test_a_stream_goes_on_to_the_row_from_any_point(
    tmp_path: Path, kind: str, make: Callable[[int], list[dict[str, Any]]]
) -> None:
    """In the middle of an epoch, within a row of several groups, with a full buffer, while the buffer drains, and
    across the end of an epoch.
    """
    path = written(tmp_path, kind, make(30))

    def source() -> Streamed:
        return streamed(open_rows(path), 6, check=no_long)

    whole = source()
    states, rows = [json.loads(json.dumps(whole.state()))], []
    while whole.epoch < 2:
        rows.append(whole.draw())
        states.append(json.loads(json.dumps(whole.state())))
    assert len(rows) > 20
    for point in range(0, len(rows), 1 if kind == "jsonl" else 5):
        resumed = source()
        resumed.restore(states[point])
        assert [resumed.draw() for _ in rows[point:]] == rows[point:]
        assert resumed.state() == states[-1] and resumed.summary == whole.summary


def test_what_a_stream_leaves_out_is_counted_once_with_its_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pairs(30)
    path = written(tmp_path, "parquet", rows)
    source = streamed(open_rows(path), 4, check=no_long)
    kept = [i for i in range(30) if i % 7 and i % 5]
    with caplog.at_level("INFO", logger="dwrl_fast"):
        assert sorted(numbers(source, len(kept))) == kept == sorted(numbers(source, len(kept)))
    empty, long = (
        [i + 1 for i in range(30) if wanted(i)] for wanted in (lambda i: not i % 7, lambda i: i % 7 and not i % 5)
    )
    said = source.summary
    assert f"{len(kept)} groups used" in said and "read to the end" in said and source.rows == len(kept)
    assert f"{len(empty)} x empty response (line {', '.join(map(str, empty[:3]))}, ...)" in said
    assert f"{len(long)} x too long (line " in said and f"{25} x conversations trimmed" in said
    assert set(source.account.lines["too long"]) < set(long)
    assert caplog.text.count("read to the end") == 1, "said when the first pass ends, and not again"


def test_the_buffer_is_checked_against_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", pairs(40))
    source = streamed(open_rows(path), 6)
    numbers(source, 3)
    state, identity = source.state(), source.identity()
    assert streamed(open_rows(path), 6).identity() == identity
    changed = path.read_text().replace('"no"', '"on"')
    path.write_text(changed)
    again = streamed(open_rows(path), 6)
    with pytest.raises(CheckpointError, match="has changed since the checkpoint was written"):
        again.restore(state)
    assert again.identity() != identity


def test_a_stream_is_identified_by_what_chooses_its_rows_and_labels(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", pairs(4))
    plain = streamed(open_rows(path), 6).identity()
    options: list[dict[str, Any]] = [{"aspect": "honesty"}, {"ties": "keep"}, {"rankings": "plackett_luce"}]
    assert all(streamed(open_rows(path), 6, **each).identity() != plain for each in options)
    assert streamed(open_rows(path), 6, ties="drop", rankings="pairs").identity() == plain


def test_state_holds_places_and_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", [row | {"prompt": "secret" * 50} for row in pairs(60)])
    source = streamed(open_rows(path), 20)
    source.draw()
    assert "secret" not in json.dumps(source.state()) and len(json.dumps(source.state())) < 1000


# Unusable files


def test_a_stream_of_which_nothing_can_be_used_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", pairs(20))
    source = streamed(open_rows(path), 5, check=lambda row: ("too long", Counter()))
    with pytest.raises(DataError, match=r"no usable row in the whole of .*rows\.jsonl: 0 groups used; 17 x too long"):
        source.draw()
    path.write_text('{"prompt": "?", "chosen": "", "rejected": "no"}\n')
    with pytest.raises(DataError, match=r"1 x empty response \(line 1\)"):
        streamed(open_rows(path), 5).draw()
    path.write_text("")
    with pytest.raises(DataError, match="no usable row"):
        streamed(open_rows(path), 5).draw()
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read \(No such file"):
        streamed(open_rows(tmp_path / "nowhere.jsonl"), 5).draw()
    with pytest.raises(ConfigError, match="--max_steps"):
        one(streamed(open_rows(path), 5))


@pytest.mark.parametrize("make", [pairs, singles])
def test_a_row_not_of_the_form_ends_a_run_before_it_has_begun_and_is_counted_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[int], list[dict[str, Any]]]
) -> None:
    rows = make(40)
    path = written(tmp_path, "jsonl", [*rows[:3], {"other": 1}, *rows[3:]])
    with pytest.raises(DataError, match=r"rows\.jsonl:7"):
        streamed(open_rows(path), 20).draw()
    path = written(tmp_path, "jsonl", [*rows[:16], {"other": 1}, *rows[16:], {"other": 2}])

    def source() -> Streamed:
        return streamed(open_rows(path), 4)

    whole, clean = source(), streamed(open_rows(written(tmp_path, "parquet", rows)), 4)
    states, found = [], []
    while whole.epoch < 2:
        states.append(whole.state())
        found.append(whole.draw())
    while clean.epoch < 2:
        clean.draw()
    assert len(found) == clean.drawn, "all but the two rows are there"
    assert whole.account.counts["not in the expected form"] == 2 and whole.account.lines[
        "not in the expected form"
    ] == [
        33,
        2 * len(rows) + 3,
    ]
    assert (
        caplog.text.count("A malformed row is left out, and so is every other") == 1 and "rows.jsonl:33" in caplog.text
    )
    for point in range(len(found)):
        resumed = source()
        resumed.restore(json.loads(json.dumps(states[point])))
        assert [resumed.draw() for _ in found[point:]] == found[point:]


def test_feeds_of_memory_and_stream_hold_the_same_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", rankings(20))
    rows = read_preferences(path).rows
    memory, stream = Shuffled(str(path), rows, 0), streamed(open_rows(path), 8)
    sides = [[source.draw() for _ in rows] for source in (memory, stream)]
    assert sorted(map(repr, sides[0])) == sorted(map(repr, sides[1])) and sides[0] != sides[1]


def test_identity_is_of_content_and_of_weights() -> None:
    rows = preferences(6)
    a, b = Shuffled("a", rows, 0), Shuffled("elsewhere/a", rows, 1)
    assert a.identity() == b.identity() != Shuffled("a", rows[::-1], 0).identity()

    def mixed(weights: list[float]) -> Any:
        return Feed([a, b], weights, batch_size=2, epochs=1, max_steps=1).identity()

    assert mixed([1, 2]) == mixed([2, 4]) != mixed([1, 3])
    tied = [Preference(row.prompt, row.responses, ranks=(1, 1)) for row in rows]
    assert Shuffled("a", tied, 0).identity() != a.identity()


def test_a_mixture_resumes_with_both_its_sources() -> None:
    def make() -> Feed:
        sources: list[Source] = [Shuffled("m", preferences(7, "m"), 0), streamed(Generated(11), 4)]
        return Feed(sources, [0.7, 0.3], batch_size=3, epochs=1, max_steps=20)

    whole = make()
    states, batches = [], []
    for _ in range(whole.steps):
        states.append(json.loads(json.dumps(whole.state())))
        batches.append(whole.next())
    for step in range(whole.steps):
        resumed = make()
        resumed.restore(states[step])
        assert [resumed.next() for _ in batches[step:]] == batches[step:]
    assert len(list(itertools.chain(*batches))) == 60
