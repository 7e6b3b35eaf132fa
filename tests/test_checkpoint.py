"""Checkpoints are restored bit for bit, written atomically, never overwritten, and refused if altered or unsafe."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from dwrl_fast.errors import CheckpointError, UnwrittenError
from dwrl_fast.files import bounded
from dwrl_fast.training import checkpoint
from dwrl_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

SHARD = "shard-00001-model-00001-of-00001.safetensors"
STATE = {"step": 7, "rate": 0.1 + 0.2, "order": [3, 1], "note": "ähm", "nested": {"none": None}}


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(17, 5, generator=generator),
        "model.half": torch.randn(9, generator=generator).bfloat16(),
        "steps": torch.tensor([2**62 + 1, -seed]),
        "nothing": torch.empty(0, 3),
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "random": torch.get_rng_state(),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        "view": torch.arange(10)[3:5],
        "parameter": torch.nn.Parameter(torch.randn(2, generator=generator)),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor.detach(), 7) for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert bits(got[name]) == bits(expected[name]), name


def split(file: Path) -> tuple[bytes, bytes]:
    """A safetensors file's header and body."""
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end], data[end:]


def header(file: Path) -> dict[str, Any]:
    return dict(json.loads(split(file)[0]))


def reseal(folder: Path) -> None:
    """Update the manifest to the current files, as an attacker would."""
    (folder / "manifest.json").unlink()
    files = {path.name: checkpoint.fingerprint(path) for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "files": files}))


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = save_checkpoint(tmp_path / "new" / "run", 123, tensors, STATE)
    assert path == tmp_path / "new" / "run" / "checkpoint-000123"
    into = blank(tensors)
    into["parameter"] = torch.nn.Parameter(torch.zeros(2))
    addresses = {name: tensor.data_ptr() for name, tensor in into.items()}
    assert load_checkpoint(path, into) == STATE
    assert_same(into, tensors)
    assert {name: tensor.data_ptr() for name, tensor in into.items()} == addresses
    assert latest_checkpoint(path.parent) == path
    assert sorted(os.listdir(path.parent)) == [path.name]


def test_optimizer_moments_go_on_to_the_bit(tmp_path: Path) -> None:
    def run(steps: int, resume: Path | None) -> tuple[dict[str, Tensor], torch.nn.Parameter]:
        weight = torch.nn.Parameter(torch.ones(3))
        adam = torch.optim.AdamW([weight], lr=0.1)
        weight.grad = torch.zeros(3)
        adam.step()  # makes the moments
        held = {"weight": weight, **{f"adam.{k}": v for k, v in adam.state[weight].items()}}
        done = load_checkpoint(resume, held)["done"] if resume else 0
        for step in range(done, steps):
            weight.grad = torch.tensor([0.1, -0.2, 0.3]) * (step + 1)
            adam.step()
        return held, weight

    held, _ = run(2, None)
    path = save_checkpoint(tmp_path, 2, held, {"done": 2})
    assert bits(run(5, path)[1]) == bits(run(5, None)[1])


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, some_tensors(), STATE)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_checkpoint(tmp_path, 1, some_tensors(1), STATE)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("keep", [None, 1, 2, 3])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int | None) -> None:
    (tmp_path / "checkpoint-final").mkdir()
    for step in (
        5,
        10,
        1000000,
        15,
    ):  # 1000000 has more digits than the others; 15 comes last although its number is smaller
        save_checkpoint(tmp_path, step, {"a": torch.tensor(step)}, {}, keep)
    left = {None: {5, 10, 15, 1000000}, 1: {15}, 2: {15, 1000000}, 3: {10, 15, 1000000}}[keep]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{s:06d}" for s in left} | {"checkpoint-final"}
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == f"checkpoint-{max(left):06d}"


