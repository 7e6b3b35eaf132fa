"""GGUF files as models: read, trained, judged, saved as plain folders, or refused."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
pytest.importorskip("transformers", "5.18", reason="older ones read another end of turn than the file has")
from judging import RUBRIC
from tiny import tiny_pairs
from tiny_gguf import TOKENS, write_gguf
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dwrl_fast import Scorer, evaluate, log, train
from dwrl_fast.config import parse_evaluate, parse_train
from dwrl_fast.dialog.__main__ import ShowConfig
from dwrl_fast.dialog.__main__ import run as show
from dwrl_fast.errors import ConfigError, ModelError, UserError
from dwrl_fast.models import gguf
from dwrl_fast.models.model import load_generative, load_scalar
from dwrl_fast.models.pretrained import load_tokenizer
from dwrl_fast.options import parse
from dwrl_fast.training.dry_run import dry_run

IDS = torch.tensor([[1, 40, 50, 261, 2, 100, 7]])


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF file, and the model that must result from reading it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def same(lm: Any, expected: Any) -> bool:
    found = dict(lm.named_parameters())
    return all(torch.equal(found.pop(name), p) for name, p in expected.named_parameters()) and not found


def test_a_file_is_read_as_what_it_holds(read: tuple[Path, Any], caplog: pytest.LogCaptureFixture) -> None:
    path, expected = read
    with caplog.at_level(logging.INFO, "dwrl_fast"):
        lm = load_generative(str(path), None, 0).lm
        tokenizer = load_tokenizer(str(path))
    assert [record.getMessage() for record in caplog.records] == [f"{path}: weights dequantised to float32"]
    assert same(lm, expected) and {p.dtype for p in lm.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in lm.parameters())
    torch.testing.assert_close(lm(IDS).logits, expected(IDS).logits)
    ids = tokenizer.encode("<|im_start|>Yes 7<|im_end|>", add_special_tokens=False)
    assert [TOKENS[i] for i in ids] == ["<|im_start|>", "Yes", "Ġ", "7", "<|im_end|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.name_or_path) == ("<|im_end|>",) * 2 + (str(path),)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_what_is_saved_of_it_is_a_plain_folder(read: tuple[Path, Any], tmp_path: Path) -> None:
    path, expected = read
    load_generative(str(path), None, 0).lm.save_pretrained(tmp_path)
    load_tokenizer(str(path)).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text() + (tmp_path / "tokenizer_config.json").read_text()
    assert not re.search("quant|gguf", text)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), expected)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("Yes 7<|im_end|>") == load_tokenizer(str(path)).encode(
        "Yes 7<|im_end|>"
    )


def test_what_lies_beside_it_is_not_read(
    read: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers prefers a tokenizer.json in the same folder, and a file of the same name in the working folder."""
    path, expected = read
    other = tmp_path / "other"
    other.mkdir()
    tokenizer = load_tokenizer(str(path))
    tokenizer.add_tokens(["Yes 7"])
    tokenizer.save_pretrained(other)
    (other / "config.json").write_text("{}")
    shutil.copy(path, other / "tiny.gguf")
    (tmp_path / "cwd").mkdir()
    write_gguf(tmp_path / "cwd" / "tiny.gguf", seed=1)
    monkeypatch.chdir(tmp_path / "cwd")
    assert same(load_generative("../other/tiny.gguf", None, 0).lm, expected)
    assert load_tokenizer("../other/tiny.gguf").encode("Yes 7") == load_tokenizer(str(path)).encode("Yes 7")
    assert not same(load_generative("tiny.gguf", None, 0).lm, expected)


def test_a_scalar_head_is_drawn_on_it(read: tuple[Path, Any]) -> None:
    path, expected = read
    scalar = load_scalar(str(path), None, 0, 2, new_head=True).lm
    assert same(scalar.model, expected.model) and scalar.score.weight.shape == (1, 32)
    assert torch.equal(scalar.score.weight, load_scalar(str(path), None, 0, 2, new_head=True).lm.score.weight)


SMALL = ["--max_completion_length", "6", "--num_generations", "2", "--rollout_batch_size", "4", "--minibatch_size", "2"]


@pytest.mark.parametrize("more", [[], ["--use_peft"], ["--method", "bt"]], ids=["dwrl", "lora", "bt"])
def test_it_is_trained(read: tuple[Path, Any], tmp_path: Path, more: list[str]) -> None:
    path, _ = read
    tiny_pairs(tmp_path / "pairs.jsonl", 4)
    argv = ["--model_name_or_path", str(path), "--dataset_name", f"{tmp_path}/pairs.jsonl", "--max_steps", "2"]
    if "bt" not in more:
        argv += SMALL
    argv += ["--output_dir", f"{tmp_path}/run", "--learning_rate", "1e-2", *more]
    train.run(parse_train(argv), Console(quiet=True))
    folder = tmp_path / "run" / "model"
    auto = AutoModelForSequenceClassification if "bt" in more else AutoModelForCausalLM
    lm = auto.from_pretrained(folder)
    assert "quant" not in (folder / "config.json").read_text()
    assert not torch.equal(lm.model.layers[0].mlp.up_proj.weight, read[1].model.layers[0].mlp.up_proj.weight)
    score = Scorer.from_pretrained(folder, dtype="fp32").score(["1 2"], ["3"])
    if "--use_peft" in more:
        adapter = Scorer.from_pretrained(tmp_path / "run" / "adapter", dtype="fp32")
        assert torch.equal(adapter.score(["1 2"], ["3"]), score)
    assert torch.isfinite(score).all()


