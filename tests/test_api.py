"""`dwrl_fast.Scorer`: its scores equal plain forward passes, do not depend on the batch, and bad input is refused."""

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeSampler
from judging import A, B, saved_model
from tiny import tiny_folder, tiny_pairs, tiny_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dwrl_fast
from dwrl_fast import evaluate
from dwrl_fast.batching.batch import Batch
from dwrl_fast.batching.layout import Layout
from dwrl_fast.embedded.tokenizer import IDS, make_tokenizer
from dwrl_fast.encode import Group
from dwrl_fast.errors import DataError, ModelError, UserError
from dwrl_fast.models.pretrained import CARD
from dwrl_fast.scoring.scorer import Scorer

PROMPTS = ["3 5 0", "3 5 0", "5 6 2 1", "3 5 0", "1", "5 6 2 1"]
RESPONSES = ["5", "2 7 1", "5", "8 8", "", "1 1 1 0 4"]


@pytest.fixture(scope="module")
def folder(module_folder: Path) -> Path:
    return module_folder


def scorer_of(folder: Path, name: str, **options: Any) -> Scorer:
    return Scorer.from_pretrained(saved_model(folder, name), dtype="fp32", **options)


def says(scorer: Scorer, said: Callable[[str, int], str]) -> None:
    """Replace the sampler by one that gives these thoughts."""
    runtime = scorer._judging.runtime
    object.__setattr__(runtime, "sampler", FakeSampler(runtime.dialog, said))


def user(text: str) -> Any:
    return ({"role": "user", "content": text},)


