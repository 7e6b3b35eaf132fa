"""The second embedded task: labels follow the counts at the right rate, and warm-up thoughts describe the texts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_embedded import SIZES, TINY

from dwrl_fast.data import Message
from dwrl_fast.dialog import Dialog, SingleTurn
from dwrl_fast.embedded import prepare
from dwrl_fast.embedded.arrays import IGNORED
from dwrl_fast.embedded.attributes import (
    ENOUGH,
    LABEL_NOISE,
    LENGTH,
    attribute_arrays,
    draw_pairs,
    draw_texts,
    value,
    write_split,
)
from dwrl_fast.embedded.task import Noise, prompts
from dwrl_fast.embedded.templates import TEMPLATES
from dwrl_fast.embedded.tokenizer import IDS, WORDS, make_tokenizer


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def counted(text: str) -> int:
    words = text.split()
    assert len(words) == LENGTH and set(words) <= {"ok", "bad", *"0123456"}
    return words.count("ok") - words.count("bad")


def rows_of(folder: Path, split: str, count: int) -> list[dict]:
    path = folder / f"{split}.jsonl"
    write_split(path, split, count, rng())
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("split", "noise"), [("train", LABEL_NOISE), ("dev", 0.0), ("test", 0.0)])
def test_labels_follow_the_counts(split: str, noise: float, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, split, 4000)
    gaps = [counted(row["chosen"][0]["content"]) - counted(row["rejected"][0]["content"]) for row in rows]
    assert len(rows) == 4000 and 0 not in gaps
    assert [gap < 0 for gap in gaps] == [row["kind"] == "flipped" for row in rows]
    assert np.mean([gap < 0 for gap in gaps]) == pytest.approx(noise, abs=0.015 * (noise > 0))


def test_splits_share_no_prompt(tmp_path: Path) -> None:
    found = [{row["prompt"][0]["content"] for row in rows_of(tmp_path, s, 2000)} for s in ("train", "dev", "test")]
    assert sum(map(len, found)) == len(set.union(*found)) > 2000


def test_the_first_text_is_chosen_as_often_as_the_second() -> None:
    chosen, rejected, _ = draw_pairs(4000, 0.0, rng())
    assert (value(chosen) > value(rejected)).all()
    assert np.abs(value(draw_texts(4000, rng())).mean()) < 0.1


def test_the_warm_up_asks_as_methods_do_and_counts() -> None:
    ids, targets = attribute_arrays(prompts("train"), 30, 0.3, Noise(), rng())
    tokenizer = make_tokenizer()
    assert not (ids == IDS["<|unk|>"]).any() and ((targets == ids) | (targets == IGNORED)).all()
    for index, (row, target) in enumerate(zip(ids, targets, strict=True)):
        words = [*WORDS, "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
        spelt = [words[i] for i in row]
        start = int((target != IGNORED).argmax())
        kind = ("dialog", "pointwise", "pairwise")[index % 3]
        opening = 1 if kind == "dialog" else 2
        prompt: list[Message] = [{"role": "user", "content": " ".join(spelt[opening : opening + 5])}]
        body = spelt[opening + 5 :]
        texts = {"dialog": [body[2 : 2 + LENGTH]], "pointwise": [body[:LENGTH]]}.get(
            kind, [body[1 : 1 + LENGTH], body[2 + LENGTH : 2 + 2 * LENGTH]]
        )
        responses = [" ".join(text) for text in texts]
        if kind == "dialog":
            context = Dialog(tokenizer, TEMPLATES[kind]).context(prompt, responses[0])
        else:
            context = SingleTurn(tokenizer, TEMPLATES[kind]).context(prompt, responses)
        assert context.ids == row[:start].tolist()
        wanted = [str(text.count(word)) for text in texts for word in ("ok", "bad")]
        assert spelt[start : start + len(wanted)] == wanted
        good = [text.count("ok") for text in texts]
        if kind == "pairwise" and good[0] != good[1]:
            assert spelt[start + 4] == f"<answer>[[{'AB'[good[0] < good[1]]}]]</answer>"
        elif kind == "dialog":
            assert spelt[start + 2] == ("ok" if good[0] >= ENOUGH else "bad") and row[-1] == IDS["<|pad|>"]


def test_noise_miscounts_as_often_as_it_says() -> None:
    _, clean = attribute_arrays(prompts("train"), 6000, 0.0, Noise(), rng())
    ids, noisy = attribute_arrays(prompts("train"), 6000, 0.0, Noise(step_error=0.4), rng())
    first = (noisy[::3] != IGNORED).argmax(1)
    rows = np.arange(len(first))
    said = ids[::3][rows, first] - IDS["0"]
    body = ids[::3, 8 : 8 + LENGTH]
    wrong = said != (body == IDS["ok"]).sum(1)
    zero = (body == IDS["ok"]).sum(1) == 0  # from which nothing can be taken
    assert wrong[~zero].mean() == pytest.approx(0.4, abs=0.04) and wrong[zero].mean() == pytest.approx(0.2, abs=0.08)
    assert (clean != IGNORED).sum() == (noisy != IGNORED).sum()


def test_prepare_makes_it(tmp_path: Path) -> None:
    made = prepare(tmp_path, 5, task="attributes", sizes=SIZES, plan=TINY)
    assert len(made.train.read_text().splitlines()) == SIZES.train and made.state == {}
    models = [load_file(made.model_for(kind) / "model.safetensors") for kind in TEMPLATES]
    assert all(torch.equal(one[name], models[0][name]) for one in models for name in models[0]), "one, for every kind"
