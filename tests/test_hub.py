"""A model goes to the hub and comes back from it: a loopback server stands for the hub."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_hub import TOKEN, FakeHub, serving
from rich.console import Console
from tiny import tiny_config

from dwrl_fast import Scorer, compare, evaluate, train
from dwrl_fast.config import parse_evaluate
from dwrl_fast.errors import ConfigError, ModelError

PROMPTS, RESPONSES = ["3 + 4?", "3 + 4?"], ["7", "8"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The server to which huggingface_hub connects, with a token that it accepts."""
    with serving() as found:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", found.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def go(folder: Path, **changes: Any) -> dict[str, Any]:
    options = {"max_steps": 1, "output_dir": str(folder / "run"), "push_to_hub": True, **changes}
    return train.run(tiny_config(folder, **options), Console(quiet=True))


def hf(hub: FakeHub, tmp_path: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of `hf` as it is printed in one of our messages."""
    words = shlex.split(command)
    assert words[0] == "hf"
    own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    own["HF_HOME"] = str(tmp_path / "home")
    script = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *words[1:]]
    return subprocess.run(script, env=os.environ | own, capture_output=True, text=True, timeout=120)


def test_a_run_sends_its_model_and_the_hub_gives_it_back(folder: Path, hub: FakeHub, capsys: Any) -> None:
    go(folder)
    local = folder / "run" / "model"
    assert hub.private == {"tester/run": True}, "private, in the user's own name, called as the folder"
    (first, empty), (sha, files) = hub.commits["tester/run"]
    assert files == {path.name: path.read_bytes() for path in local.iterdir()} and "README.md" in files
    assert b"Scorer.from_pretrained('tester/run')" in files["README.md"] and not empty

    hub.commit("tester/run", dict.fromkeys(("evil.bin", "evil.pkl", "evil.py", "pytorch_model.bin"), b""))
    hub.fetched.clear()
    scores = Scorer.from_pretrained("tester/run").score(PROMPTS, RESPONSES)
    assert torch.equal(scores, Scorer.from_pretrained(local).score(PROMPTS, RESPONSES))
    assert hub.fetched and all(name.endswith((".json", ".safetensors", ".jinja")) for name in hub.fetched)
    assert torch.equal(Scorer.from_pretrained("tester/run", revision=sha).score(PROMPTS, RESPONSES), scores)
    with pytest.raises(ModelError, match=r"tester/run on the hub has no preference_model\.json"):
        Scorer.from_pretrained("tester/run", revision=first)
    with pytest.raises(ModelError, match="tester/run is not a folder, and could not be downloaded from the hub"):
        Scorer.from_pretrained("tester/run", revision="no-such-branch")

    rows = ["--dataset_name", f"{folder}/pairs.jsonl"]
    evaluated = [
        evaluate.run(parse_evaluate(["--model_name_or_path", name, *rows]), Console(quiet=True))
        for name in ("tester/run", str(local))
    ]
    assert evaluated[0] == evaluated[1]
    compare.main(["tester/run", str(local), *rows])
    assert "A  tester/run: accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_cannot_be_sent_is_kept_and_sent_later(
    folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.broken = "/commit/"
    with pytest.raises(
        ModelError, match=r"the model is in .*run/model, but it could not be uploaded to tester/mine"
    ) as error:
        go(folder, hub_model_id="mine")
    assert (folder / "run" / "result.json").exists() and TOKEN not in str(error.value)
    assert len(hub.commits["tester/mine"]) == 1
    hub.broken = "a path of none"
    sent = hf(hub, folder, str(error.value).splitlines()[-1].strip())
    assert sent.returncode == 0, sent.stderr
    assert torch.equal(
        Scorer.from_pretrained("tester/mine").score(PROMPTS, RESPONSES),
        Scorer.from_pretrained(folder / "run" / "model").score(PROMPTS, RESPONSES),
    )


def test_a_resumed_run_sends_the_model_that_was_not_sent(
    folder: Path, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: a run whose model is on the hub is left as it is."""
    hub.broken = "/commit/"
    with pytest.raises(ModelError, match=r"same command with --output_dir .*/run --resume_from_checkpoint latest, or"):
        go(folder)
    hub.broken = "a path of none"
    for said in ("only the upload of its model was left to do", "nothing was left to do, and nothing was written"):
        caplog.clear()
        with caplog.at_level("INFO", logger="dwrl_fast"):
            result = go(folder, resume_from_checkpoint="latest")
        assert said in caplog.text and len(hub.commits["tester/run"]) == 2
        assert result == json.loads((folder / "run" / "result.json").read_text())
        assert result["hub_repository"] == "tester/run" and hub.commits["tester/run"][-1][0] in result["hub_commit"]
    assert "model.safetensors" in hub.commits["tester/run"][-1][1]


def publish(folder: Path, hub: FakeHub, name: str, *, private: bool = False) -> None:
    train.claim(name, folder, private=private)
    hub.commit(name, {path.name: path.read_bytes() for path in (folder / "tiny").iterdir()})


def test_a_policy_is_sent_without_the_place_of_its_reference(
    folder: Path, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    """As the recipe of sft and dpo gives it. Elsewhere its scores are those of the policy alone."""
    go(folder, method="dpo", beta=0.5)
    local = folder / "run" / "model"
    _, files = hub.commits["tester/run"][-1]
    assert files.keys() == {path.name for path in local.iterdir()}
    assert not any(str(folder).encode() in content for content in files.values())
    assert "relative to a frozen reference: the model that its training started" in files["README.md"].decode()
    caplog.clear()
    own = Scorer.from_pretrained(local).score(PROMPTS, RESPONSES)
    assert "is not found" not in caplog.text
    sent = Scorer.from_pretrained("tester/run").score(PROMPTS, RESPONSES)
    assert "the model that this one was trained from is not found, so the scores are beta log pi" in caplog.text
    (folder / "tiny").rename(folder / "gone")
    assert torch.equal(Scorer.from_pretrained(local).score(PROMPTS, RESPONSES), sent) and not torch.equal(own, sent)


@pytest.mark.slow
def test_a_model_that_needs_another_of_this_machine_is_not_sent(folder: Path, hub: FakeHub) -> None:
    """Nobody else could score with it, and its files would name a folder of this machine."""
    options: dict[str, Any] = {"method": "bt", "prefilled_thoughts": True}
    with pytest.raises(ConfigError, match=r"scores only together with .*/tiny, which is on this machine"):
        go(folder, **options)
    assert not hub.private
    go(folder, **options, push_to_hub=False)


def test_a_temperature_is_not_stored_in_the_cache(folder: Path, hub: FakeHub) -> None:
    """The remedy in the message works."""
    publish(folder, hub, "tester/open")
    argv = ["--calibrate", "--dataset_name", f"{folder}/pairs.jsonl", "--model_name_or_path"]
    with pytest.raises(ConfigError, match="hf download tester/open --local-dir DIR") as error:
        evaluate.main([*argv, "tester/open"])
    (command,) = re.findall("`(hf .*)`", str(error.value))
    fetched = hf(hub, folder, command.replace("DIR", f"{folder}/fetched"))
    assert fetched.returncode == 0, fetched.stderr
    evaluate.main([*argv, f"{folder}/fetched"])


@pytest.mark.parametrize("token", ["", "hf_of_another"])
def test_a_token_that_is_not_taken_is_said_before_the_run(
    folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "none"))
    with pytest.raises(ConfigError, match=r"(?s)--push_to_hub: .*Log in with `hf auth login`, or set") as error:
        go(folder)
    assert not (folder / "run" / "metrics.jsonl").exists() and not hub.private
    assert not token or token not in str(error.value)


def test_what_may_not_be_written_or_is_no_name_is_said_before_the_run(folder: Path, hub: FakeHub) -> None:
    for broken, name in (("/repos/create|/api/models", "somebody/theirs"), ("a path of none", "two words")):
        hub.broken = broken
        with pytest.raises(
            ConfigError, match=rf"(?s)the repository (tester/)?{name} cannot be created: .*--hub_model_id"
        ):
            go(folder, hub_model_id=name)
    assert not (folder / "run" / "metrics.jsonl").exists()


def test_a_repository_may_be_public(folder: Path, hub: FakeHub) -> None:
    train.claim("open", folder, private=False)
    assert hub.private == {"tester/open": False}


def test_no_token_is_needed_to_read_what_is_public_and_one_for_what_is_private(
    folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, private in (("tester/open", False), ("tester/closed", True)):
        publish(folder, hub, name, private=private)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "none"))
    assert len(Scorer.from_pretrained("tester/open").score(PROMPTS, RESPONSES)) == 2
    with pytest.raises(ModelError, match=r"(?s)tester/closed .*A private model needs a token"):
        Scorer.from_pretrained("tester/closed")
