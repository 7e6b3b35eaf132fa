"""The code in README and docs runs unchanged, and their commands are valid."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny import tiny_folder, tiny_model
from torch import Tensor, nn

from dwrl_fast.compare import parse_compare
from dwrl_fast.config import parse_evaluate, parse_train
from dwrl_fast.embedded.tokenizer import make_tokenizer

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"^ {4}(.*)$", re.M)
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train": parse_train,
    "evaluate": parse_evaluate,
    "compare": parse_compare,
}


def blocks(name: str, language: str) -> list[str]:
    return [code for kind, code in FENCED.findall((ROOT / name).read_text("utf-8")) if kind == language]


def sample(policy: Any, prompts: list[str]) -> tuple[list[str], Tensor]:
    """One token each, drawn: its text and log pi of it."""
    tokenizer = make_tokenizer()
    logits = torch.stack([policy(torch.tensor([tokenizer.encode(text)])).logits[0, -1] for text in prompts])
    drawn = torch.distributions.Categorical(logits=logits).sample()
    return tokenizer.batch_decode(drawn[:, None]), logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)


def surroundings() -> dict[str, Any]:
    """What the examples call yours."""
    torch.manual_seed(0)
    policy, tokens = tiny_model(seed=5).lm, 7
    hidden = torch.randn(tokens, 16, requires_grad=True)
    lm_head = nn.Linear(16, 40, bias=False)
    targets = torch.randint(40, (tokens,))
    return {
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
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run's model lies as the examples say."""
    tiny_folder(tmp_path / "runs" / "mine" / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_of_the_readme_runs(place: Path) -> None:
    [judged] = blocks("README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(judged, "README.md", "exec"), names)
    assert names["rewards"].shape == (2,) and 0 < names["better"] < 1


def test_the_code_about_operators_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [fused] = blocks("docs/operators.md", "python")
    names = surroundings()
    exec(compile(fused, "docs/operators.md", "exec"), names)
    assert names["hidden"].grad.abs().sum() > 0 and "clipped" in capsys.readouterr().out


def test_a_loop_of_ones_own_runs(place: Path) -> None:
    *_, loop = blocks("docs/scorer.md", "python")
    names = surroundings()
    before = [p.detach().clone() for p in names["policy"].parameters()]
    exec(compile(loop, "docs/scorer.md", "exec"), names)
    assert names["reward"].shape == (4,)
    assert any(not torch.equal(p, was) for p, was in zip(names["policy"].parameters(), before, strict=True))


def test_the_code_about_the_scorer_runs(place: Path) -> None:
    code, any_model, *_ = blocks("docs/scorer.md", "python")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/scorer.md", "exec"), names)
    plain = any_model.replace("Qwen/Qwen2.5-3B-Instruct", "runs/mine/model").replace("=512", "=6")
    exec(compile(plain, "docs/scorer.md", "exec"), dict(names))
    assert sorted(names["order"]) == [0, 1, 2] and [len(each) for each in names["thoughts"]] == [4]


@pytest.mark.slow
def test_the_code_about_trl_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny policy in place of the hub's, and small enough settings for a moment's run."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    small = {"use_cpu": True, "bf16": False, "report_to": [], "max_completion_length": 4, "disable_tqdm": True}
    monkeypatch.setattr(trl, "GRPOConfig", lambda _make=trl.GRPOConfig, **given: _make(**given, **small))
    trained, _, trl_code, _ = blocks("docs/scorer.md", "python")
    code = (trained + trl_code).replace("Qwen/Qwen2.5-0.5B-Instruct", "runs/mine/model")
    names: dict[str, Any] = {"dataset": Dataset.from_list([{"prompt": "3 5 0"}, {"prompt": "1"}] * 4)}
    exec(compile(code, "docs/scorer.md", "exec"), names)
    assert [row["reward"] for row in names["trainer"].state.log_history if "reward" in row]


@pytest.mark.parametrize("name", ["README.md", "docs/scorer.md", "docs/training.md"])
def test_commands_have_the_options_that_they_name(place: Path, name: str) -> None:
    text = "\n".join([*blocks(name, ""), *INDENTED.findall((ROOT / name).read_text("utf-8"))])
    lines = re.findall(r"^python -m dwrl_fast\.(\w+) (.*)$", text.replace("\\\n", " "), re.M)
    assert lines
    for command, line in lines:
        if command in PARSERS:
            PARSERS[command](shlex.split(line, comments=True))
