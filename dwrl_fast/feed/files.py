"""The files of a stream: their identity, and a check that they have not changed."""

import hashlib
import os
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from dwrl_fast.data.locations import files_of
from dwrl_fast.errors import DataError

ENDS = 1 << 20  # bytes at each end of a file that identify its content


class Stamp(NamedTuple):
    """Metadata of a file from the file system; the file is not read."""

    size: int
    written: int  # nanoseconds
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp of a file as it is now. Raises OSError."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)

    def __str__(self) -> str:
        return f"{self.size:,} bytes, written {datetime.fromtimestamp(self.written / 1e9).isoformat(' ')}"


class StreamedFiles:
    """The current files of the source `name`: one file, or the files of a folder that `datasets` saved. A data set of
    the hub has none.

    identity: sizes and hashes of both ends of the files, as JSON; without files, the name.
    """

    def __init__(self, name: str):
        paths = _paths(name)
        self.stamps = {path: Stamp.of(path) for path in paths}  # taken first, so that a later change is noticed
        self.contents = {path: _content(path) for path in paths}
        found = list(self.contents.values())
        self.identity: dict[str, Any] = found[0] if len(found) == 1 else {"files": found} if found else {"name": name}

    def verify(self) -> None:
        """Raise DataError if one of them was written, truncated, replaced or removed since."""
        for path, was in self.stamps.items():
            try:
                now = Stamp.of(path)
                if now == was:
                    continue
                # Some network file systems change the inode number of a file. If only the number is new, compare the
                # content.
                same = now[:2] == was[:2] and _content(path) == self.contents[path]
            except OSError as error:
                raise _changed(path, was, f"unreadable ({error.strerror})") from None
            if not same:
                raise _changed(path, was, now)
            self.stamps[path] = now


def _changed(path: Path, was: Stamp, now: Stamp | str) -> DataError:
    return DataError(
        f"{path} was changed while it was streamed: it was {was}; it is {now}. A run that continued would mix both "
        "versions. Restore the file and give --resume_from_checkpoint latest, or start a new run in another "
        "--output_dir."
    )


def _paths(name: str) -> list[Path]:
    if several := files_of(name):
        return [Path(file) for file in several]
    folder = next((each for each in (name, name.rpartition(":")[0]) if each and os.path.isdir(each)), None)
    if folder is None:
        return [Path(name)] if os.path.isfile(name) else []
    # `datasets` stores results computed from the rows next to them, under these names.
    kept = (path for path in Path(folder).rglob("*") if not path.name.startswith(("cache-", "tmp")))
    return sorted(path for path in kept if path.is_file())


def _content(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(ENDS), digest_size=16)
        file.seek(max(0, size - ENDS), os.SEEK_SET)
        digest.update(file.read(ENDS))
    return {"bytes": size, "ends": digest.hexdigest()}