def test_nothing_is_pruned_for_a_checkpoint_that_went_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_checkpoint(tmp_path, 1, some_tensors(), STATE, 1)
    write = checkpoint._write_rest

    def write_badly(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        (folder / "state.json").write_text("{}")

    monkeypatch.setattr(checkpoint, "_write_rest", write_badly)
    with pytest.raises(CheckpointError, match=r"state.json has changed since it was written"):
        save_checkpoint(tmp_path, 2, some_tensors(), STATE, 1)
    assert latest_checkpoint(tmp_path) == old


def test_places_within_steps_are_in_order_and_one_may_be_spared(tmp_path: Path) -> None:
    places = [(1, 0), (1, 2), (1, 10), (2, 0)]
    for step, update in places:
        save_checkpoint(tmp_path, step, {}, {}, 2, update=update, spared={"checkpoint-000001"})
    left = ["checkpoint-000001", "checkpoint-000001-0010", "checkpoint-000002"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == left
    assert [checkpoint.place_of(tmp_path / checkpoint.name_of(place)) for place in places] == places
    assert [path.name for path in checkpoint.checkpoints(tmp_path, past=(1, 9))] == left[1:]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-000002"


def test_a_checkpoint_that_is_not_accepted_fills_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, some_tensors(), STATE)

    def refuse(state: dict[str, Any]) -> None:
        assert state == STATE
        raise CheckpointError("not this one")

    into = blank(some_tensors())
    with pytest.raises(CheckpointError, match="not this one"):
        load_checkpoint(path, into, accept=refuse)
    assert_same(into, blank(some_tensors()))


def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path: Path) -> None:
    """Any bits, including NaN; scalars, and empty tensors."""
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    whole = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
    tensors, into = {}, {}
    for dtype in [*floats, *whole, torch.bool, torch.complex64]:
        for shape in [(), (1,), (0,), (5,), (0, 3), (3, 0), (2, 0, 3), (2, 3, 5)]:
            into[f"{dtype}{shape}"] = torch.zeros(shape, dtype=dtype)
            some = torch.randint(2 if dtype == torch.bool else 256, (len(bits(into[f"{dtype}{shape}"])),))
            tensors[f"{dtype}{shape}"] = some.byte().view(dtype).reshape(shape)
    assert load_checkpoint(save_checkpoint(tmp_path, 1, tensors, STATE), into) == STATE
    assert_same(into, tensors)


def test_a_tensor_in_another_order_of_memory_comes_back(tmp_path: Path) -> None:
    image = torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last)
    tensors = {"transposed": torch.randn(4, 6).t(), "strided": torch.arange(9)[::2], "image": image}
    into = blank(tensors)
    load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}), into)
    assert_same(into, tensors)
    assert into["image"].stride() == image.stride()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {}, STATE)
    assert load_checkpoint(path, {}) == STATE
    with pytest.raises(CheckpointError, match="lacks a"):
        load_checkpoint(path, {"a": torch.zeros(1)})


def test_tensors_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of any size is in one file; tensors that begin within the same multiple of FILE_BYTES share a file."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    tensors = {name: torch.randn(size) for name, size in {"a": 15, "b": 15, "c": 15, "d": 125, "e": 1}.items()}
    path = save_checkpoint(tmp_path, 1, tensors, STATE)
    names = {f"shard-00001-model-0000{i}-of-00007.safetensors": held for i, held in [(1, "ab"), (2, "cd"), (7, "e")]}
    assert {file.name for file in path.iterdir()} == {*names, "state.json", "manifest.json"}
    for name, held in names.items():
        assert {*header(path / name)} == {"__metadata__", *held}
    into = blank(tensors)
    assert load_checkpoint(path, into) == STATE
    assert_same(into, tensors)


@pytest.mark.parametrize("size", [1, 64, 700, 2**20])
def test_files_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", size)
    path = save_checkpoint(tmp_path, 1, some_tensors(), STATE)
    monkeypatch.undo()
    assert (len(list(path.glob("*.safetensors"))) == 1) == (size == 2**20)
    into = blank(some_tensors())
    assert load_checkpoint(path, into) == STATE
    assert_same(into, some_tensors())


