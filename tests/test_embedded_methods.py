"""Every method has a recipe for the embedded task, and trains from the same warmed-up model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held_out import share_won
from rich.console import Console
from test_embedded import SIZES, TINY

from dwrl_fast import Scorer, embedded, train
from dwrl_fast.data import Message
from dwrl_fast.dialog import SingleTurn
from dwrl_fast.embedded.arrays import pairwise, pointwise
from dwrl_fast.embedded.task import Claims, Noise, draw_claims, draw_thoughts, prompts
from dwrl_fast.embedded.templates import RATIONALIZER, TEMPLATES
from dwrl_fast.embedded.tokenizer import IDS, make_tokenizer
from dwrl_fast.errors import ConfigError
from dwrl_fast.methods import METHODS
from dwrl_fast.models.pretrained import load_card
from dwrl_fast.progress import Display
from dwrl_fast.templates import load_template

TRAINED = [name for name, method in METHODS.items() if method.trains]
CASES = {name: ["--method", name] for name in TRAINED} | {"bt, prefilled": ["--method", "bt", "--prefilled_thoughts"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> embedded.Embedded:
    return embedded.prepare(tmp_path_factory.mktemp("embedded"), 3, sizes=SIZES, plan=TINY)


def test_one_model_in_a_folder_for_each_kind(made: embedded.Embedded) -> None:
    folders = [made.model_for(kind) for kind in TEMPLATES]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    assert [load_card(folder)["dialog"]["template"]["kind"] for folder in folders] == list(TEMPLATES)
    assert embedded.Embedded.read(made.model.parent).model_for("direct") == made.model_for("direct")


def test_templates_ask_as_the_warm_up_does() -> None:
    rng = np.random.default_rng(0)
    right, wrong = draw_claims(prompts("train"), 4, 0.5, rng)
    rows = {
        "pairwise": pairwise(right, wrong, Noise(), rng)[0],
        "pointwise": pointwise(right, draw_thoughts(right, Noise(), rng), rng)[0],
    }
    rows["direct"] = rows["pairwise"]  # the label stands where a thought begins
    for kind, ids in rows.items():
        dialog = SingleTurn(make_tokenizer(), TEMPLATES[kind], "correctness")
        for row, digits, first, second in zip(ids, right.digits, right.claim, wrong.claim, strict=True):
            claims = [str(first), str(second)][: len(dialog.shows)]
            context = dialog.context([{"role": "user", "content": " ".join(map(str, digits))}], claims)
            assert context.ids == row[: len(context.ids)].tolist()
            assert row[len(context.ids)] == IDS["0"] + digits[0]


def test_a_rationalizer_is_the_pairwise_question_with_its_answer() -> None:
    dialog = SingleTurn(make_tokenizer(), load_template(str(RATIONALIZER)), "correctness")
    plain = SingleTurn(make_tokenizer(), TEMPLATES["pairwise"], "correctness")
    prompt: list[Message] = [{"role": "user", "content": "1 2 3 4 5"}]
    told, untold = dialog.context(prompt, ["1", "2"], verdict="B").ids, plain.context(prompt, ["1", "2"]).ids
    assert told == [untold[0], IDS["<|unk|>"], IDS["<answer>[[B]]</answer>"], *untold[1:]]


def share_right(noise: Noise, easy_fraction: float) -> float:
    """The accuracy of pairwise verdicts with the errors of `noise` and random order of responses."""
    rng = np.random.default_rng(0)
    right, wrong = draw_claims(prompts("train"), 20000, easy_fraction, rng)
    a_is_right = rng.random(20000) < 0.5
    a = Claims(right.digits, np.where(a_is_right, right.claim, wrong.claim))
    b = Claims(right.digits, np.where(a_is_right, wrong.claim, right.claim))
    says_a = (pairwise(a, b, noise, rng)[0] == IDS["<answer>[[A]]</answer>"]).any(1)
    return (says_a == a_is_right).mean()


@pytest.mark.parametrize(("easy_fraction", "agrees", "adds"), [(0.0, 0.50, 0.71), (0.4, 0.65, 0.73), (0.7, 0.77, 0.74)])
def test_what_a_reward_for_verdicts_pays(easy_fraction: float, agrees: float, adds: float) -> None:
    """With many easy pairs, agreeing with any possible claim is rewarded more than adding with the warm-up's errors;
    docs/embedded.md describes the effect on GRPO.
    """
    assert share_right(Noise(step_error=0.2, sycophancy=1.0), easy_fraction) == pytest.approx(agrees, abs=0.01)
    assert share_right(Noise(step_error=0.2), easy_fraction) == pytest.approx(adds, abs=0.01)


@pytest.mark.parametrize("case", CASES)
def test_every_method_takes_two_steps(case: str, made: embedded.Embedded, tmp_path: Path) -> None:
    config = train.configure([*CASES[case], "--max_steps", "2", "--eval_votes", "0", "--output_dir", str(tmp_path)])
    assert config.learning_rate > 1e-6 or config.score_learning_rate  # the recipe's, not the default
    config = replace(train.on_embedded(config, made), rollout_batch_size=16, minibatch_size=8)
    result = train.train(config, tmp_path, Display(Console(quiet=True)), saved=config)
    assert result["steps"] == 2
    assert result["accuracy_after"] == share_won(tmp_path / "model", made.test)
    scorer = Scorer.from_pretrained(tmp_path / "model", dtype="fp32")
    kind = METHODS[config.method].template
    assert scorer.dialog.template == TEMPLATES[kind]  # kept through training and in the card


def test_what_the_embedded_task_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="only evaluates"):
        train.configure(["--method", "judge"])
    monkeypatch.setattr(embedded, "recipe", lambda method: Path("nowhere"))
    with pytest.raises(ConfigError, match="no recipe for --method gram"):
        train.configure(["--method", "gram"])


@pytest.mark.parametrize("method", ["btpo", "dwrl"])
def test_one_update_has_one_learning_rate(method: str) -> None:
    config = train.configure(["--method", method, "--alternate", "joint"])
    assert config.score_learning_rate is None and config.optimizer_state == "shared" and config.learning_rate > 1e-5


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> dict[float, embedded.Embedded]:
    folder = tmp_path_factory.mktemp("warm")
    return {easy: embedded.prepare(folder / str(easy), 0, easy_fraction=easy) for easy in (0.0, 0.7)}


def trained(method: str, made: embedded.Embedded, folder: Path) -> dict[str, Any]:
    config = replace(train.on_embedded(train.configure(["--method", method]), made), eval_votes=0)
    return train.train(config, folder, Display(Console(quiet=True)), saved=config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "easy_fraction"),
    [("dwrl", 0.7), ("btpo", 0.7), ("grpo-pair", 0.0), ("grpo-point", 0.0), ("star-sft", 0.0), ("star-dpo", 0.0)],
)
def test_methods_that_think_learn(
    method: str, easy_fraction: float, warm: dict[float, embedded.Embedded], tmp_path: Path
) -> None:
    result = trained(method, warm[easy_fraction], tmp_path)
    assert result["report_after"]["low"] > result["report_before"]["high"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bt", "gram", "genrm", "pairrm"])
def test_methods_that_do_not_think_tell_easy_pairs_alone(
    method: str, warm: dict[float, embedded.Embedded], tmp_path: Path
) -> None:
    """All held-out pairs are hard. 0.7 of the training pairs are easy: these plus chance for the others give 0.85."""
    after = trained(method, warm[0.7], tmp_path)["report_after"]
    assert after["low"] < 0.56 and after["high"] > 0.44