def test_it_judges_as_the_folder_that_is_saved_of_it(read: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = read
    plain = tmp_path / "plain"
    load_generative(str(path), None, 0).lm.save_pretrained(plain)
    load_tokenizer(str(path)).save_pretrained(plain)
    tiny_pairs(tmp_path / "pairs.jsonl", 2)
    (tmp_path / "rubric.yaml").write_text(RUBRIC)
    lines = []
    for model in (path, plain):
        argv = ["--method", "judge", "--model_name_or_path", str(model), "--dataset_name", f"{tmp_path}/pairs.jsonl"]
        argv += ["--template", f"{tmp_path}/rubric.yaml", "--max_completion_length", "5", "--output_dir"]
        evaluate.run(parse_evaluate([*argv, str(tmp_path / f"of {model.name}")]), Console(quiet=True))
        lines.append((tmp_path / f"of {model.name}" / "scores.jsonl").read_text())
    assert lines[0] == lines[1] and json.loads(lines[0].splitlines()[0])["thoughts"]
    scorer = Scorer.from_pretrained(path, method="judge", template=f"{tmp_path}/rubric.yaml", max_completion_length=5)
    assert scorer.method == "judge"
    with pytest.raises(ModelError, match=r"has no preference_model\.json.*--method judge"):
        Scorer.from_pretrained(path)


def test_another_file_in_its_place_is_another_model(read: tuple[Path, Any], tmp_path: Path) -> None:
    """An interrupted evaluation does not continue with the other file."""
    shutil.copy(read[0], tmp_path / "tiny.gguf")
    before = evaluate._files(str(tmp_path / "tiny.gguf"))
    assert before == evaluate._files(str(tmp_path / "tiny.gguf"))
    write_gguf(tmp_path / "tiny.gguf", seed=1)
    assert before != evaluate._files(str(tmp_path / "tiny.gguf"))


def test_it_is_shown_and_looked_at(read: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pairs(tmp_path / "pairs.jsonl", 4)
    model = ["--model_name_or_path", str(read[0])]
    console = Console(width=200)
    show(parse(ShowConfig, ["--show", f"{tmp_path}/pairs.jsonl:1", *model]), console)
    assert "<|im_start|>user" in capsys.readouterr().out
    dry_run(parse_train([*model, "--dataset_name", f"{tmp_path}/pairs.jsonl"]), console)
    told = capsys.readouterr().out
    parameters = sum(p.numel() for p in read[1].parameters())
    assert f"LlamaForCausalLM, {parameters:,} parameters" in told and f"tokenizer: {read[0]}" in told


def broken(read: tuple[Path, Any], folder: Path, how: str) -> Path:
    path = folder / "broken.gguf"
    whole = read[0].read_bytes()
    if how == "another architecture":
        write_gguf(path, architecture="nosuch")
    elif how != "missing":
        cut = {"no GGUF": b"{}" * 99, "empty": b"", "header cut": whole[:500], "data cut": whole[:-9000]}
        path.write_bytes(cut[how])
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "there is no file .*broken.gguf.*fetch it first"),
        ("no GGUF", "cannot be read as a GGUF file: .* It must be one whole GGUF file"),
        ("empty", "cannot be read as a GGUF file: .* It must be one whole GGUF file"),
        ("header cut", "cannot be read as a GGUF file: .* It must be one whole GGUF file"),
        ("data cut", "cannot load a .* It must be one whole GGUF file"),
        ("another architecture", r"It must be one whole.*folder or hub name(.|\n)*nosuch is not supported"),
    ],
)
def test_a_file_that_cannot_be_read(read: tuple[Path, Any], tmp_path: Path, how: str, message: str) -> None:
    path = str(broken(read, tmp_path, how))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(path)
    with pytest.raises(ModelError, match=message):
        load_generative(path, None, 0)
    with pytest.raises(UserError, match=message):
        tiny_pairs(tmp_path / "pairs.jsonl", 4)
        argv = ["--model_name_or_path", path, "--dataset_name", f"{tmp_path}/pairs.jsonl"]
        dry_run(parse_train(argv), Console(quiet=True))


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_is_missing(read: tuple[Path, Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for load in (load_tokenizer, lambda name: load_generative(name, None, 0)):
        with pytest.raises(ModelError, match=f"needs {package}; run `pip install {package}`"):
            load(str(read[0]))


def test_transformers_is_too_old(read: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import integrations

    monkeypatch.setattr(integrations, "gguf", object())
    with pytest.raises(ModelError, match=r"needs transformers>=5.18; run `pip install 'transformers>=5.18'`"):
        load_tokenizer(str(read[0]))


def test_it_is_not_quantised_a_second_time() -> None:
    with pytest.raises(ConfigError, match=r"x\.gguf is quantised already: leave the option out"):
        gguf.dequantising({"quantization_config": object()}, "x.gguf")


def test_a_rule_of_splitting_that_is_not_known_is_said(
    read: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log.warn_once.cache_clear()
    load_tokenizer(str(read[0]))
    for pre in ("qwen2", "smollm"):
        write_gguf(tmp_path / f"{pre}.gguf", pre=pre)
        load_tokenizer(str(tmp_path / f"{pre}.gguf"))
    assert not caplog.records
    write_gguf(tmp_path / "mine.gguf", pre="mine")
    load_tokenizer(str(tmp_path / "mine.gguf"))
    assert "splits text by the rule 'mine', which transformers does not know" in caplog.text
