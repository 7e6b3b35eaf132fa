"""A file that changes while it is streamed is detected at every pass and save, and while reading."""

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_config, tiny_folder, tiny_pairs

from dwrl_fast import train
from dwrl_fast.data import Preference, Reader, open_rows
from dwrl_fast.errors import CheckpointError, DataError
from dwrl_fast.feed import Streamed
from dwrl_fast.training.checkpoint import checkpoints
from dwrl_fast.training.trainer import Trainer

KINDS = ["jsonl", "jsonl.gz", "parquet"]


def usable(row: Preference) -> tuple[str, Counter[str]]:
    return "", Counter()


def streamed(path: Path | str, buffer: int = 4) -> Streamed:
    return Streamed(Reader(open_rows(path), consecutive=True), usable, buffer_size=buffer, seed=0)


def rows(count: int, word: str = "no") -> list[dict[str, Any]]:
    return [{"prompt": "?", "chosen": str(i), "rejected": f"{word} {i * 7919 % 1009}"} for i in range(count)]


def written(path: Path, content: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in content)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(content), path, row_group_size=8, compression="none")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text)
    return path


def rewritten(path: Path) -> None:
    """Overwrite the file in place, as some editors do."""
    written(path, rows(40, "on"))
    os.utime(path, (1, 1))  # the time differs even if the clock is coarse


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    """Rename another file over it. A process that has the old file open continues to read the old one."""
    other = written(path.with_name("other" + "".join(path.suffixes)), rows(41))
    os.replace(other, path)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def removed(path: Path) -> None:
    path.unlink()


def touched(path: Path) -> None:
    os.utime(path, (1, 1))


CHANGES = [rewritten, truncated, replaced, grown, removed, touched]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_at_the_next_save_and_the_next_pass(
    tmp_path: Path, kind: str, change: Callable[[Path], None]
) -> None:
    path = written(tmp_path / f"rows.{kind}", rows(40))
    # With 4, the file is read while rows are drawn. With 100, the whole file is in the buffer, so only a save or the
    # next pass can detect the change.
    for buffer in (4, 100):
        written(path, rows(40))
        source = streamed(path, buffer)
        for _ in range(10):
            source.draw()
        source.state()
        size = path.stat().st_size
        change(path)
        with pytest.raises(DataError, match=rf"rows\.{kind} was changed while it was streamed: it was {size:,} bytes"):
            source.state()
        with pytest.raises(DataError, match="was changed while it was streamed"):
            for _ in range(31):
                source.draw()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_changed_before_the_first_row_is_drawn(tmp_path: Path, kind: str) -> None:
    """A run loads its model between opening the file and drawing the first batch."""
    source = streamed(written(tmp_path / f"rows.{kind}", rows(40)))
    replaced(tmp_path / f"rows.{kind}")
    with pytest.raises(DataError, match="was changed while it was streamed"):
        source.draw()


def test_a_truncated_file_does_not_end_the_pass(tmp_path: Path) -> None:
    """The incomplete line at its end is not counted as a dropped row either."""
    path = written(tmp_path / "rows.jsonl", rows(4000))
    source = streamed(path)
    for _ in range(10):
        source.draw()
    os.truncate(path, 100_001)
    with pytest.raises(DataError, match=r"was changed while it was streamed.*it is 100,001 bytes"):
        for _ in range(4000):
            source.draw()
    assert not source.account.counts and not source.epoch


def test_the_same_size_and_the_same_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", rows(60_000))
    assert path.stat().st_size > 3 << 20
    source = streamed(path)
    source.draw()
    text = path.read_text()
    middle = text.index("no", len(text) // 2)
    path.write_text(text[:middle] + "on" + text[middle + 2 :])
    os.utime(path, (1, 1))  # both writes may be within one tick of the file system's clock
    with pytest.raises(DataError, match="was changed while it was streamed"):
        source.state()


def test_a_copy_in_its_place_is_the_same_file(tmp_path: Path) -> None:
    """Some network file systems change a file's inode number after a while."""
    path = written(tmp_path / "rows.jsonl", rows(40))
    source, whole = streamed(path), streamed(path)
    source.draw()
    shutil.copy2(path, tmp_path / "copy")
    before = path.stat().st_ino
    os.replace(tmp_path / "copy", path)
    assert path.stat().st_ino != before
    whole.draw()
    assert [source.draw() for _ in range(79)] == [whole.draw() for _ in range(79)]
    assert source.state() == whole.state()
    other = written(tmp_path / "other", rows(40, "on"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)
    with pytest.raises(DataError, match="was changed while it was streamed"):
        source.state()


def test_a_saved_data_set_is_told_by_its_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")
    for name, word in (("first", "no"), ("other", "on")):
        split = datasets.Dataset.from_list(rows(40, word))
        datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / name))
    source = streamed(f"{tmp_path}/first:train")
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    assert source.identity() == streamed(f"{tmp_path}/moved:train").identity()
    assert source.identity() != streamed(f"{tmp_path}/other:train").identity()
    source.draw()
    (tmp_path / "first" / "train" / "cache-1234.arrow").write_text("what datasets computed from it")
    source.state()
    (arrow,) = (tmp_path / "first" / "train").glob("data-*.arrow")
    os.replace(next((tmp_path / "other" / "train").glob("data-*.arrow")), arrow)
    with pytest.raises(DataError, match=r"first/train/data-.* was changed while it was streamed"):
        source.state()


# Through the trainer


def go(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    options = {"dataset_name": f"{folder}/pairs.jsonl", "streaming": True, "shuffle_buffer_size": 3}
    options |= {"max_steps": 5, "save_steps": 2, "method": "bt", "output_dir": str(folder / run)}
    return train.run(tiny_config(folder, **options | changes), Console(quiet=True))


@pytest.mark.parametrize("change", [rewritten, replaced, touched])
def test_no_checkpoint_is_written_and_the_run_goes_on_with_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    tiny_folder(tmp_path / "tiny")
    path = tiny_pairs(tmp_path / "pairs.jsonl")
    text, step = path.read_bytes(), Trainer.train_step
    go(tmp_path, "whole")

    def changed(self: Trainer, *args: Any) -> dict[str, Any]:
        values = step(self, *args)
        if self.step == 4:  # 16 rows are drawn from 12: the second pass has begun, and a checkpoint is due
            change(path)
        return values

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"pairs\.jsonl was changed while"):
        patch.setattr(Trainer, "train_step", changed)
        go(tmp_path, "run")
    assert [each.name for each in checkpoints(tmp_path / "run")] == ["checkpoint-000002"]
    assert not (tmp_path / "run" / "model").exists()
    if change is not touched:
        with pytest.raises(CheckpointError, match=r"the data set: its rows, .* is different"):
            go(tmp_path, "run", resume_from_checkpoint="latest")
    path.write_bytes(text)
    assert go(tmp_path, "run", resume_from_checkpoint="latest")["steps"] == 5
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(p, again[name]) for name, p in whole.items())


def test_a_file_in_memory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are in memory and are identified by their content. Later changes of the file do not affect the run."""
    tiny_folder(tmp_path / "tiny")
    path = tiny_pairs(tmp_path / "pairs.jsonl")
    step = Trainer.train_step

    def changed(self: Trainer, *args: Any) -> dict[str, Any]:
        truncated(path)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", changed)
    assert go(tmp_path, "run", streaming=False)["steps"] == 5
