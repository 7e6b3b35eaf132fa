"""The broken and hostile files, by what they are given as."""

import bz2
import gzip
import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bench.reliability.crafts import (
    LARGE,
    NESTED,
    Craft,
    among_small,
    anchors,
    changed,
    chat,
    coded,
    empty,
    half,
    header,
    huge_cell,
    index,
    large,
    link,
    malicious,
    on_a_row,
    one_cell,
    one_list,
    pipe,
    saved_cell,
    tag,
    tensor,
    text,
    unfolding,
    vouched,
)
from dwrl_fast.models.pretrained import CARD
from dwrl_fast.training.manifest import FORMAT


class Case(NamedTuple):
    """What is loaded, and what is done to it first, by the file's name."""

    loader: str
    what: str
    file: str
    craft: Craft


ROW = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
WEIGHTS, TOKENIZER, CHAT = "model.safetensors", "tokenizer.json", "chat_template.jinja"
INDEX, SHARD = "model.safetensors.index.json", "shard-00001-model-00001-of-00001.safetensors"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
WIDE = "\U0001f600".encode()  # in Python's memory, a text with it takes four bytes for every character
LONG_HEADER = header(LARGE, b" " * LARGE)

MODELS: dict[str, tuple[str, Craft]] = {
    "weights: half": (WEIGHTS, half),
    "weights: empty": (WEIGHTS, empty),
    "weights: 7 bytes": (WEIGHTS, text("1234567")),
    "weights: a header of 2^63 bytes": (WEIGHTS, header(2**63)),
    "weights: a header of 90 MB": (WEIGHTS, LONG_HEADER),
    "weights: a header that is no JSON": (WEIGHTS, header(4, b"\xff{}}")),
    "weights: a nested header": (WEIGHTS, header(200_000, NESTED.encode())),
    "weights: offsets past the end": (WEIGHTS, tensor(data_offsets=[0, 2**40])),
    "weights: offsets that go back": (WEIGHTS, tensor(data_offsets=[4, 0])),
    "weights: no such dtype": (WEIGHTS, tensor(dtype="Q9")),
    "weights: a shape of 2^60": (WEIGHTS, tensor(shape=[2**30, 2**30])),
    "weights: a pipe": (WEIGHTS, pipe),
    "weights: a link out of the folder": (WEIGHTS, link),
    "config: empty": ("config.json", empty),
    "config: a list": ("config.json", text("[]")),
    "config: nested": ("config.json", text(NESTED)),
    "config: 90 MB": ("config.json", large),
    "config: not UTF-8": ("config.json", lambda path: path.write_bytes(b'{"a": "\xff"}')),
    "config: code of its own": ("config.json", coded),
    "config: no heads": ("config.json", changed(num_attention_heads=0)),
    "config: a billion layers": ("config.json", changed(num_hidden_layers=10**9)),
    "config: a vocabulary of 10^12": ("config.json", changed(vocab_size=10**12)),
    "config: layers in words": ("config.json", changed(num_hidden_layers="two")),
    "config: a pipe": ("config.json", pipe),
    "index that names ../outside/model.safetensors": (INDEX, index("../outside/model.safetensors")),
    "index that names /etc/hostname": (INDEX, index("/etc/hostname")),
    "index that names ..\\outside": (INDEX, index("..\\outside")),
    "index that names 7": (INDEX, index(7)),
    "index without a map": (INDEX, lambda path: (index("x")(path), path.write_text("[]"))),
    "a pickle as weights": ("pytorch_model.bin", malicious),
}
TOKENIZERS: dict[str, tuple[str, Craft]] = {
    "tokenizer: half": (TOKENIZER, half),
    "tokenizer: empty": (TOKENIZER, empty),
    "tokenizer: nested": (TOKENIZER, text(NESTED)),
    "tokenizer: a list": (TOKENIZER, text("[]")),
    "tokenizer: no model": (TOKENIZER, changed(model=None)),
    "tokenizer: a pipe": (TOKENIZER, pipe),
    "tokenizer: a link out of the folder": (TOKENIZER, link),
    "its config is a list": ("tokenizer_config.json", text("[]")),
    "its config is nested": ("tokenizer_config.json", text(NESTED)),
}
DIALOGS: dict[str, tuple[str, Craft]] = {
    "chat template: loops": (CHAT, chat(LOOP)),
    "chat template: a string of 10^10": (CHAT, chat("{{ 'a' * 10**10 }}")),
    "chat template: a string that doubles": (CHAT, chat(DOUBLE)),
    "chat template: an error in it": (CHAT, chat("{% if %}")),
    "chat template: 90 MB": (CHAT, chat("x" * LARGE)),
    "chat template: attributes of Python": (CHAT, chat("{{ ''.__class__.__mro__ }}")),
    "card: nested": (CARD, text(NESTED)),
    "card: a list": (CARD, text("[1]")),
    "card: 90 MB": (CARD, large),
    "card: a pipe": (CARD, pipe),
}
CONVERSATIONS: dict[str, tuple[str, Craft]] = {
    "chat template on one row: loops": (CHAT, on_a_row(LOOP)),
    "chat template on one row: a string that doubles": (CHAT, on_a_row(DOUBLE)),
    "chat template on one row: a text of 10^8": (CHAT, on_a_row("{{ 'a' * 10**8 }}")),
}
ADAPTERS: dict[str, tuple[str, Craft]] = {
    "adapter: no JSON": ("adapter_config.json", text("{")),
    "adapter: a list": ("adapter_config.json", text("[]")),
    "adapter: nested": ("adapter_config.json", text(NESTED)),
    "adapter: a base in numbers": ("adapter_config.json", changed(base_model_name_or_path=7)),
    "adapter: no such kind": ("adapter_config.json", changed(peft_type="MAGIC")),
    "adapter: a rank below 0": ("adapter_config.json", changed(r=-1)),
    "adapter's weights: half": ("adapter_model.safetensors", half),
    "adapter's weights: empty": ("adapter_model.safetensors", empty),
    "adapter's weights: a header of 90 MB": ("adapter_model.safetensors", LONG_HEADER),
}
GIVEN: dict[str, tuple[str, Craft]] = {
    "anchors": ("given.yaml", anchors),
    "nested": ("given.yaml", text("a: " + NESTED)),
    "a call": ("given.yaml", tag),
    "not UTF-8": ("given.yaml", lambda path: path.write_bytes(b"\xff\xfe")),
    "90 MB": ("given.yaml", text("a: " + "x" * LARGE)),
    "a pipe": ("given.yaml", pipe),
    "a date that is none": ("given.yaml", text("evaluate: 2024-99-99\n")),
    "a terminal's controls": ("given.yaml", text('"\\e]0;owned\\a\\u202e": 1\n')),
}
CHECKPOINTS: dict[str, tuple[str, Craft]] = {
    "checkpoint: a nested manifest": ("manifest.json", text(NESTED)),
    "checkpoint: a manifest of 90 MB": ("manifest.json", large),
    "checkpoint: a manifest that names ../x": (
        "manifest.json",
        text(json.dumps({"format": FORMAT, "files": {"../x": {}, "state.json": {}}})),
    ),
    "checkpoint: a state of 90 MB of lists": ("state.json", vouched(text("[" + "[]," * (LARGE // 3) + "[]]"))),
    "checkpoint: a header of 90 MB": (SHARD, vouched(LONG_HEADER)),
    "checkpoint: a pipe": (SHARD, pipe),
    "checkpoint: a link out of it": (SHARD, vouched(link)),
}
DATA: dict[str, tuple[str, Craft]] = {
    "data: a line of 20 GB": ("rows.jsonl.gz", unfolding(b'{"prompt": "')),
    "data: an element of 20 GB": ("rows.json.gz", unfolding(b'[{"prompt": "')),
    "data: a cell of 20 GB": ("rows.csv.gz", unfolding(b'prompt,chosen,rejected\n"')),
    "data: an element of 20 GB with wide characters": ("rows.json.gz", unfolding(b'[{"prompt": "' + WIDE)),
    "data: a cell of 20 GB with wide characters": ("rows.csv.gz", unfolding(b'prompt,chosen,rejected\n"' + WIDE)),
    "data: a line of 20 GB in bzip2": ("rows.jsonl.bz2", unfolding(b'{"prompt": "', bz2.compress)),
    "data: a cell of a GiB": ("rows.parquet", huge_cell),
    "data: a cell of a GiB among small ones": ("rows.parquet", among_small(one_cell)),
    "data: a list of a GiB among small ones": ("rows.parquet", among_small(one_list)),
    "data: half a Parquet file": ("rows.parquet", lambda path: path.write_bytes(b"PAR1" + b"\0" * 99)),
    "data: a Parquet footer past its start": (
        "rows.parquet",
        lambda path: path.write_bytes(b"PAR1\xff\xff\xff\x7fPAR1"),
    ),
    "data: a nested row": ("rows.jsonl", text(NESTED + "\n")),
    "data: a row of nothing but nulls": ("rows.jsonl", lambda path: path.write_bytes(b"\0" * 1000)),
    "data: a number of a million digits": ("rows.jsonl", text('{"prompt": ' + "9" * 10**6 + "}\n")),
    "data: a row that is no object": ("rows.jsonl", text("7\n")),
    "data: half a gzip file": ("rows.jsonl.gz", lambda path: path.write_bytes(gzip.compress(ROW.encode() * 99)[:40])),
    "data: gzip in name and magic alone": ("rows.jsonl.gz", lambda path: path.write_bytes(b"\x1f\x8b" + b"\xff" * 99)),
    "data: no end of zeros": ("rows.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "data: an Arrow file with a cell of a GiB among small ones": ("saved", saved_cell),
}
BY_LOADER: dict[str, Mapping[str, tuple[str, Craft]]] = {
    "model": MODELS,
    "tokenizer": TOKENIZERS,
    "dialog": DIALOGS,
    "conversation": CONVERSATIONS,
    "adapter": ADAPTERS,
    "template": {f"template: {what}": case for what, case in GIVEN.items()},
    "options": {f"options: {what}": case for what, case in GIVEN.items()},
    "checkpoint": CHECKPOINTS,
    "data": DATA,
}


def cases() -> Iterator[Case]:
    """All of them."""
    for loader, some in BY_LOADER.items():
        for what, (file, craft) in some.items():
            yield Case(loader, what, file, craft)
