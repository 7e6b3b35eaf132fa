"""`bt` with prefilled thoughts: the input of the head, the written thoughts and their file, and later scoring."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakePolicy, FakeSampler
from rich.console import Console
from tiny import tiny_config, tiny_dialog, tiny_folder, tiny_rows

from dwrl_fast import Scorer, evaluate, train
from dwrl_fast.config import TrainConfig, parse_evaluate
from dwrl_fast.errors import CheckpointError, ConfigError, ModelError
from dwrl_fast.sampling import KeptThoughts, TreeSampler
from dwrl_fast.scoring import marginal_scores
from dwrl_fast.scoring.loading import load_dialog
from dwrl_fast.train import PREFILLED

OPTIONS = ["--rollout_batch_size", "6", "--minibatch_size", "6", "--max_steps", "4", "--learning_rate", "1e-2"]
OPTIONS += ["--max_completion_length", "5"]


def go(folder: Path, *more: str) -> dict[str, Any]:
    own = ["--method", "bt", "--prefilled_thoughts", "--model_name_or_path", f"{folder}/tiny", "--save_steps", "1"]
    files = ["--dataset_name", f"{folder}/pairs.jsonl", "--eval_dataset_name", f"{folder}/pairs.jsonl"]
    return train.run(
        train.configure([*own, *files, *OPTIONS, "--output_dir", f"{folder}/run", *more]), Console(quiet=True)
    )


def kept(folder: Path) -> list[dict[str, Any]]:
    """The thoughts, without the line that says which model wrote them."""
    return [json.loads(line) for line in (folder / PREFILLED).read_text().splitlines()[1:]]


def test_the_head_reads_a_greedy_thought_of_the_base_model(folder: Path) -> None:
    policy, rows = FakePolicy(tiny_config(folder, method="bt", prefilled_thoughts=True)), tiny_rows(folder)[:4]
    groups, _ = policy.rollout(rows)
    generative = FakePolicy(tiny_config(folder), policy.dialog).runtime
    for row, group in zip(rows, groups, strict=True):
        for response, (sequence,) in zip(row.responses, group.sequences, strict=True):
            context = policy.dialog.context(row.prompt, response)
            ((thought,),) = generative.sampler.sample([context.ids], 1, max_tokens=6, temperature=0.0, seed=0)
            assert sequence == policy.dialog.sequence(context, thought.ids)
    loss, gradients, _ = policy.step(groups, budget=1)
    rewards = [
        [policy.model.lm(torch.tensor([sequence.ids])).logits[0, 0] for (sequence,) in group.sequences]
        for group in groups
    ]
    total = torch.stack([torch.log1p((bad - good).exp()) for good, bad in rewards]).mean()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_judge_keeps_few_thoughts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reward of a policy it reads ever new texts."""
    monkeypatch.setattr("dwrl_fast.sampling.kept.MOST", 4)
    sampler = FakePolicy(tiny_config(folder, method="bt", prefilled_thoughts=True)).runtime.sampler
    contexts = [[5, 6, k] for k in range(7, 13)]
    how: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0, "seed": 0}
    first = sampler.sample(contexts, 1, **how)
    assert [sampler.sample([context], 1, **how)[0] for context in contexts] == first
    for k in range(20):
        sampler.sample([[6, k, 5]], 1, **how)
    assert len(sampler.found) <= 5


def test_thoughts_are_written_once_and_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    class Counted(TreeSampler):
        def sample(self, contexts: Any, *args: Any, **options: Any) -> Any:
            written.append(len(contexts))
            return super().sample(contexts, *args, **options)

    monkeypatch.setattr("dwrl_fast.scoring.runtime.TreeSampler", Counted)
    first = go(folder)
    before = kept(folder / "run")
    assert len({row["context"] for row in before}) == len(before) == sum(written) <= 24
    assert all(row["thought"] and row["ids"] for row in before)
    with (folder / "run" / PREFILLED).open("a") as file:
        file.write('{"context": "half a li')
    written.clear()
    shutil.rmtree(folder / "run" / "checkpoint-000004")
    shutil.rmtree(folder / "run" / "model")
    (folder / "run" / "result.json").unlink()  # otherwise the run is finished
    again = go(folder, "--resume_from_checkpoint", "latest")
    assert written == [] and kept(folder / "run") == before, "a run that goes on writes none anew"
    assert again["report_after"] == first["report_after"]


def unfinished(folder: Path) -> None:
    """Leave of a run what one that was killed before its first checkpoint leaves, with its thoughts."""
    for path in [*(folder / "run").glob("checkpoint-*"), folder / "run" / "model"]:
        shutil.rmtree(path)
    (folder / "run" / "result.json").unlink()