def test_one_of_several_files_that_is_gone_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 4)
    tensors = {name: torch.ones(1) for name in "abc"}
    path = save_checkpoint(tmp_path, 1, tensors, STATE)
    (path / "shard-00001-model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors cannot be read"):
        load_checkpoint(path, blank(tensors))
    reseal(path)
    with pytest.raises(CheckpointError, match="lacks b"):
        load_checkpoint(path, blank(tensors))


def flip_byte(folder: Path) -> None:
    file = folder / SHARD
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, 100)


def manifest(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_text(text)


def also_vouching_for(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        found = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(found | {"files": found["files"] | {name: {}}}))

    return damage


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (flip_byte, f"{SHARD} has changed since it was written"),
    (truncate, f"{SHARD} has changed since it was written"),
    (lambda folder: (folder / SHARD).unlink(), f"{SHARD} cannot be read"),
    (lambda folder: (folder / "state.json").write_text("{}"), "state.json has changed since it was written"),
    (lambda folder: (folder / "state.json").unlink(), "state.json cannot be read"),
    (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    (manifest("{"), "manifest.json cannot be read"),
    (manifest("[" * 100_000), "manifest.json cannot be read"),
    (manifest("[]"), "manifest.json is not of format 2"),
    (manifest("{}"), "manifest.json is not of format 2"),
    (manifest('{"format": 3, "files": {}}'), "manifest.json is not of format 2"),
    (manifest('{"format": 2, "files": []}'), "manifest.json is not of format 2"),
    (manifest('{"format": 2, "files": {}}'), f"does not list {SHARD}"),
    (also_vouching_for("../checkpoint-000001/state.json"), "does not list ../checkpoint-000001/state.json"),
    (also_vouching_for("/etc/passwd"), "does not list /etc/passwd"),
    (also_vouching_for(".."), "cannot be read"),
    (also_vouching_for(""), "cannot be read"),
    (also_vouching_for("a\0b"), r"names 'a\x00b', which is not the name of a checkpoint file"),
    (also_vouching_for("a\ud800"), r"names 'a\ud800', which is not the name of a checkpoint file"),
    (shutil.rmtree, "does not exist"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_refused_and_the_one_before_is_the_latest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], message: str
) -> None:
    good = save_checkpoint(tmp_path, 1, some_tensors(), STATE)
    bad = save_checkpoint(tmp_path, 2, some_tensors(), STATE)
    damage(bad)
    into = blank(some_tensors())
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(bad, into)
    assert message in str(error.value)
    assert str(bad) in str(error.value)
    assert_same(into, blank(some_tensors()))
    with caplog.at_level(logging.WARNING, logger="dwrl_fast"):
        assert latest_checkpoint(tmp_path) == good
    assert bad.exists() == any(message in said and "SKIPPED" in said for said in caplog.messages)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="is not a checkpoint, or is incomplete"):
        load_checkpoint(tmp_path, {})


