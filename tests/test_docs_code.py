"""The code of README and of the documentation runs as it stands there, and its commands have the options that they
name. The shell blocks of a tutorial are run from the first to the last.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from doc_blocks import LANGUAGES, NEEDS, PAGES, TUTORIALS, Block, blocks, statements, words
from tiny import tiny_folder, tiny_model
from torch import Tensor, nn

from dwrl_fast.compare import parse_compare
from dwrl_fast.config import TrainConfig, parse_evaluate, parse_train
from dwrl_fast.data.__main__ import DataConfig
from dwrl_fast.dialog.__main__ import ShowConfig
from dwrl_fast.doctor import parse_doctor
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.options import checked, parse
from dwrl_fast.plan import parse_plan
from dwrl_fast.templates.template import read_template

PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "dwrl_fast.train": parse_train,
    "dwrl_fast.evaluate": parse_evaluate,
    "dwrl_fast.compare": parse_compare,
    "dwrl_fast.data": partial(parse, DataConfig),
    "dwrl_fast.dialog": partial(parse, ShowConfig),
    "dwrl_fast.doctor": parse_doctor,
    "dwrl_fast.plan": parse_plan,
}
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.M)
WRITING, LOOKING = ("echo", "cat"), ("ls", "head", "tail", ".")  # of what a block writes, and at what a command wrote
OTHERS = {"Qwen/Qwen2.5-3B-Instruct": "runs/mine/model", "Qwen/Qwen2.5-0.5B-Instruct": "runs/mine/model", "=512": "=6"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples name, in small."""
    for name in ("runs/mine/model", "runs/first/model", "models/smollm2"):
        tiny_folder(tmp_path / name)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "mine.yaml").write_text("{model_name_or_path: MODEL, dataset_name: pairs.jsonl}")
    (tmp_path / "RECIPE.yaml").write_text("method: dwrl")
    (tmp_path / "graded.jsonl").write_text('{"prompt": "2", "responses": ["2", "3"], "ranks": [1, 2]}\n')
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/tutorials/own-data.md", "sh"):
        for statement in statements(block.code):
            if words(statement)[0] in WRITING:
                shell(statement)
    return tmp_path


def shell(script: str, **environ: str) -> None:
    """Run a script, to its first failure."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=os.environ | own | environ, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


# Every block


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_checked_or_marked(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: the language of a code block is one of {LANGUAGES}"
        assert block.needs in ("", *NEEDS), f"{block.where}: marked as needing {block.needs}, not one of {NEEDS}"
        if block.language == "sh":
            for statement in statements(block.code):
                check_statement(block, statement, monkeypatch)
        elif block.language == "yaml":
            check_yaml(block)
        elif block.language == "json":
            assert all(isinstance(json.loads(line), dict) for line in block.code.splitlines())
        elif block.language == "python":
            compile(textwrap.dedent(block.code), block.where, "exec")  # and run below


def check_statement(block: Block, statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One statement: our commands have the options, `make` has the target, texts are written."""
    program, *rest = words(statement)
    module, arguments = "", []
    if program in ("python", ".venv/bin/python", "torchrun") and "-m" in rest:
        module, *arguments = rest[rest.index("-m") + 1 :]
    if module in PARSERS:
        assert PARSERS[module](arguments)
    elif module.startswith("bench."):
        check_benchmark(module, arguments, monkeypatch)
    elif program == "make":
        unknown = [word for word in rest if "=" not in word and word not in TARGETS]
        assert not unknown, f"{block.where}: `make {unknown[0]}` is no target"
    elif program in WRITING:
        shell(statement)
    else:
        marked = block.needs or program in LOOKING
        assert marked, f"{block.where}: nothing checks `{program}`; mark the block with <!-- needs: ... -->"


def check_benchmark(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of `python -m bench...` takes the arguments. Nothing is measured."""

    class Parsed(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        parse_args(parser, arguments)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")


def check_yaml(block: Block) -> None:
    """A template, or options of `train`."""
    values = yaml.safe_load(block.code)
    if "evaluate" in values:
        read_template(values, block.where)
    else:
        assert checked(TrainConfig, values, block.where)


# Python


def sample(policy: Any, prompts: list[str]) -> tuple[list[str], Tensor]:
    """One token each, drawn: its text and log pi of it."""
    tokenizer = make_tokenizer()
    logits = torch.stack([policy(torch.tensor([tokenizer.encode(text)])).logits[0, -1] for text in prompts])
    drawn = torch.distributions.Categorical(logits=logits).sample()
    return tokenizer.batch_decode(drawn[:, None]), logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)


def surroundings() -> dict[str, Any]:
    """What the examples call yours."""
    from datasets import Dataset

    torch.manual_seed(0)
    policy, tokens = tiny_model(seed=5).lm, 7
    hidden = torch.randn(tokens, 16, requires_grad=True)
    lm_head = nn.Linear(16, 40, bias=False)
    targets = torch.randint(40, (tokens,))
    return {
        "__name__": "example",
        "policy": policy,
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.1),
        "batches": [["3 5 0", "1"], ["2"]],
        "sample": sample,
        "hidden": hidden,
        "lm_head": lm_head,
        "targets": targets,
        "old_logprob": lm_head(hidden).log_softmax(-1)[range(tokens), targets].detach(),
        "advantage": torch.randn(tokens),
        "token_weight": torch.full((tokens,), 1 / tokens),
        "dataset": Dataset.from_list([{"prompt": "3 5 0"}, {"prompt": "1"}] * 4),
    }


def run_python(page: str, names: dict[str, Any], needs: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other, in the names of `names`, which is returned."""
    for block in blocks(page, "python"):
        if block.needs in needs:
            code = textwrap.dedent(block.code)
            for written, small in OTHERS.items():
                code = code.replace(written, small)
            exec(compile(code, block.where, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if any(not block.needs for block in blocks(page, "python"))])
def test_the_python_of_a_page_runs(page: str, place: Path) -> None:
    names = surroundings()
    before = [parameter.detach().clone() for parameter in names["policy"].parameters()]
    run_python(page, names)
    if page == "README.md":
        assert names["rewards"].shape == (2,) and 0 < names["better"] < 1
    if page == "docs/operators.md":
        assert names["hidden"].grad.abs().sum() > 0
    if page == "docs/scorer.md":
        assert sorted(names["order"]) == [0, 1, 2] and [len(each) for each in names["thoughts"]] == [4]
        assert names["reward"].shape == (4,)
        after = names["policy"].parameters()
        assert any(not torch.equal(was, now) for was, now in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.needs == "trl" for block in blocks(page))])
def test_the_code_about_trl_runs(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With settings that are small enough for a moment's run."""
    trl = pytest.importorskip("trl")
    small = {"use_cpu": True, "bf16": False, "report_to": [], "max_completion_length": 4, "disable_tqdm": True}
    monkeypatch.setattr(trl, "GRPOConfig", lambda _make=trl.GRPOConfig, **given: _make(**given | small))
    names = run_python(page, surroundings(), ("", "trl"))
    assert [row["reward"] for row in names["trainer"].state.log_history if "reward" in row]


# Tutorials


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_runs_from_its_first_line_to_its_last(page: str, place: Path) -> None:
    script = [block.code for block in blocks(page, "sh") if not block.needs]
    for made in ("runs/mine", "runs/first"):
        if any(f"--output_dir {made} " in f"{code} ".replace("\n", " ") for code in script):
            shutil.rmtree(made)
    for code in script:
        shell("\n".join(each for each in statements(code) if words(each)[0] not in ("make", ".")))
    run_python(page, surroundings())
