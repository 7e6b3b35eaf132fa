"""Checkpoints with manipulated tensors and a matching manifest are refused, and no code runs."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import SHARD, STATE, assert_same, blank, header, reseal, split
from torch import Tensor

from dwrl_fast.errors import CheckpointError
from dwrl_fast.training.checkpoint import load_checkpoint, save_checkpoint

HELD = {"a": torch.arange(12.0).reshape(4, 3), "scalar": torch.tensor(2.5), "nothing": torch.empty(0, 3)}
SHARDING = "DCP_SHARDING_INFO"


def put(file: Path, head: bytes, body: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(head)) + head + body)


def refused(path: Path) -> str:
    """The message with which the re-sealed checkpoint of HELD is refused, before any of it is read."""
    reseal(path)
    into = blank(HELD)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, into)
    assert str(path) in str(error.value)
    assert_same(into, blank(HELD))
    return str(error.value)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another shape": lambda head: head["a"].update(shape=[3, 4]),
    "fewer dimensions": lambda head: head["a"].update(shape=[12]),
    "more rows than there are": lambda head: head["a"].update(shape=[5, 3]),
    "rows without end": lambda head: head["a"].update(shape=[2**62, 4]),
    "rows less than none": lambda head: head["a"].update(shape=[-4, -3]),
    "nothing of any length": lambda head: head["nothing"].update(shape=[2**62, 0]),
    "another dtype": lambda head: head["a"].update(dtype="I32"),
    "a dtype of half a byte": lambda head: head["a"].update(dtype="F4", shape=[8, 12]),
    "a dtype unknown to torch": lambda head: head["a"].update(dtype="F8_E8M0", shape=[48]),
    "a dtype unknown to all": lambda head: head["a"].update(dtype="PICKLE"),
    "offsets past the end": lambda head: head["a"].update(data_offsets=[0, 480]),
    "offsets without end": lambda head: head["a"].update(data_offsets=[2**63, 2**63 + 48]),
    "offsets past 64 bits": lambda head: head["a"].update(data_offsets=[2**70, 2**70 + 48]),
    "offsets before the start": lambda head: head["a"].update(data_offsets=[-8, 40]),
    "offsets backwards": lambda head: head["a"].update(data_offsets=[48, 0]),
    "offsets of another's": lambda head: head["scalar"].update(data_offsets=[0, 4]),
    "no offsets": lambda head: head["a"].pop("data_offsets"),
    "a name absent": lambda head: head.pop("scalar"),
    "an empty name absent": lambda head: head.pop("nothing"),
    "a name added": lambda head: head.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "a name changed": lambda head: head.update(b=head.pop("a")),
    "no tensors": lambda head: head.clear(),
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_manipulated_header_is_refused(tmp_path: Path, change: str) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, {})
    head, body = header(path / SHARD), split(path / SHARD)[1]
    HEADERS[change](head)
    put(path / SHARD, json.dumps(head).encode(), body)
    refused(path)


@pytest.mark.parametrize("head", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_header_of_garbage_is_refused(tmp_path: Path, head: bytes) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, {})
    put(path / SHARD, head, split(path / SHARD)[1])
    refused(path)


@pytest.mark.parametrize("length", [0, 7, 8, 9, 100, -20, -1])
def test_a_truncated_body_is_refused(tmp_path: Path, length: int) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, {})
    os.truncate(path / SHARD, length % (path / SHARD).stat().st_size)
    refused(path)


@pytest.mark.parametrize("length", [0, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_refused(tmp_path: Path, length: int) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, {})
    (path / SHARD).write_bytes(struct.pack("<Q", length) + (path / SHARD).read_bytes()[8:])
    refused(path)


def test_a_changed_byte_of_the_header_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = save_checkpoint(tmp_path, 1, HELD, {})
    whole = (path / SHARD).read_bytes()
    read = 0
    for place in range(8 + len(split(path / SHARD)[0])):
        data = bytearray(whole)
        data[place] ^= chance.randint(1, 255)
        (path / SHARD).write_bytes(data)
        reseal(path)
        into = blank(HELD)
        try:
            load_checkpoint(path, into)
        except CheckpointError:
            continue
        assert_same(into, HELD)
        read += 1
    assert read < 100


def say_of_places(path: Path, text: str) -> None:
    """Replace the offsets of the parts in the file."""
    head, body = header(path / SHARD), split(path / SHARD)[1]
    head["__metadata__"][SHARDING] = text
    put(path / SHARD, json.dumps(head).encode(), body)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "5", "true", '"text"', "{}", '{"a": 5}', "NaN", "1" * 5000, "\ud800", "[" * 100_000, '{"a":' * 100_000],
    ids=lambda text: ascii(text[:10]),
)
def test_places_of_garbage_are_refused(tmp_path: Path, text: str) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, {})
    say_of_places(path, text)
    refused(path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("a", [row, 0]) for row in (1, -1, -4, 2**40, 2**63 - 1, 2**63, 2**70, -(2**63), -(2**70))),
        *(("a", place) for place in ([0, -1], [0], [], [0, 0, 0], [0, 0, 5], [0.0, 0.0], [float("nan"), 0])),
        *(("a", place) for place in (None, 5, "00", ["0", "0"], {}, {"0": 0}, [None, None], [[0], [0]])),
        *(("scalar", place) for place in ([1], [-5], [2**70])),
        *(("nothing", place) for place in ([5, 0], [2**70, 0], [0, -3])),
    ],
    ids=str,
)
def test_a_part_in_an_impossible_place_is_refused(tmp_path: Path, name: str, place: Any) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, {})
    places = {each: {"saved_offsets": [0] * tensor.dim()} for each, tensor in HELD.items()}
    say_of_places(path, json.dumps(places | {name: {"saved_offsets": place}}))
    refused(path)


def save_parts(path: Path, *parts: tuple[list[int], Tensor]) -> None:
    """Save `a` of HELD in files of several ranks, each with its part and its offset."""
    for number, (place, part) in enumerate(parts, start=1):
        tensors = {"a": part.clone()} | ({"scalar": HELD["scalar"], "nothing": HELD["nothing"]} if number == 1 else {})
        places = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
        text = json.dumps(places | {"a": {"saved_offsets": place}})
        save_file(tensors, path / f"shard-{number:05d}-model-00001-of-00001.safetensors", metadata={SHARDING: text})
    reseal(path)


A = HELD["a"]
WHOLE = {
    "rows": [([0, 0], A[:1]), ([1, 0], A[1:])],
    "columns": [([0, 1], A[:, 1:]), ([0, 0], A[:, :1])],
    "both": [([0, 0], A[:2, :1]), ([2, 0], A[2:, :1]), ([0, 1], A[:3, 1:]), ([3, 1], A[3:, 1:])],
    "with ranks that have none": [([0, 0], A), ([4, 0], A[4:]), ([4, 0], A[4:])],
}
NOT_WHOLE = {
    "a gap before": [([2, 0], A[2:])],
    "a gap between": [([0, 0], A[:2]), ([3, 0], A[3:])],
    "a gap after": [([0, 0], A[:2]), ([4, 0], A[4:])],
    "a gap in a corner": [([0, 0], A[:3]), ([3, 0], A[3:, :2]), ([1, 1], A[1:2, 1:2])],
    "an overlap": [([0, 0], A[:2]), ([1, 0], A[1:])],
    "an overlap that hides a gap": [([0, 0], A[:2]), ([1, 0], A[1:2]), ([3, 0], A[3:])],
    "twice": [([0, 0], A), ([0, 0], A)],
    "rows before the first": [([-2, 0], torch.cat([A[:2], A]))],
    "rows before and after": [([0, 0], A[:2]), ([-1, 0], torch.cat([A[:1], A]))],
    "another dtype": [([0, 0], A[:2]), ([2, 0], A[2:].half())],
    "another dtype, first": [([0, 0], A[:2].half()), ([2, 0], A[2:])],
    "fewer dimensions": [([0, 0], A[:2]), ([2], A[2:, 0])],
    "more dimensions": [([0, 0], A[:2]), ([2, 0, 0], A[2:, :, None])],
    "no dimensions": [([0, 0], A), ([], A[0, 0])],
}


@pytest.mark.parametrize("parts", WHOLE)
def test_the_parts_of_several_ranks_make_the_whole(tmp_path: Path, parts: str) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, STATE)
    save_parts(path, *WHOLE[parts])
    into = blank(HELD)
    assert load_checkpoint(path, into) == STATE
    assert_same(into, HELD)


@pytest.mark.parametrize("parts", NOT_WHOLE)
def test_parts_that_do_not_make_the_whole_are_refused(tmp_path: Path, parts: str) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, STATE)
    save_parts(path, *NOT_WHOLE[parts])
    refused(path)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "null", "5", "[1]", '[["step", 1]]', '"ab"', "1" * 5000])
def test_a_state_of_anything_but_names_is_refused(tmp_path: Path, text: str) -> None:
    path = save_checkpoint(tmp_path, 1, HELD, STATE)
    (path / "state.json").write_text(text)
    reseal(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path, blank(HELD))


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(1, dtype=torch.complex128)},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.empty(1, device="meta")},
        {"\ud800": torch.zeros(1)},
    ],
    ids=["complex128", "sparse", "meta", "a name not in Unicode"],
)
def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path, 1, tensors, {})
    assert not list(tmp_path.iterdir())