@pytest.mark.parametrize("change", ["model", "limit", "older"])
def test_thoughts_of_another_model_or_limit_are_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    options = {"model": [], "limit": ["--max_completion_length", "3"], "older": []}[change]
    go(folder)
    file = folder / "run" / PREFILLED
    if change == "older":
        file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[1:]))
    was = file.read_bytes()
    if change == "model":
        tiny_folder(folder / "tiny", seed=1)
    other = go(folder, *options, "--output_dir", f"{folder}/other")
    unfinished(folder)
    again = go(folder, *options, "--resume_from_checkpoint", "auto")
    assert again["report_after"] == other["report_after"] and kept(folder / "run") == kept(folder / "other")
    why = {"model": "are of another model", "limit": "have at most 5 tokens instead of 3", "older": "do not begin with"}
    assert f"The thoughts in {file} {why[change]}" in caplog.text and "prefilled.unused1.jsonl" in caplog.text
    assert (folder / "run" / "prefilled.unused1.jsonl").read_bytes() == was


def test_a_refused_checkpoint_leaves_the_thoughts(folder: Path) -> None:
    go(folder)
    (folder / "run" / "result.json").unlink()
    tiny_folder(folder / "tiny", seed=1)
    was = (folder / "run" / PREFILLED).read_bytes()
    with pytest.raises(CheckpointError, match="the base model"):
        go(folder, "--resume_from_checkpoint", "auto")
    assert (folder / "run" / PREFILLED).read_bytes() == was
    go(folder, "--resume_from_checkpoint", "auto", "--resume_anyway")
    assert (folder / "run" / "prefilled.unused1.jsonl").read_bytes() == was


def test_a_thought_may_hold_any_character_and_damaged_lines_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Decoder:
        def decode(self, ids: list[int]) -> str:
            return "\u2028\x85\n"

    def thoughts() -> KeptThoughts:
        made = KeptThoughts(FakeSampler(tiny_dialog(), lambda *_: "1 2"), "it", Decoder(), [2])
        made.keep_in(tmp_path / PREFILLED, 5)
        return made

    first = thoughts()
    first.sample([[5, 6]], 1, max_tokens=5, temperature=0.0, seed=0)
    assert first.found and thoughts().found == first.found
    intact = (tmp_path / PREFILLED).read_bytes()
    for number, damage in enumerate(
        [b"\xff\xfe", b'{"context": "a"}', b'{"context": "a", "ids": []}', b"[" * 99999, b"1"]
    ):
        (tmp_path / PREFILLED).write_bytes(intact.replace(b"\n", b"\n" + damage + b"\n", 1))
        assert thoughts().found == first.found and (tmp_path / PREFILLED).read_bytes() == intact
        assert caplog.text.count("prefilled.jsonl:2: this line is damaged; its thought is written again.") == number + 1
    (tmp_path / PREFILLED).write_bytes(b"\n" + intact)
    assert not thoughts().found and "do not begin with the line" in caplog.text


def test_a_saved_model_scores_with_the_base_model_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = go(Path())
    card = json.loads((folder / "run" / "model" / "preference_model.json").read_text())
    assert card["prefilled_by"] == str(folder / "tiny") and card["max_completion_length"] == 5
    monkeypatch.chdir(folder.parent)
    pairs, out = f"{folder}/pairs.jsonl", folder / "out"
    argv = ["--model_name_or_path", f"{folder}/run/model", "--dataset_name", pairs, "--output_dir", str(out)]
    report = evaluate.run(parse_evaluate(argv), Console(quiet=True))
    assert report.accuracy == result["accuracy_after"] != result["accuracy_before"]
    assert json.loads((out / "scores.jsonl").read_text().splitlines()[0])["thoughts"][0] != [""]

    def scores(limit: int | None = None) -> Any:
        scorer = Scorer.from_pretrained(folder / "run" / "model", dtype="fp32", max_completion_length=limit)
        return marginal_scores(scorer.score_groups(tiny_rows(folder)))

    assert torch.equal(scores(), scores(5)) and not torch.equal(scores(), scores(1))
    (folder / "tiny").rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=r"reads thoughts that .*tiny writes"):
        scores()


def test_what_cannot_write_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="prefilled_thoughts with model_config"):
        TrainConfig(method="bt", prefilled_thoughts=True, model_config="config.json", dataset_name="pairs.jsonl")
    go(folder)
    config = tiny_config(folder, method="bt", prefilled_thoughts=True)
    trained = dataclasses.replace(config, model_name_or_path=str(folder / "run" / "model"))
    with pytest.raises(ModelError, match="scalar head"):
        load_dialog(trained)
