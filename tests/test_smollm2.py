"""SmolLM2-135M-Instruct, a pretrained model: results equal those of transformers, and it trains.

The oracle is transformers' unchanged model on one sequence at a time, with its own attention and head. `make smollm2`
creates the folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from conversations import PAIRS
from fakes import FakePolicy
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from dwrl_fast import Scorer, train
from dwrl_fast.batching.batch import Batch
from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.dialog import Dialog
from dwrl_fast.encode import Group
from dwrl_fast.scoring import Runtime
from dwrl_fast.training.trainer import Trainer

pytestmark = pytest.mark.slow
THOUGHTS = ("It answers what was asked, and says no more.", "That is of no use:\n1. wrong 2. rude")
NEAR_TIE = 1e-3  # in logits: below this difference, the order of the sums decides which token is the best


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = ROOT / "models" / "smollm2"
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not in models/smollm2 (make smollm2)")
    return folder


@pytest.fixture(scope="module")
def runtime(smollm2: Path) -> Runtime:
    config = TrainConfig(model_name_or_path=str(smollm2), dataset_name="", dtype="fp32", token_budget=1024)
    return FakePolicy(config).runtime


@pytest.fixture(scope="module")
def lm(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2)


def groups_of(pairs: list[Preference], dialog: Dialog) -> list[Group]:
    """Every response with a given thought. The first response's thought ends its turn; the other one is truncated."""
    first, second = (dialog.tokenizer.encode(text, add_special_tokens=False) for text in THOUGHTS)
    thoughts = [[*first, dialog.end_id], second]
    return [
        Group(
            pair,
            [
                [dialog.sequence(dialog.context(pair.prompt, response), ids)]
                for response, ids in zip(pair.responses, thoughts, strict=True)
            ],
        )
        for pair in pairs
    ]


def computed(runtime: Runtime, groups: list[Group], packing: Any = "tree") -> tuple[Tensor, Tensor]:
    """Our log-probs of all tokens of the thoughts, and our scores, in the order of `groups`."""
    packed = dataclasses.replace(runtime, layout=dataclasses.replace(runtime.layout, packing=packing))

    def read(batch: Batch) -> list[list[list[float]]]:
        return batch.by_sequence(runtime.model(batch, tokens=False).scores(runtime.dialog.label_ids, "vocab").tolist())

    logprobs, scores = packed.logprobs(groups), packed.run_batches(groups, read)
    return (
        torch.tensor([p for group in logprobs for each in group for one in each for p in one]),
        torch.tensor([s for group in scores for each in group for s in each]),
    )


@torch.no_grad()
def expected(lm: Any, groups: list[Group], yes_id: int) -> tuple[Tensor, Tensor]:
    """The same values from transformers, one sequence at a time."""
    logprobs, scores = [], []
    for sequence in [sequence for group in groups for sequence in group.flat]:
        ids, thought = torch.tensor([sequence.ids]), sequence.thought
        logprob = lm(ids).logits[0].float().log_softmax(-1)
        logprobs.append(logprob[thought.start - 1 : thought.stop - 1].gather(1, ids[0, thought, None])[:, 0])
        scores.append(logprob[-1, yes_id])
    return torch.cat(logprobs), torch.stack(scores)


def test_logprobs_and_scores_are_those_of_transformers(runtime: Runtime, lm: Any) -> None:
    agree(runtime, lm, PAIRS)


def test_so_they_are_on_what_people_wrote(runtime: Runtime, lm: Any, shared: Path) -> None:
    rows = read_preferences(shared / "hh" / "hh_test.jsonl.gz").rows
    sizes = [sum(len(turn["content"]) for turn in row.prompt) + sum(map(len, row.responses)) for row in rows]
    agree(runtime, lm, [row for row, size in zip(rows, sizes, strict=True) if size < 500][:10])


def agree(runtime: Runtime, lm: Any, pairs: list[Preference]) -> None:
    """Check that both agree on twenty conversations."""
    groups = groups_of(pairs, runtime.dialog)
    like = expected(lm, groups, runtime.dialog.yes_id)
    assert len(like[1]) == 20 and like[1].std() > 0.1
    trees = computed(runtime, groups)
    for found, right in zip(trees, like, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-4)
    for found, right in zip(computed(runtime, groups, "padded"), trees, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-4)


def test_greedy_thoughts_are_those_of_generate(runtime: Runtime, lm: Any) -> None:
    """They are equal token for token up to a near tie. Near ties are rare."""
    dialog, length = runtime.dialog, 16
    contexts = [dialog.context(pair.prompt, pair.responses[0]).ids for pair in PAIRS]
    assert runtime.sampler is not None
    sampled = runtime.sampler.sample(contexts, 1, max_tokens=length, temperature=0.0, seed=0)
    compared = 0
    for context, (thought,) in zip(contexts, sampled, strict=True):
        made = lm.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=length,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, len(context) :].tolist()
        best = torch.cat(made.logits).topk(2).values
        near = (best[:, 0] - best[:, 1] < NEAR_TIE).tolist()
        sure = near.index(True) if True in near else len(tokens)
        assert thought.ids[:sure] == tokens[:sure]
        compared += sure
    assert compared > 0.9 * length * len(contexts)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run. It takes gigabytes, so it is deleted after the test."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_it_trains_and_is_loaded_again(
    smollm2: Path, runtime: Runtime, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_twice(smollm2, runtime, run, monkeypatch)
    assert not (run / "adapter").exists()


def test_its_adapters_train_and_are_loaded_again(
    smollm2: Path, runtime: Runtime, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    more = ["--use_peft", "--lora_r", "4", "--learning_rate", "1e-3"]
    scores = trained_twice(smollm2, runtime, run, monkeypatch, *more)
    again = Scorer.from_pretrained(run / "adapter", dtype="fp32")._judging.runtime
    found = computed(again, groups_of(PAIRS[:2], again.dialog))[1]
    torch.testing.assert_close(found, scores, rtol=0, atol=1e-4)


def trained_twice(smollm2: Path, runtime: Runtime, run: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Tensor:
    """Train DWRL for two steps on four pairs, and return the scores of the model in memory. They must equal those of
    the saved model, loaded by us and by transformers, and differ from the scores before training.
    """
    kept: list[Trainer] = []

    class Kept(Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(self)

    monkeypatch.setattr(train, "Trainer", Kept)
    rows = [
        {"prompt": list(pair.prompt), **dict(zip(("chosen", "rejected"), pair.responses, strict=True))}
        for pair in PAIRS[:4]
    ]
    (run.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = ["--model_name_or_path", str(smollm2), "--dataset_name", f"{run.parent}/pairs.jsonl", "--dtype", "fp32"]
    argv += ["--num_generations", "2", "--max_completion_length", "8", "--rollout_batch_size", "2", "--max_steps", "2"]
    argv += ["--minibatch_size", "2", "--learning_rate", "1e-5", "--output_dir", str(run), *more]
    result = train.run(train.configure(argv), Console(quiet=True))
    assert result["seed"] == 0 and len((run / "metrics.jsonl").read_text().splitlines()) == 2
    groups = groups_of(PAIRS[:2], runtime.dialog)
    before, after = computed(runtime, groups), computed(kept[0].policy.runtime, groups)
    assert (after[1] - before[1]).abs().max() > 1e-3
    loaded = Scorer.from_pretrained(run / "model", dtype="fp32")._judging.runtime
    lm = AutoModelForCausalLM.from_pretrained(run / "model")
    for again in (computed(loaded, groups), expected(lm, groups, runtime.dialog.yes_id)):
        for found, right in zip(again, after, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-4)
    return after[1]
