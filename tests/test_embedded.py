"""The embedded task generates what it describes, and the same seed gives the same model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.embedded import EVALUATE, RATE, Sizes, Warmup, prepare
from dwrl_fast.embedded.arrays import FORMATS, IGNORED, dialog, warmup_arrays
from dwrl_fast.embedded.task import DIGITS, MODULUS, Claims, Noise, draw_claims, draw_thoughts, prompts
from dwrl_fast.embedded.tokenizer import CONTROL, IDS, make_tokenizer
from dwrl_fast.embedded.warmup import WarmupStage, draw_model, sample_thoughts

NOISY = Noise(step_error=0.2, sycophancy=0.4, flip=0.1, lazy=0.3)
TINY = Warmup(
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=32,
    batch_size=24,
    stages=(
        WarmupStage("clean", 30, 1e-2, Noise(), warmup_steps=5),
        WarmupStage("noisy", 10, 1e-3, NOISY, warmup_steps=5),
    ),
)
SIZES = Sizes(train=64, dev=16, test=16)


CAREFUL = 0.8 ** (DIGITS - 1) * (1 - 1 / MODULUS) + 1 / MODULUS  # no slip at all, or right by luck: a slip draws afresh


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_splits_share_no_prompt_and_miss_none() -> None:
    splits = [{tuple(row) for row in prompts(split)} for split in ("train", "dev", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == MODULUS**DIGITS
    assert min(map(len, splits)) > 1500


@pytest.mark.parametrize("easy_fraction", [0.0, 0.7, 1.0])
def test_claims_are_right_and_wrong(easy_fraction: float) -> None:
    right, wrong = draw_claims(prompts("train"), 4000, easy_fraction, rng())
    assert (right.claim == right.digits.sum(1) % MODULUS).all()
    assert (wrong.claim != right.claim).all() and (right.digits == wrong.digits).all()
    assert wrong.easy.mean() == pytest.approx(easy_fraction, abs=0.03)
    assert set(wrong.claim[~wrong.easy]) <= set(range(MODULUS)) and set(wrong.claim[wrong.easy]) <= {7, 8, 9}


def test_every_prompt_is_drawn_before_any_is_drawn_again() -> None:
    pool = prompts("dev")
    right, _ = draw_claims(pool, 2 * len(pool), 0.0, rng())
    assert len({tuple(row) for row in right.digits[: len(pool)]}) == len(pool)


def test_a_clean_thought_adds_and_says_what_is_so() -> None:
    claims = Claims(np.array([[3, 1, 4, 5, 0], [3, 1, 4, 5, 0]]), np.array([6, 2]))
    thoughts = draw_thoughts(claims, Noise(), rng())
    assert thoughts.steps.tolist() == [[3, 1, 4, 4, 1, 5, 6, 0, 6]] * 2
    assert thoughts.ok.tolist() == thoughts.yes.tolist() == [True, False]


@pytest.mark.parametrize(
    ("noise", "chosen", "rejected"),
    [
        (Noise(step_error=0.2), CAREFUL, CAREFUL),
        (Noise(sycophancy=0.4), 1.0, 0.6),
        (NOISY, 0.4 + 0.6 * CAREFUL, 0.6 * CAREFUL),
    ],
)
def test_noise_harms_as_often_as_it_says(noise: Noise, chosen: float, rejected: float) -> None:
    right, wrong = draw_claims(prompts("train"), 12000, 0.0, rng())
    for claims, expected in ((right, chosen), (wrong, rejected)):
        correct = (draw_thoughts(claims, noise, rng(1)).steps[:, -1] == claims.truth).mean()
        assert correct == pytest.approx(expected, abs=0.02)


def test_flips_and_lazy_verdicts_spare_easy_claims() -> None:
    _, wrong = draw_claims(prompts("train"), 12000, 0.5, rng())
    thoughts = draw_thoughts(wrong, NOISY, rng(1))
    assert not thoughts.ok[wrong.easy].any() and not thoughts.yes[wrong.easy].any()
    hard_and_bad = ~wrong.easy & ~thoughts.ok
    assert thoughts.yes[hard_and_bad].mean() == pytest.approx(NOISY.lazy, abs=0.03)
    assert (thoughts.ok & ~thoughts.yes).sum() == 0


def test_warm_up_rows_are_the_chat_templates_own() -> None:
    tokenizer = make_tokenizer()
    right, _ = draw_claims(prompts("train"), 5, 0.0, rng())
    ids, targets = dialog(right, draw_thoughts(right, NOISY, rng(1)))
    for row, target, digits, claim in zip(ids, targets, right.digits, right.claim, strict=True):
        thought, verdict = tokenizer.decode(row[14:25]), tokenizer.decode(row[-1:])
        turns = [" ".join(map(str, digits)), str(claim), EVALUATE, thought, RATE]
        messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(turns)]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + verdict
        assert tokenizer(rendered, add_special_tokens=False).input_ids == row.tolist()
        assert (target != IGNORED).nonzero()[0].tolist() == [*range(14, 26), len(row) - 1]


def test_warm_up_rows_are_what_is_sampled_and_scored() -> None:
    judge = Dialog(make_tokenizer(), Template(EVALUATE, RATE))
    right, _ = draw_claims(prompts("train"), 5, 0.0, rng())
    ids, _ = dialog(right, draw_thoughts(right, NOISY, rng(1)))
    for row, digits, claim in zip(ids, right.digits, right.claim, strict=True):
        context = judge.context([{"role": "user", "content": " ".join(map(str, digits))}], str(claim))
        assert context.ids == row[:14].tolist()
        assert judge.sequence(context, row[14:26].tolist()).ids == row[:-1].tolist()
    assert not judge.counts


def test_formats_come_in_equal_shares_without_unknown_words() -> None:
    ids, targets = warmup_arrays(prompts("train"), 600, 0.3, NOISY, rng())
    openers = [(ids[:, 1] == IDS[word]).sum() for word in ("score", "compare")]
    assert openers == [600 // FORMATS] * 2
    assert not (ids == IDS["<|unk|>"]).any()
    trained = targets != IGNORED
    assert (targets[trained] == ids[trained]).all() and not (ids[trained] == IDS["<|pad|>"]).any()
    answers = np.isin(ids, [IDS["<answer>[[A]]</answer>"], IDS["<answer>[[B]]</answer>"]])
    assert answers.any(1).sum() == 200


def test_tokenizer_survives_saving_and_spelt_control_tokens(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids(list(IDS)) == list(IDS.values()) == list(range(len(tokenizer)))
    assert set(CONTROL) <= set(tokenizer.all_special_tokens)
    for word in CONTROL:
        assert tokenizer(f"3 {word} 4", split_special_tokens=True).input_ids == [IDS["3"], IDS["<|unk|>"], IDS["4"]]
    with pytest.raises(Exception, match="only user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "3"}], tokenize=False)


def test_prepare_is_reproducible_and_loads(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(stage: str, done: int, total: int, info: dict[str, float]) -> None:
        seen.append((stage, done, total))

    same = [prepare(tmp_path / name, 5, sizes=SIZES, plan=TINY, progress=watch) for name in ("a", "b")]
    other = prepare(tmp_path / "c", 6, sizes=SIZES, plan=TINY)
    weights = [(made.model / "model.safetensors").read_bytes() for made in (*same, other)]
    assert weights[0] == weights[1] != weights[2]
    for split in ("train", "dev", "test"):
        texts = [getattr(made, split).read_text() for made in (*same, other)]
        assert texts[0] == texts[1] != texts[2]
    assert same[0].state == same[1].state
    assert len(seen) == 2 * 40 and seen[29] == ("clean", 30, 30) and seen[39] == ("noisy", 10, 10)

    model = AutoModelForCausalLM.from_pretrained(same[0].model)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(same[0].model))
    rows = [json.loads(line) for line in same[0].train.read_text().splitlines()]
    assert len(rows) == SIZES.train
    assert {row["kind"] for row in rows} == {"easy", "hard"}
    assert all(json.loads(line)["kind"] == "hard" for line in same[0].test.read_text().splitlines())
    for row in rows:
        digits = [int(word) for word in row["prompt"][0]["content"].split()]
        assert int(row["chosen"][0]["content"]) == sum(digits) % MODULUS != int(row["rejected"][0]["content"])
        assert (int(row["rejected"][0]["content"]) >= MODULUS) == (row["kind"] == "easy")


def test_warm_up_lowers_the_loss(tmp_path: Path) -> None:
    losses: list[float] = []
    plan = replace(TINY, stages=TINY.stages[:1])
    prepare(tmp_path, 0, sizes=SIZES, plan=plan, progress=lambda stage, done, total, info: losses.append(info["loss"]))
    assert losses[-1] < 0.75 * losses[0]


def test_cached_sampling_draws_what_a_full_forward_would() -> None:
    model = draw_model(replace(TINY, layers=2), seed=1).eval()
    right, _ = draw_claims(prompts("dev"), 200, 0.0, rng())
    drawn = sample_thoughts(model, right, torch.Generator().manual_seed(0))
    ids, _ = dialog(right, draw_thoughts(right, Noise(), rng()))
    generator, row = torch.Generator().manual_seed(0), torch.from_numpy(ids[:, :14])
    for step in range(drawn.shape[1]):
        with torch.no_grad():
            probabilities = model(input_ids=row, use_cache=False).logits[:, -1].softmax(-1)
        row = torch.cat([row, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        assert (row[:, -1] == drawn[:, step]).float().mean() > 0.97, step
        row[:, -1] = drawn[:, step]
