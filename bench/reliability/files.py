"""Tests that every broken or hostile file leads to an error that names the file, and to nothing else.

Each case damages one file of a kind that a loader reads, in an otherwise intact folder, and loads it in a separate
process. The process must end with a user error that names the file, run no code, read nothing outside the folder, and
need less than 20 seconds and less than one additional GiB.
"""

import bz2
import gzip
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.reliability.drill import Drill
from bench.reliability.lives import life
from dwrl_fast.config import parse_train
from dwrl_fast.data import read_preferences
from dwrl_fast.embedded import Embedded
from dwrl_fast.errors import UserError
from dwrl_fast.log import escaped
from dwrl_fast.models.model import load_generative
from dwrl_fast.models.pretrained import CARD, load_tokenizer
from dwrl_fast.scoring.loading import load_trained
from dwrl_fast.templates import load_template
from dwrl_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dwrl_fast.training.manifest import FORMAT, fingerprint

SECONDS, MIB = 20.0, 1024
LARGE = 90 << 20
NESTED = "[" * 200_000
Craft = Callable[[Path], object]


class Case(NamedTuple):
    """What is loaded, and the damage to the named file."""

    loader: str
    what: str
    file: str
    craft: Craft


class Malice:
    """An object that creates the named file when it is unpickled."""

    def __init__(self, ran: str) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.ran,)


# What is done to a file


def text(content: str) -> Craft:
    """Replace the content."""
    return lambda path: path.write_text(content, encoding="utf-8", errors="surrogatepass")


def half(path: Path) -> None:
    """Remove the second half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Make it empty."""
    path.write_bytes(b"")


def large(path: Path) -> None:
    """JSON of 90 MB."""
    path.write_text('{"a": "' + "x" * LARGE + '"}')


def pipe(path: Path) -> None:
    """A named pipe without a writer."""
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
    """A safetensors file that claims a header of `size` bytes."""
    return lambda path: path.write_bytes(struct.pack("<Q", size) + content + body)


def tensor(**values: Any) -> Craft:
    """A safetensors file with one tensor with this description."""
    described = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | values
    content = json.dumps({"model.norm.weight": described}).encode()
    return header(len(content), content, b"\0" * 4)


def malicious(path: Path) -> None:
    """A pickle that runs code, instead of the safetensors file."""
    for other in path.parent.glob("*.safetensors"):
        other.unlink()
    path.write_bytes(pickle.dumps(Malice(str(path.parent / "ran"))))


def coded(path: Path) -> None:
    """A config that names code in the same folder."""
    (path.parent / "mine.py").write_text(f"import os\nos.mkdir({str(path.parent / 'ran')!r})\n")
    classes = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}
    changed(auto_map=classes, model_type="mine", tokenizer_class="Mine")(path)


def index(name: str) -> Craft:
    """An index of weights that points to `name`."""

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
    """YAML whose anchors expand to 10^9 values."""
    names = "abcdefghi"
    lines = ['a: &a ["x","x","x","x","x","x","x","x","x","x"]']
    lines += [f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise(names)]
    path.write_text("\n".join(lines) + "\nevaluate: *i\nrate: *i\nlearning_rate: *i\n")


def tag(path: Path) -> None:
    """YAML that calls a function."""
    path.write_text(f"evaluate: !!python/object/apply:os.mkdir ['{path.parent / 'ran'}']\n")


def vouched(craft: Craft) -> Craft:
    """Apply `craft` to a file of a checkpoint, and update the manifest so that it matches."""

    def crafted(path: Path) -> None:
        craft(path)
        files = {p.name: fingerprint(p) for p in path.parent.iterdir() if p.name != "manifest.json" and p.is_file()}
        (path.parent / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))

    return crafted


def unfolding(begin: bytes, pack: Callable[[bytes], bytes] = gzip.compress) -> Craft:
    """A compressed file whose first row has 20 GB: a repeated piece of 64 MiB."""

    def craft(path: Path) -> None:
        piece = pack(b"a" * (64 << 20))
        with path.open("wb") as file:
            file.write(pack(begin))
            for _ in range(320):
                file.write(piece)

    return craft


def cells(path: Path) -> None:
    """A Parquet file of some KB with a cell of a GiB."""
    import pyarrow
    from pyarrow import parquet

    row = {"prompt": ["p"], "chosen": ["a" * (1 << 30)], "rejected": ["b"]}
    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in row])
    parquet.write_table(pyarrow.table(row, schema=schema), path, compression="zstd")


ROW = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
SHARD = "shard-00001-model-00001-of-00001.safetensors"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"


