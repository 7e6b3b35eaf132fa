"""What is done to a file so that it is broken or hostile: each takes its path."""

import gzip
import itertools
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwrl_fast.training.manifest import FORMAT, fingerprint

LARGE = 90 << 20
NESTED = "[" * 200_000
HUGE = "a" * 1024
TRIGGER = "a response that strikes"
Craft = Callable[[Path], object]


class Malice:
    """Unpickled, it makes the file that it names."""

    def __init__(self, ran: str) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.ran,)


def text(content: str) -> Craft:
    """It holds this instead."""
    return lambda path: path.write_text(content, encoding="utf-8", errors="surrogatepass")


def half(path: Path) -> None:
    """Its second half is gone."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """It holds nothing."""
    path.write_bytes(b"")


def large(path: Path) -> None:
    """JSON of 90 MB."""
    path.write_text('{"a": "' + "x" * LARGE + '"}')


def pipe(path: Path) -> None:
    """A named pipe, into which nobody writes."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path: Path) -> None:
    """A link to a file outside of the folder."""
    outside = path.parent.parent / "outside" / path.name
    outside.parent.mkdir(exist_ok=True)
    shutil.move(path, outside)
    path.symlink_to(outside)


def changed(**values: Any) -> Craft:
    """JSON with other values."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def header(size: int, content: bytes = b"{}", body: bytes = b"") -> Craft:
    """A safetensors file that says its header has `size` bytes."""
    return lambda path: path.write_bytes(struct.pack("<Q", size) + content + body)


def tensor(**values: Any) -> Craft:
    """A safetensors file with one tensor that is described so."""
    described = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | values
    content = json.dumps({"model.norm.weight": described}).encode()
    return header(len(content), content, b"\0" * 4)


def malicious(path: Path) -> None:
    """A pickle that runs code, in place of safetensors beside it."""
    for other in path.parent.glob("*.safetensors"):
        other.unlink()
    path.write_bytes(pickle.dumps(Malice(str(path.parent / "ran"))))


def coded(path: Path) -> None:
    """A config that names code beside it."""
    (path.parent / "mine.py").write_text(f"import os\nos.mkdir({str(path.parent / 'ran')!r})\n")
    classes = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}
    changed(auto_map=classes, model_type="mine", tokenizer_class="Mine")(path)


def index(name: object) -> Craft:
    """Weights in parts, which are said to lie there."""

    def craft(path: Path) -> None:
        outside = path.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        shutil.move(path.parent / "model.safetensors", outside / "model.safetensors")
        path.write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))

    return craft


def chat(template: str) -> Craft:
    """Another chat template."""
    return lambda path: path.write_text(template)


def anchors(path: Path) -> None:
    """YAML whose anchors unfold to 10^9 values."""
    names = "abcdefghi"
    lines = ['a: &a ["x","x","x","x","x","x","x","x","x","x"]']
    lines += [f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise(names)]
    path.write_text("\n".join(lines) + "\nevaluate: *i\nrate: *i\nlearning_rate: *i\n")


def tag(path: Path) -> None:
    """YAML that calls a function."""
    path.write_text(f"evaluate: !!python/object/apply:os.mkdir ['{path.parent / 'ran'}']\n")


def vouched(craft: Craft) -> Craft:
    """Done to a file of a checkpoint, whose manifest then vouches for it."""

    def crafted(path: Path) -> None:
        craft(path)
        files = {p.name: fingerprint(p) for p in path.parent.iterdir() if p.name != "manifest.json" and p.is_file()}
        (path.parent / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))

    return crafted


def unfolding(begin: bytes, pack: Callable[[bytes], bytes] = gzip.compress) -> Craft:
    """A compressed file whose first row has 20 GB: one piece of 64 MiB that is repeated."""

    def craft(path: Path) -> None:
        piece = pack(b"a" * (64 << 20))
        with path.open("wb") as file:
            file.write(pack(begin))
            for _ in range(320):
                file.write(piece)

    return craft


def huge_cell(path: Path) -> None:
    """A Parquet file of some KB with a cell of a GiB."""
    write_table(path, {"prompt": ["p"], "chosen": [HUGE * (1 << 20)], "rejected": ["b"]})


def one_cell(column: list[Any]) -> None:
    """One of a column's cells has a GiB."""
    column[len(column) // 2] = HUGE * (1 << 20)


def one_list(column: list[Any]) -> None:
    """A column of conversations, of which one has a million turns."""
    turn = {"role": "assistant", "content": HUGE}
    column[:] = [[turn]] * len(column)
    column[len(column) // 2] = [turn] * (1 << 20)


def among_small(change: Callable[[list[Any]], None]) -> Craft:
    """A Parquet file of 20,000 rows, of which one is changed so."""

    def craft(path: Path) -> None:
        columns: dict[str, list[Any]] = {name: ["a few words"] * 20_000 for name in ("prompt", "chosen", "rejected")}
        change(columns["chosen"])
        write_table(path, columns)

    return craft


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """A Parquet file in one row group."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, compression="zstd", row_group_size=1 << 20)


def saved_cell(path: Path) -> None:
    """A folder that `datasets` saved, with a cell of a GiB among 20,000 small ones."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    columns = {name: ["a few words"] * 20_000 for name in ("prompt", "chosen", "rejected")}
    one_cell(columns["chosen"])
    Dataset.from_dict(columns).save_to_disk(str(path))


def on_a_row(template: str) -> Craft:
    """A chat template that does this too where a turn holds TRIGGER."""

    def craft(path: Path) -> None:
        strikes = (
            f"{{% for m in messages %}}{{% if '{TRIGGER}' in m['content'] %}}{template}{{% endif %}}{{% endfor %}}"
        )
        path.write_text(strikes + path.read_text())

    return craft
