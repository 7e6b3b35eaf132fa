"""Values of a Parquet or Arrow file that are too large, found among thousands of small ones before they are read."""

import itertools
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dwrl_fast.data import open_rows, tables
from dwrl_fast.errors import DataError

SMALL, COUNT = "a few words", 3000
TURN = {"role": "assistant", "content": SMALL * 8}
HOW = [
    {"compression": compression, "data_page_version": version, "use_dictionary": dictionary}
    for (compression, version), dictionary in itertools.product(
        [("none", "1.0"), ("snappy", "1.0"), ("zstd", "2.0"), ("gzip", "2.0")], [True, False]
    )
]


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of at most a hundredth of the actual ones. The pages of the tests are equally small."""
    monkeypatch.setattr(tables, "MOST", 1 << 17)
    monkeypatch.setattr(tables, "PAGES", 1 << 18)


def written(path: Path, chosen: list[Any], **options: Any) -> Path:
    columns = {"prompt": [SMALL] * len(chosen), "chosen": chosen, "rejected": [SMALL] * len(chosen)}
    options = {"data_page_size": 1 << 14, "write_batch_size": 64} | options
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def read(path: Path) -> list[Any]:
    return [row.values["chosen"] for row in open_rows(str(path)).rows() if isinstance(row.values, dict)]


def among(value: Any, small: Any) -> list[Any]:
    return [small] * (COUNT // 2) + [value] + [small] * (COUNT // 2)


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
def test_one_large_value_among_small_ones_is_found(tmp_path: Path, how: dict[str, Any]) -> None:
    """Values of about half a MiB: a cell, a list of many turns, and a list of lists. Small values alone are read."""
    cases = {
        "cell": ("x" * (1 << 19), SMALL),
        "list": ([TURN] * 6000, [TURN] * 3),
        "lists": ([[SMALL] * 100] * 500, [[SMALL] * 3] * 2),
    }
    for name, (large, small) in cases.items():
        with pytest.raises(DataError, match=rf"{name}.parquet: up to \d+ MiB in one value of the column 'chosen"):
            read(written(tmp_path / f"{name}.parquet", among(large, small), **how))
        fine = among(small, small)
        assert read(written(tmp_path / "small.parquet", fine, **how)) == fine


def test_long_lists_of_one_cell_are_found_however_little_their_pages_hold(tmp_path: Path) -> None:
    """Each cell of such a list is an index into the dictionary: a few KB on the disk, but several MiB when read."""
    path = written(tmp_path / "rows.parquet", among(["x" * 1000] * 5000, [SMALL]), use_dictionary=True)
    assert path.stat().st_size < 1 << 17
    with pytest.raises(DataError, match="in one value of the column 'chosen"):
        read(path)
    nulls = written(tmp_path / "nulls.parquet", among([None] * 100_000, [SMALL]), use_dictionary=True)
    with pytest.raises(DataError, match="in one value of the column 'chosen"):
        read(nulls)


def test_the_remedies_are_remedies(tmp_path: Path) -> None:
    """Pages are large if a writer checks their size only once per thousand cells."""
    column = [f"{place}" * 300 for place in range(1000, 4000)]
    large = written(tmp_path / "large.parquet", column, write_batch_size=1024, use_dictionary=False)
    with pytest.raises(DataError, match=r"write_table\(\.\.\., write_batch_size=16\)"):
        read(large)
    assert read(written(tmp_path / "small.parquet", column, write_batch_size=16, use_dictionary=False)) == column


def test_a_row_past_the_bound_of_rows_is_not_made_into_objects(tmp_path: Path) -> None:
    """In a page that is not too large for one value, and in an Arrow file, which has no pages."""
    chosen = among("x" * (1 << 17), SMALL)
    with pytest.raises(DataError, match=rf"cell.parquet:{COUNT // 2 + 1}: a row of more than"):
        read(written(tmp_path / "cell.parquet", chosen))
    columns = {"prompt": [SMALL] * len(chosen), "rejected": [SMALL] * len(chosen)}
    datasets.Dataset.from_dict({"chosen": chosen, **columns}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=rf"saved:{COUNT // 2 + 1}: a row of more than"):
        read(tmp_path / "saved")
    turns = among([TURN] * 2000, [TURN])
    datasets.Dataset.from_dict({"chosen": turns, **columns}).save_to_disk(str(tmp_path / "turns"))
    with pytest.raises(DataError, match=rf"turns:{COUNT // 2 + 1}: a row of more than"):
        read(tmp_path / "turns")


def test_a_page_that_is_none_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [SMALL] * 10)
    whole = bytearray(path.read_bytes())
    whole[4:40] = b"\xff" * 36
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read"):
        read(path)
