"""Writes the usable rows of a file to one file, and the other rows to a quarantine file, each with line and reason."""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from dwrl_fast.data.check import FileReport
from dwrl_fast.data.jsonl import BOM, JsonLines
from dwrl_fast.data.locations import open_rows
from dwrl_fast.data.row_source import RowSource
from dwrl_fast.data.table_text import parsed
from dwrl_fast.errors import ConfigError, DataError

# Cells of tables with these names are parsed.
NOT_TEXT = ("margin", "magnitude", "score", "tie", "responses", "ranks", "scores", "completions")


def quarantine_of(out: Path) -> Path:
    """OUT.quarantine.jsonl, for OUT.jsonl."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".quarantine.jsonl")


def refuse_existing(out: Path) -> None:
    """Raises ConfigError if one of the two files cannot be created. Called before anything is read."""
    for path in (out, quarantine_of(out)):
        if path.exists():
            raise ConfigError(f"--fix {out}: {path} exists already, and nothing is overwritten; name another file")
    if not out.parent.is_dir():
        raise ConfigError(f"--fix {out}: its folder does not exist; make it first")


def fix(path: str | Path, report: FileReport, out: Path) -> tuple[int, int]:
    """Write the rows that `report` counts as used to `out`, unchanged, and the others to OUT.quarantine.jsonl. Returns
    the number of rows in each file.

    A row of a JSONL file keeps its bytes, except for a byte-order mark and the line end; a row of another source is
    written as JSON. In the quarantine file the text of a row is `raw`, or `raw_base64` if it is not UTF-8. No file is
    left behind if something fails. Raises DataError if the file has changed since the report, or cannot be read.
    """
    refuse_existing(out)
    beside = quarantine_of(out)
    reasons = {line: reason for reason, lines in report.dropped.items() for line in lines}
    rows = 0
    try:
        with open(out, "xb") as good, open(beside, "xb") as quarantine:
            for line, raw in _rows(open_rows(path)):
                rows += 1
                if line in reasons:
                    quarantine.write(_quarantined(line, reasons[line], raw))
                else:
                    good.write(raw + b"\n")
        if rows != report.rows:
            raise DataError(f"{path}: {report.rows} rows when it was checked and {rows} now; check it again")
    except BaseException:
        out.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
        raise
    return rows - len(reasons), len(reasons)


def _rows(source: RowSource) -> Iterator[tuple[int, bytes]]:
    if isinstance(source, JsonLines):
        for raw, after in source.lines():
            yield after.line, raw.removeprefix(BOM).strip(b" \t\r\n")
    else:
        nulls = getattr(source, "table", False)  # in a table, nulls are missing values
        for row in source.rows():
            if isinstance(row.values, Mapping):
                kept = {k: v for k, v in row.values.items() if v is not None or not nulls}
                values = {name: parsed(value) if name in NOT_TEXT else value for name, value in kept.items()}
            else:
                values = {"unreadable": str(row.values)}
            yield row.line, json.dumps(values, default=str).encode()


def _quarantined(line: int, reason: str, raw: bytes) -> bytes:
    try:
        text = {"raw": raw.decode()}
    except UnicodeDecodeError:
        text = {"raw_base64": base64.b64encode(raw).decode()}
    return json.dumps({"line": line, "reason": reason} | text).encode() + b"\n"
