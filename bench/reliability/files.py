"""Tests that every broken or hostile file leads to an error that names the file, and to nothing else.

Each case damages one file of a kind that a loader reads, in an otherwise intact folder, and loads it in a separate
process. The process must end with a user error that names the file, run no code, read nothing outside the folder, and
need less than 20 seconds of processor time and less than one additional GiB.
"""

import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.reliability.cases import Case, cases
from bench.reliability.crafts import TRIGGER
from bench.reliability.drill import Drill
from bench.reliability.lives import life
from dwrl_fast.config import parse_train
from dwrl_fast.data import read_preferences
from dwrl_fast.dialog import Dialog
from dwrl_fast.embedded import Embedded
from dwrl_fast.errors import UserError
from dwrl_fast.log import escaped
from dwrl_fast.models.model import load_generative
from dwrl_fast.models.pretrained import load_tokenizer
from dwrl_fast.scoring.loading import load_trained
from dwrl_fast.templates import load_template
from dwrl_fast.training.checkpoint import load_checkpoint, save_checkpoint

SECONDS, MIB = 20.0, 1024
WAIT = 6 * SECONDS  # wall time: beside other work, a process gets a part of a core


def load(loader: str, folder: Path, file: str) -> object:
    """Load the folder, or the file in it, with `loader`."""
    if loader in ("model", "adapter"):
        return load_generative(str(folder), None, 0)
    if loader == "tokenizer":
        return load_tokenizer(str(folder))
    if loader == "dialog":
        return load_trained(folder)
    if loader == "conversation":
        dialog, _ = load_trained(folder)
        assert isinstance(dialog, Dialog)
        return dialog.context(({"role": "user", "content": "1 2 3"},), TRIGGER)
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
    if loader in ("model", "tokenizer", "dialog", "conversation"):
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
        if time.monotonic() - started > WAIT:
            os.kill(process, signal.SIGKILL)
            os.wait4(process, 0)
            return f"no end within {WAIT:.0f} s"
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
    if usage.ru_utime + usage.ru_stime > SECONDS:
        return f"more than {SECONDS:.0f} s of processor time"
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
        "hostile and broken files",
        "100 and more: an error that names the file, within 20 s of processor time and 1 GiB",
        found,
        not wrong,
    )