def alone(lm: Any, dialog: Any, prompt: str, response: str) -> tuple[float, list[int]]:
    """log p(Yes) after a greedy thought of at most 6 tokens, and that thought, by whole forward passes."""
    context = dialog.context(user(prompt), response)
    thought: list[int] = []
    while len(thought) < 6 and not (thought and thought[-1] in dialog.stop_ids):
        thought.append(int(lm(torch.tensor([[*context.ids, *thought]])).logits[0, -1].argmax()))
    ids = dialog.sequence(context, thought).ids
    return lm(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[IDS["Yes"]].item(), thought


@torch.no_grad()
def test_scores_are_log_p_yes_after_a_greedy_thought(folder: Path) -> None:
    scorer = dwrl_fast.Scorer.from_pretrained(str(folder / "tiny"), dtype="fp32")
    lm, dialog = AutoModelForCausalLM.from_pretrained(folder / "tiny"), scorer._judging.dialog
    found, thoughts = scorer.score(PROMPTS, RESPONSES, return_thoughts=True)
    expected = [alone(lm, dialog, *each) for each in zip(PROMPTS, RESPONSES, strict=True)]
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    torch.testing.assert_close(found, torch.tensor([score for score, _ in expected]), rtol=0, atol=1e-5)
    assert thoughts == [[dialog.tokenizer.decode(ids, skip_special_tokens=True)] for _, ids in expected]
    assert len({text for (text,) in thoughts}) > 1 and found.unique().numel() == len(found)
    torch.testing.assert_close(scorer.probability(PROMPTS, RESPONSES), found.exp())


@pytest.mark.parametrize("name", ["dwrl", "bt", "gram", "pairrm", "sft"])
@pytest.mark.parametrize("packing", ["tree", "packed", "padded"])
def test_a_score_does_not_depend_on_what_is_beside_it(folder: Path, name: str, packing: Any) -> None:
    references = ["7", "2", "0 0", "5", "4", "9"] if name in ("gram", "pairrm") else None

    def scored(scorer: Scorer, places: list[int]) -> Tensor:
        prompts, responses = [PROMPTS[i] for i in places], [RESPONSES[i] for i in places]
        return scorer.score(prompts, responses, reference=references and [references[i] for i in places])

    whole = scored(scorer_of(folder, name), list(range(6)))
    for budget in (16384, 60):
        scorer = scorer_of(folder, name, packing=packing, token_budget=budget, generation_batch_size=2)
        assert torch.allclose(torch.cat([scored(scorer, [i]) for i in range(6)]), whole, rtol=0, atol=1e-5)
        order = [3, 0, 5, 4, 2, 1, 3]
        assert torch.allclose(scored(scorer, order), whole[order], rtol=0, atol=1e-5)
    assert whole.unique().numel() == 6


def test_many_responses_of_a_prompt_take_several_passes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If scores need a separate pass: responses are grouped up to the budget, assuming the longest thoughts, because a
    larger group would be one pass anyway.
    """
    scorer = scorer_of(folder, "dwrl", token_budget=64)
    sizes: list[int] = []
    responses = [f"{i} {j}" for i in range(6) for j in range(4)]
    laid_out = Layout.laid_out

    def watched(layout: Layout, micro: Sequence[Sequence[Group]]) -> list[Batch]:
        found = laid_out(layout, micro)
        sizes.extend(batch.trunk_tokens for batch in found)
        return found

    with caplog.at_level(logging.WARNING, "dwrl_fast"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "laid_out", watched)
        patch.setattr("dwrl_fast.sampling.groups.RatingSampler", type(None))  # no sampler rates
        scorer.score(["3 5 0"] * len(responses), responses, votes=3)
    assert "exceeds" not in caplog.text and len(sizes) > 3 and max(sizes) <= 64


def test_votes_are_the_log_of_the_mean_of_p_yes(folder: Path) -> None:
    scorer = scorer_of(folder, "dwrl")
    row = tiny_rows(folder)[0]
    (group,) = scorer._judging.score_groups([row], votes=5, seed=3)
    prompt = row.prompt[0]["content"]
    found, thoughts = scorer.score([prompt] * 2, row.responses, 5, seed=3, return_thoughts=True)
    expected = [math.log(sum(map(math.exp, scores)) / 5) for scores in group.scores]
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and all(len(set(s)) > 1 for s in group.scores)
    assert [len(each) for each in thoughts] == [5, 5]
    assert scorer.score([prompt] * 2, row.responses, 5, seed=4).tolist() != found.tolist()


def test_prompts_as_messages(folder: Path) -> None:
    scorer = scorer_of(folder, "dwrl")
    several: Any = [*user("3 5 0"), {"role": "assistant", "content": "5"}, *user("1 1")]
    found = scorer.score(["3 5 0", list(user("3 5 0")), several], ["5", "5", "5"])
    assert found[0] == found[1] != found[2]


@torch.no_grad()
def test_a_scalar_head_gives_its_reward(folder: Path) -> None:
    scorer = scorer_of(folder, "bt")
    lm = AutoModelForSequenceClassification.from_pretrained(folder / "bt")
    dialog: Any = scorer._judging.dialog
    ids = [dialog.plain(user(p), r).ids for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    expected = torch.tensor([lm(torch.tensor([each])).logits.item() for each in ids])
    torch.testing.assert_close(scorer.score(PROMPTS, RESPONSES, votes=3), expected, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match=r"bt has no p\(Yes\): give reference="):
        scorer.probability(PROMPTS, RESPONSES)
    with pytest.raises(ModelError, match="bt writes no thoughts"):
        scorer.score(PROMPTS, RESPONSES, return_thoughts=True)


@torch.no_grad()
def test_a_method_that_compares_gives_log_odds(folder: Path) -> None:
    scorer = scorer_of(folder, "gram")
    lm = AutoModelForCausalLM.from_pretrained(folder / "gram")
    dialog: Any = scorer._judging.dialog
    references = ["7", "5", "0", "8 8", "2", "1"]
    expected = []
    for prompt, response, other in zip(PROMPTS, RESPONSES, references, strict=True):
        first = []
        for shown in ((response, other), (other, response)):
            ids = dialog.sequence(dialog.context(user(prompt), shown), []).ids
            first.append(lm(torch.tensor([ids])).logits[0, -1, [IDS["A"], IDS["B"]]].double().softmax(-1)[0].item())
        share = (first[0] + 1 - first[1]) / 2
        expected.append(math.log(share / (1 - share)))
    found = scorer.score(PROMPTS, RESPONSES, reference=references)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert scorer.probability(PROMPTS, RESPONSES, references)[1].item() == pytest.approx(
        1 / (1 + math.exp(-expected[1])), abs=1e-6
    )
    with pytest.raises(ModelError, match=r"gram only compares responses: give reference="):
        scorer.score(PROMPTS, RESPONSES)


@pytest.mark.parametrize("name", ["dwrl", "bt", "dpo", "grpo-pair"])
def test_threads_score_side_by_side(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight concurrent calls give the same scores, thoughts and tokens as sequential ones. No call waits for
    another.
    """
    scorer = scorer_of(folder, name)
    prompts = [[prompt] * 2 for prompt in ("3 5 0", "1", "5 6 2 1", "8", "7 7", "2 4 6 8", "9 1 1", "6")]
    answers = ["5", "2 7 1"]
    others: Any = {"reference": answers[::-1]} if scorer.compares else {}

    def score(prompt: list[str]) -> tuple[list[float], Any]:
        if not scorer.thinks:
            return scorer.score(prompt, answers, 3, seed=5, **others).tolist(), None
        scores, thoughts = scorer.score(prompt, answers, 3, return_thoughts=True, seed=5, **others)
        return scores.tolist(), thoughts

    expected = [score(prompt) for prompt in prompts]
    before, all_here = dict(scorer.tokens), threading.Barrier(8, timeout=60)
    judge = type(scorer._judging).score_groups

    def together(self: Any, *args: Any, **options: Any) -> Any:
        all_here.wait()  # would deadlock if calls waited for each other
        return judge(self, *args, **options)

    monkeypatch.setattr(type(scorer._judging), "score_groups", together)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(score, prompts))
    for (scores, thoughts), (wanted, written) in zip(found, expected, strict=True):
        assert scores == pytest.approx(wanted, abs=1e-5, nan_ok=True) and thoughts == written
    assert {key: count - before[key] for key, count in scorer.tokens.items()} == before