def test_names_shapes_and_dtypes_must_be_the_same(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}, {})

    def refused(tensors: dict[str, Tensor], message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            load_checkpoint(path, tensors)
        assert "resume with the configuration saved next to it" in str(error.value)

    refused({"a": torch.zeros(2, 3)}, "also holds b")
    refused({"a": torch.zeros(2, 3), "b": torch.zeros(1), "c": torch.zeros(1)}, "lacks c")
    refused({f"n{i}": torch.zeros(1) for i in range(5)}, "lacks n0, n1, n2 and 2 more and also holds a, b")
    refused(
        {"a": torch.zeros(3, 2), "b": torch.zeros(1)}, r"a is torch.float32 \[2, 3\] in the checkpoint and .* \[3, 2\]"
    )
    refused(
        {"a": torch.zeros(2, 3), "b": torch.zeros(1).half()},
        r"b is torch.float32 \[1\] in the checkpoint and .*16 \[1\]",
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": (1, 2)}, "tuples"),
        ({1: 2}, "keys that are not text"),
        ({"a": {1, 2}}, "cannot be written as JSON"),
        ({"a": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 1, {}, state)
    assert not list(tmp_path.iterdir())


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rate is a float: only tensors"):
        save_checkpoint(tmp_path, 1, {"rate": 0.1}, {})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


class Malice:
    """An object that creates the named folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, some_tensors(), STATE)
    assert {file.name for file in path.rglob("*")} == {SHARD, "state.json", "manifest.json"}
    assert {*header(path / SHARD)} == {"__metadata__", *some_tensors()}
    for name in ("state.json", "manifest.json"):
        assert json.loads((path / name).read_text())


def pickled(trace: Path) -> bytes:
    return pickle.dumps(Malice(trace))


def saved_by_torch(trace: Path) -> bytes:
    with io.BytesIO() as file:
        torch.save(Malice(trace), file)
        return file.getvalue()


@pytest.mark.parametrize("name", [SHARD, ".metadata", "__0_0.distcp", "state.json"])
@pytest.mark.parametrize("craft", [pickled, saved_by_torch])
def test_a_pickle_in_the_folder_is_never_loaded(tmp_path: Path, name: str, craft: Callable[[Path], bytes]) -> None:
    trace = tmp_path / "ran"
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, STATE)
    replaced = (path / name).exists()
    (path / name).write_bytes(craft(trace))
    reseal(path)
    into = {"a": torch.zeros(1)}
    if replaced:
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path, into)
    else:
        assert load_checkpoint(path, into) == STATE
        assert into["a"] == 1
    assert not trace.exists()


def test_those_pickles_would_run_code(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "one"))
    torch.load(io.BytesIO(saved_by_torch(tmp_path / "two")), weights_only=False)
    assert (tmp_path / "one").exists()
    assert (tmp_path / "two").exists()


def test_a_checkpoint_of_format_1_is_refused_with_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = tmp_path / "ran"
    path = tmp_path / "checkpoint-000001"
    path.mkdir()
    (path / ".metadata").write_bytes(pickled(trace))
    (path / "__0_0.distcp").write_bytes(saved_by_torch(trace))
    (path / "state.json").write_text("{}")
    files = {file.name: checkpoint.fingerprint(file) for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, {"a": torch.zeros(1)})
    assert str(error.value).startswith(f"{path} was written by dwrl_fast 0.1,")
    assert "continue with that version, or start a new run in another --output_dir" in str(error.value)
    with caplog.at_level(logging.WARNING, logger="dwrl_fast"):
        assert latest_checkpoint(tmp_path) is None
    assert f"SKIPPED: {error.value}" in caplog.messages
    assert not trace.exists()


@pytest.mark.parametrize("name", ["shard-00002-model-00001-of-00001.safetensors", "a.safetensors", ".safetensors"])
def test_tensors_that_the_manifest_does_not_list_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {})
    save_file({"a": torch.ones(1)}, path / name)

    def read(*_: object) -> None:
        pytest.fail("a file was opened")

    monkeypatch.setattr(dcp.HuggingFaceStorageReader, "read_metadata", read)
    into = {"a": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, into)
    assert str(error.value) == f"{path}: manifest.json does not list {name}."
    assert latest_checkpoint(tmp_path) is None
    (path / name).unlink()
    with pytest.raises(pytest.fail.Exception):
        load_checkpoint(path, into)


# Saves that fail or die


def test_a_state_too_large_to_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save_checkpoint(tmp_path, 1, some_tensors(), STATE)
    for name, most in (("MOST_STATE", 200), ("NESTED", 20)):
        with monkeypatch.context() as patch, pytest.raises(UnwrittenError, match="--rollout_batch_size"):
            patch.setattr(checkpoint if name == "MOST_STATE" else bounded, name, most)
            save_checkpoint(tmp_path, 2, some_tensors(), STATE | {"groups": [[i] for i in range(100)]})
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save_checkpoint(tmp_path, 1, some_tensors(), STATE, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("fingerprint", "_sync"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
            patch.setattr(checkpoint, function, full)
            save_checkpoint(tmp_path, 2, some_tensors(), STATE, 1)
        assert [path.name for path in tmp_path.iterdir()] == [good.name]
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
        patch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
        save_checkpoint(tmp_path, 2, some_tensors(), STATE, 1)
    assert latest_checkpoint(tmp_path) == good


def test_an_interrupt_while_saving_stays_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, some_tensors(), STATE, 1)
    assert not list(tmp_path.iterdir())


class Died(BaseException):
    """Simulates the end of a process, without any cleanup."""


STEPS_OF_A_SAVE = [
    ("sync", SHARD),
    ("sync", "state.json"),
    ("sync", "manifest.json"),
    ("sync", "checkpoint-000002.unfinished"),
    ("rename", "checkpoint-000002"),
    ("sync", "run"),
    ("rename", "checkpoint-000001.unfinished"),
]


@pytest.mark.parametrize("deadly", range(len(STEPS_OF_A_SAVE) + 1))
def test_the_order_of_a_save_and_death_before_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadly: int
) -> None:
    parent = tmp_path / "run"
    save_checkpoint(parent, 1, some_tensors(1), {"step": 1}, 1)
    done: list[tuple[str, str]] = []

    def watched(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            if len(done) == deadly:
                raise Died
            done.append((kind, args[-1].name))
            return function(*args)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", watched("sync", checkpoint._sync))
        patch.setattr(Path, "rename", watched("rename", Path.rename))
        if deadly < len(STEPS_OF_A_SAVE):
            with pytest.raises(Died):
                save_checkpoint(parent, 2, some_tensors(2), {"step": 2}, 1)
        else:
            save_checkpoint(parent, 2, some_tensors(2), {"step": 2}, 1)
    assert done == STEPS_OF_A_SAVE[:deadly]

    renamed = deadly > STEPS_OF_A_SAVE.index(("rename", "checkpoint-000002"))
    latest = latest_checkpoint(parent)
    assert latest is not None
    into = blank(some_tensors())
    assert load_checkpoint(latest, into) == {"step": 2 if renamed else 1}
    assert_same(into, some_tensors(2 if renamed else 1))
    save_checkpoint(parent, 3, some_tensors(3), {"step": 3}, 1)
    assert [path.name for path in parent.iterdir()] == ["checkpoint-000003"]


def numbers(step: int) -> dict[str, Tensor]:
    return {"a": torch.arange(step, step + 300_000), "b": torch.full((1000,), step / 3)}


def save_without_end(parent: Path, step: int, said: Connection) -> None:
    while True:
        said.send(step)
        step += 1
        save_checkpoint(parent, step, numbers(step), {"step": step}, keep=2)


@pytest.mark.slow
def test_twenty_kills_while_saving(tmp_path: Path) -> None:
    """SIGKILL at random moments. Every checkpoint reported as saved exists, is intact, and equals the state of its
    step.
    """
    chance = random.Random(0)
    context = multiprocessing.get_context("forkserver")  # imports torch once, not twenty times
    context.set_forkserver_preload(["dwrl_fast.training.checkpoint"])
    saved = interrupted = 0
    for kill in range(200):
        if kill >= 20 and interrupted > 5:
            break
        hear, say = context.Pipe(duplex=False)
        process = context.Process(target=save_without_end, args=(tmp_path, saved, say), daemon=True)
        process.start()
        say.close()
        for _ in range(chance.randint(1, 3)):
            reported = hear.recv()
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        while hear.poll():
            try:
                reported = hear.recv()
            except EOFError:
                break
        interrupted += any(path.name.endswith(checkpoint.UNFINISHED) for path in tmp_path.iterdir())

        latest = latest_checkpoint(tmp_path)
        if latest is None:
            assert reported == 0
            continue
        into = blank(numbers(0))
        saved = load_checkpoint(latest, into)["step"]
        assert saved in (reported, reported + 1)  # the next one may be complete before it is reported
        assert latest.name == f"checkpoint-{saved:06d}"
        assert_same(into, numbers(saved))
    assert saved > 0
    assert interrupted > 5, "hardly a kill fell into a save: the test shows little"