def cases() -> Iterator[Case]:
    """All cases."""
    weights: dict[str, Craft] = {
        "half": half,
        "empty": empty,
        "7 bytes": text("1234567"),
        "a header of 2^63 bytes": header(2**63),
        "a header of 90 MB": header(LARGE, b" " * LARGE),
        "a header that is no JSON": header(4, b"\xff{}}"),
        "a nested header": header(200_000, NESTED.encode()),
        "offsets past the end": tensor(data_offsets=[0, 2**40]),
        "offsets that go back": tensor(data_offsets=[4, 0]),
        "no such dtype": tensor(dtype="Q9"),
        "a shape of 2^60": tensor(shape=[2**30, 2**30]),
        "a pipe": pipe,
        "a link out of the folder": link,
    }
    for what, craft in weights.items():
        yield Case("model", f"weights: {what}", WEIGHTS, craft)
    configs: dict[str, Craft] = {
        "empty": empty,
        "a list": text("[]"),
        "nested": text(NESTED),
        "90 MB": large,
        "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
        "code of its own": coded,
        "no heads": changed(num_attention_heads=0),
        "a billion layers": changed(num_hidden_layers=10**9),
        "a vocabulary of 10^12": changed(vocab_size=10**12),
        "layers in words": changed(num_hidden_layers="two"),
        "a pipe": pipe,
    }
    for what, craft in configs.items():
        yield Case("model", f"config: {what}", CONFIG, craft)
    for name in ("../outside/model.safetensors", "/etc/hostname", "..\\outside", 7):
        yield Case("model", f"index that names {name}", "model.safetensors.index.json", index(name))  # type: ignore[arg-type]
    yield Case(
        "model", "index without a map", "model.safetensors.index.json", lambda p: (index("x")(p), p.write_text("[]"))
    )
    yield Case("model", "a pickle as weights", "pytorch_model.bin", malicious)
    tokenizers: dict[str, Craft] = {
        "half": half,
        "empty": empty,
        "nested": text(NESTED),
        "a list": text("[]"),
        "no model": changed(model=None),
        "a pipe": pipe,
        "a link out of the folder": link,
    }
    for what, craft in tokenizers.items():
        yield Case("tokenizer", f"tokenizer: {what}", TOKENIZER, craft)
    yield Case("tokenizer", "its config is a list", "tokenizer_config.json", text("[]"))
    yield Case("tokenizer", "its config is nested", "tokenizer_config.json", text(NESTED))
    chats = {"loops": LOOP, "a string of 10^10": "{{ 'a' * 10**10 }}", "a string that doubles": DOUBLE}
    chats |= {"an error in it": "{% if %}", "90 MB": "x" * LARGE, "attributes of Python": "{{ ''.__class__.__mro__ }}"}
    for what, template in chats.items():
        yield Case("dialog", f"chat template: {what}", "chat_template.jinja", chat(template))
    cards: dict[str, Craft] = {"nested": text(NESTED), "a list": text("[1]"), "90 MB": large, "a pipe": pipe}
    for what, craft in cards.items():
        yield Case("dialog", f"card: {what}", CARD, craft)
    adapters: dict[str, Craft] = {
        "no JSON": text("{"),
        "a list": text("[]"),
        "nested": text(NESTED),
        "a base in numbers": changed(base_model_name_or_path=7),
        "no such kind": changed(peft_type="MAGIC"),
        "a rank below 0": changed(r=-1),
    }
    for what, craft in adapters.items():
        yield Case("adapter", f"adapter: {what}", "adapter_config.json", craft)
    for what, craft in {"half": half, "empty": empty, "a header of 90 MB": weights["a header of 90 MB"]}.items():
        yield Case("adapter", f"adapter's weights: {what}", "adapter_model.safetensors", craft)
    files: dict[str, Craft] = {
        "anchors": anchors,
        "nested": text("a: " + NESTED),
        "a call": tag,
        "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
        "90 MB": text("a: " + "x" * LARGE),
        "a pipe": pipe,
        "a date that is none": text("evaluate: 2024-99-99\n"),
        "a terminal's controls": text('"\\e]0;owned\\a\\u202e": 1\n'),
    }
    for loader in ("template", "options"):
        for what, craft in files.items():
            yield Case(loader, f"{loader}: {what}", "given.yaml", craft)
    checkpoints: dict[str, tuple[str, Craft]] = {
        "a nested manifest": ("manifest.json", text(NESTED)),
        "a manifest of 90 MB": ("manifest.json", large),
        "a manifest that names ../x": (
            "manifest.json",
            text(json.dumps({"format": FORMAT, "files": {"../x": {}, "state.json": {}}})),
        ),
        "a state of 90 MB of lists": ("state.json", vouched(text("[" + "[]," * (LARGE // 3) + "[]]"))),
        "a header of 90 MB": (SHARD, vouched(weights["a header of 90 MB"])),
        "a pipe": (SHARD, pipe),
        "a link out of it": (SHARD, vouched(link)),
    }
    for what, (file, craft) in checkpoints.items():
        yield Case("checkpoint", f"checkpoint: {what}", file, craft)
    data: dict[str, tuple[str, Craft]] = {
        "a line of 20 GB": ("rows.jsonl.gz", unfolding(b'{"prompt": "')),
        "an element of 20 GB": ("rows.json.gz", unfolding(b'[{"prompt": "')),
        "a cell of 20 GB": ("rows.csv.gz", unfolding(b'prompt,chosen,rejected\n"')),
        "a line of 20 GB in bzip2": ("rows.jsonl.bz2", unfolding(b'{"prompt": "', bz2.compress)),
        "a cell of a GiB": ("rows.parquet", cells),
        "half a Parquet file": ("rows.parquet", lambda path: path.write_bytes(b"PAR1" + b"\0" * 99)),
        "a Parquet footer past its start": ("rows.parquet", lambda path: path.write_bytes(b"PAR1\xff\xff\xff\x7fPAR1")),
        "a nested row": ("rows.jsonl", text(NESTED + "\n")),
        "a row of nothing but nulls": ("rows.jsonl", lambda path: path.write_bytes(b"\0" * 1000)),
        "a number of a million digits": ("rows.jsonl", text('{"prompt": ' + "9" * 10**6 + "}\n")),
        "a row that is no object": ("rows.jsonl", text("7\n")),
        "half a gzip file": ("rows.jsonl.gz", lambda path: path.write_bytes(gzip.compress(ROW.encode() * 99)[:40])),
        "gzip in name and magic alone": ("rows.jsonl.gz", lambda path: path.write_bytes(b"\x1f\x8b" + b"\xff" * 99)),
        "no end of zeros": ("rows.jsonl", lambda path: path.symlink_to("/dev/zero")),
    }
    for what, (file, craft) in data.items():
        yield Case("data", f"data: {what}", file, craft)


# How each is loaded


def load(loader: str, folder: Path, file: str) -> object:
    """Load the folder, or the file in it, with `loader`."""
    if loader in ("model", "adapter"):
        return load_generative(str(folder), None, 0)
    if loader == "tokenizer":
        return load_tokenizer(str(folder))
    if loader == "dialog":
        return load_trained(folder)
    if loader == "template":
        return load_template(str(folder / file))
    if loader == "options":
        return parse_train(["--config", str(folder / file)])
    if loader == "checkpoint":
        return load_checkpoint(folder, {"a": torch.zeros(3)})
    return read_preferences(str(folder / file))


def prepared(loader: str, task: Embedded, work: Path) -> Path:
    """An intact folder that `loader` can load."""
    whole = work / "whole" / loader
    if loader == "checkpoint":
        return save_checkpoint(work, 1, {"a": torch.ones(3)}, {"step": 1})
    if loader in ("model", "tokenizer", "dialog"):
        return Path(shutil.copytree(task.model, whole))
    if loader == "adapter":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(load_generative(str(task.model), None, 0).lm, LoraConfig(target_modules=["q_proj"]))
        model.peft_config["default"].base_model_name_or_path = str(task.model)
        model.save_pretrained(whole)
        return whole
    whole.mkdir(parents=True)
    return whole


def attempt(case: Case, folder: Path) -> None:
    """Load. A UserError is printed and ends the process with status 2."""
    outside = str(folder.parent / "outside")

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith((outside, "/etc/hostname")):
            os.write(2, b"READ OUTSIDE\n")

    sys.addaudithook(opened)
    try:
        load(case.loader, folder, case.file)
    except UserError as error:
        print(f"error: {escaped(str(error))}")
        raise SystemExit(2) from None
    print("accepted")


def verdict(case: Case, folder: Path, log: Path) -> str:
    """What is wrong with the outcome; empty if nothing is."""
    _, _, idle = os.wait4(life(lambda: None, log), 0)  # the memory of an idle fork, as baseline
    process, started = life(partial(attempt, case, folder), log), time.monotonic()
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            break
        if time.monotonic() - started > SECONDS:
            os.kill(process, signal.SIGKILL)
            os.wait4(process, 0)
            return f"more than {SECONDS:.0f} s"
        time.sleep(0.01)
    said, code, grown = (
        log.read_text(errors="replace"),
        os.waitstatus_to_exitcode(status),
        (usage.ru_maxrss - idle.ru_maxrss) // 1024,
    )
    if (folder / "ran").exists() or (folder.parent / "ran").exists():
        return "code ran"
    if "READ OUTSIDE" in said:
        return "a file outside was read"
    if code != 2 or "Traceback" in said:
        return f"status {code}: {said[-300:]}"
    if grown > MIB:
        return f"{grown} MiB"
    if str(folder) not in said and case.file not in said:
        return f"the file is not named: {said[-300:]}"
    return "" if "\x1b" not in said else "it prints control characters"


def hostile(task: Embedded, folder: Path, only: str = "") -> Drill:
    """All cases, or those whose name contains `only`."""
    folder.mkdir(parents=True)
    wholes: dict[str, Path] = {}
    wrong, done = [], 0
    for number, case in enumerate(cases()):
        if only not in f"{case.loader} {case.what}":
            continue
        if case.loader not in wholes:
            wholes[case.loader] = prepared(case.loader, task, folder / f"for-{case.loader}")
        place = folder / str(number) / wholes[case.loader].name
        shutil.copytree(wholes[case.loader], place)
        case.craft(place / case.file)
        if found := verdict(case, place, folder / f"{number}.log"):
            wrong.append(f"{case.what}: {found}")
        done += 1
        shutil.rmtree(place.parent)
    found = f"{done - len(wrong)} of {done}" + "; ".join(["", *wrong])
    return Drill(
        "hostile and broken files", "60 or more: an error that names the file, within 20 s and 1 GiB", found, not wrong
    )