def test_a_policy_with_adapters_waits(folder: Path) -> None:
    """Scoring switches its adapters off and on, which a concurrent call would see."""
    plain, adapted_ = scorer_of(folder, "dpo"), scorer_of(folder, "dpo")
    assert not plain._judging.switches_model
    inside: list[int] = []
    judging = adapted_._judging
    judging.switches_model = True

    def counted(rows: Any, **options: Any) -> list[Any]:
        inside.append(1)
        time.sleep(0.05)
        assert sum(inside) == 1
        inside.pop()
        return []

    judging.score_groups = counted  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: adapted_.score_groups([]), range(4))) == [[]] * 4


@pytest.mark.parametrize(
    ("first", "second", "log_odds"),
    [
        ("A A A", "B B B", math.inf),
        ("A A B", "B A A", 0.0),  # 3 of 6
        ("A A ok", "B B A", math.log(4)),  # unreadable verdicts count for neither: 4 to 1
        ("ok ok ok", "ok ok ok", math.nan),
    ],
)
def test_verdicts_in_text(folder: Path, first: str, second: str, log_odds: float) -> None:
    scorer = scorer_of(folder, "judge")
    written = {"A": A, "B": B, "ok": "ok"}
    orders = [[written[word] for word in order.split()] for order in (first, second)]
    says(scorer, lambda text, i: orders["A 2" in text][i])
    found, thoughts = scorer.score(["3 5 0"], ["5"], 3, reference=["2"], return_thoughts=True)
    assert found.tolist() == pytest.approx([log_odds], nan_ok=True) and thoughts == [orders[0] + orders[1]]


def test_numbers_in_text(folder: Path) -> None:
    scorer = scorer_of(folder, "grpo-point")
    says(scorer, lambda text, i: "ok" if "7" in text else f"<s> {i + 3} </s>")
    assert scorer.score(["3 5 0"] * 2, ["5", "7"], 3).tolist() == pytest.approx([4.0, math.nan], nan_ok=True)
    assert scorer.rank("3 5 0", ["7", "5", "1"]) == [1, 2, 0]


@pytest.mark.parametrize("name", ["dwrl", "bt", "gram", "pairrm", "dpo"])
def test_ranks_and_comparisons_follow_the_scores(folder: Path, name: str) -> None:
    scorer = scorer_of(folder, name)
    responses = ["5", "2 7 1", "8 8", "0"]
    order = scorer.rank("3 5 0", responses)
    if not scorer.compares:
        scores = scorer.score(["3 5 0"] * 4, responses)
        assert scores[order].tolist() == sorted(scores.tolist(), reverse=True)
        gap = (scores[0] - scores[1]).item()
        assert scorer.compare("3 5 0", *responses[:2]) == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-5)
    else:
        wins = [sum(scorer.compare("3 5 0", a, b) for b in responses if b != a) for a in responses]
        assert order == sorted(range(4), key=lambda i: -wins[i])
    a, b = scorer.compare("3 5 0", *responses[:2]), scorer.compare("3 5 0", *responses[1::-1])
    assert a + b == pytest.approx(1, abs=1e-5) and scorer.rank("3 5 0", ["5"]) == [0]
    assert scorer.rank("3 5 0", ["5", "5"]) == [0, 1]


def test_the_stored_temperature_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_folder(tmp_path / "tiny")
    plain = Scorer.from_pretrained(path, dtype="fp32").compare("3 5 0", "5", "2 7 1")
    card = json.loads((path / CARD).read_text())
    (path / CARD).write_text(json.dumps(card | {"calibration": {"temperature": 2.5, "votes": 1}}))
    scorer = Scorer.from_pretrained(path, dtype="fp32")
    odds = math.log(plain / (1 - plain)) / 2.5
    assert scorer.compare("3 5 0", "5", "2 7 1") == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-5)
    assert abs(plain - scorer.compare("3 5 0", "5", "2 7 1")) > 1e-2
    with caplog.at_level(logging.WARNING, "dwrl_fast"):
        scorer.compare("3 5 0", "5", "2 7 1", votes=2)
    assert "fitted to scores of 1 thoughts, but these scores are of 2" in caplog.text
    assert "scores about" not in caplog.text
    calibration = {"temperature": 2.5, "aspect": "honesty"}
    (path / CARD).write_text(json.dumps(card | {"calibration": calibration}))
    with caplog.at_level(logging.WARNING, "dwrl_fast"):
        Scorer.from_pretrained(path, dtype="fp32").compare("3 5 0", "5", "2 7 1")
    assert "fitted to scores about honesty, but these scores are about correctness" in caplog.text


def test_what_evaluate_calibrates_is_what_is_used(tmp_path: Path) -> None:
    path, pairs = tiny_folder(tmp_path / "tiny", seed=3), tiny_pairs(tmp_path / "pairs.jsonl", 40)
    turned = {"chosen": "rejected", "rejected": "chosen"}  # the random model is wrong more often than right
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    pairs.write_text("".join(json.dumps({turned.get(k, k): v for k, v in row.items()}) + "\n" for row in rows))
    evaluate.main(["--model_name_or_path", str(path), "--dataset_name", str(pairs), "--calibrate"])
    stored = json.loads((path / CARD).read_text())["calibration"]
    temperature = stored["temperature"]
    assert stored["aspect"] == "correctness"
    scorer = Scorer.from_pretrained(path, dtype="fp32")
    a, b = scorer.score(["3 5 0"] * 2, ["5", "2 7 1"]).tolist()
    assert scorer.compare("3 5 0", "5", "2 7 1") == pytest.approx(1 / (1 + math.exp((b - a) / temperature)), abs=1e-5)
    assert temperature != 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.score(["1"], ["2", "3"]), "1 prompts and 2 responses"),
        (lambda s: s.score([], []), "prompts is empty"),
        (lambda s: s.score("1", ["2"]), "prompts should be a list.*not a str"),
        (lambda s: s.score(["1"], "2"), "responses should be a list.*not a str"),
        (
            lambda s: s.score(["1", "2"], ["2", None]),
            r"responses\[1\] should be a string or a list with one assistant turn, not the NoneType",
        ),
        (lambda s: s.score(["1", 7], ["2", "3"]), r"prompts\[1\].*not the int 7"),
        (lambda s: s.score(["1", ""], ["2", "3"]), r"prompts\[1\]: empty prompt"),
        (lambda s: s.score([[{"role": "user"}]], ["2"]), r"prompts\[0\].*messages with 'role' and 'content'"),
        (lambda s: s.score([[*user("1"), *user("2")]], ["2"]), r"prompts\[0\]: consecutive turns of one role"),
        (lambda s: s.score(["1"], ["\ud800"]), r"responses\[0\]: a lone surrogate"),
        (lambda s: s.score(["1"], ["2"], reference=["1", "2"]), "reference has 2 texts for 1 responses"),
        (lambda s: s.score(["1"], ["2"], 0), "votes = 0: must be at least 1"),
        (lambda s: s.rank("1", []), "responses is empty"),
        (lambda s: s.score([[{"role": "system", "content": "1"}, *user("1")]], ["2"]), "only user and assistant"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, call: Callable[[Scorer], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(scorer_of(folder, "dwrl"))


def test_a_folder_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "tiny").save_pretrained(tmp_path / "plain")
    for path in (tmp_path / "plain", tmp_path / "nowhere", folder / "pairs.jsonl"):
        with pytest.raises(ModelError, match=rf"{path.name} has no preference_model.json"):
            Scorer.from_pretrained(path)


def reward(scorer: Scorer, options: dict[str, Any], **columns: Any) -> list[float | None]:
    return asyncio.run(scorer.as_reward_function(**options)(completion_ids=[[1]], trainer_state=None, **columns))


def test_rewards_for_trl(folder: Path) -> None:
    scorer = scorer_of(folder, "dwrl")
    scores = scorer.score(PROMPTS, RESPONSES).tolist()
    assert reward(scorer, {}, prompts=PROMPTS, completions=RESPONSES) == scores
    turns = [[{"role": "assistant", "content": text}] for text in RESPONSES]
    chats = [list(user(prompt)) for prompt in PROMPTS]
    assert reward(scorer, {}, prompts=chats, completions=turns) == scores
    called = [
        *turns[:2],
        [{"role": "assistant", "content": "", "tool_calls": [{}]}],
        [*turns[3], *turns[3]],
        *turns[4:],
    ]
    found = reward(scorer, {"probability": True}, prompts=chats, completions=called)
    assert found[2] is found[3] is None
    assert [found[i] for i in (0, 1, 4, 5)] == pytest.approx([math.exp(scores[i]) for i in (0, 1, 4, 5)])
    assert reward(scorer, {}, prompts=chats[:1], completions=called[2:3]) == [None]


def test_rewards_of_a_method_that_compares(folder: Path) -> None:
    scorer = scorer_of(folder, "judge")
    says(scorer, lambda text, i: A if "A 5" in text else B if "B 5" in text else "ok")
    asked: dict[str, Any] = {"prompts": ["1", "1"], "completions": ["5", "4"]}
    with pytest.raises(DataError, match="no column 'reference'"):
        reward(scorer, {}, **asked)
    with pytest.raises(ModelError, match=r"infinite log-odds where all agree.*probability=True"):
        reward(scorer, {"reference": "answer"}, answer=["2", "3"], **asked)
    assert reward(scorer, {"probability": True}, reference=["2", "3"], **asked) == [1.0, None]
    some: Any = [[], [{"role": "assistant", "content": "4"}]]
    found = reward(scorer, {"probability": True}, reference=["2", "5"], prompts=["1", "1"], completions=some)
    assert found == [None, 0.0], "what a completion is compared with stands at its own place"


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_a_step_of_trls_grpo_trainer(folder: Path, tmp_path: Path, chat: bool) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    scorer = scorer_of(folder, "dwrl")
    seen: list[Any] = []
    inner = scorer.as_reward_function()

    async def watched(**columns: Any) -> list[float | None]:
        found = await inner(**columns)
        seen.extend(found)
        expected = scorer.score(columns["prompts"], [c[0]["content"] if chat else c for c in columns["completions"]])
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
        return found

    prompts = [list(user("3 5 0")) if chat else "3 5 0" for _ in range(4)]
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "tiny"),
        processing_class=make_tokenizer(),
        reward_funcs=watched,
        train_dataset=Dataset.from_list([{"prompt": prompt, "other": i} for i, prompt in enumerate(prompts)]),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 4 and all(isinstance(value, float) for value in seen)
    assert [row["reward"] for row in trainer.state.log_history if "reward" in row] == pytest.approx([sum(seen) / 4])


@pytest.mark.parametrize("name", ["dwrl", "bt"])
def test_weights_are_cast_once(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear layers of a judge in bfloat16 are in bfloat16, which gives what autocast of every pass gives."""
    model = saved_model(folder, name)
    once = Scorer.from_pretrained(model, dtype="bf16")
    weights = dict(once._judging.runtime.model.lm.base_model.named_parameters())
    dtypes = {path: weight.dtype for path, weight in weights.items() if "_proj." in path}
    assert len(dtypes) == 14 and set(dtypes.values()) == {torch.bfloat16}
    monkeypatch.setattr("dwrl_fast.scoring.runtime.cast_once", lambda *_: None)
    assert torch.equal(
        once.score(PROMPTS, RESPONSES), Scorer.from_pretrained(model, dtype="bf16").score(PROMPTS, RESPONSES)
    )
