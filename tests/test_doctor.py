"""The doctor finds planted faults and names a remedy; after applying the remedy, the next report passes."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_embedded import SIZES, TINY
from tiny import tiny_dialog, tiny_folder, tiny_model, tiny_pairs
from tokenizers import processors
from transformers import DynamicCache

from dwrl_fast import embedded
from dwrl_fast.doctor import Finding, Report, embedded_task, machine, parse_doctor
from dwrl_fast.doctor.__main__ import main, run
from dwrl_fast.doctor.finding import Status, worst
from dwrl_fast.embedded.tokenizer import make_tokenizer
from dwrl_fast.encode import Thought
from dwrl_fast.errors import ConfigError, UnfitError
from dwrl_fast.methods import METHODS
from dwrl_fast.models.model import GenerativeModel
from dwrl_fast.models.pretrained import save_pretrained
from dwrl_fast.ops import extension
from dwrl_fast.progress import Display
from dwrl_fast.ranks import ALONE
from dwrl_fast.sampling import TreeSampler, tree
from dwrl_fast.sampling.draws import logprobs_at, pick
from dwrl_fast.sampling.sampler import request_key
from dwrl_fast.scoring import runtime

OWN = {
    "chat template",
    "BOS",
    "padding",
    "labels",
    "texts",
    "weights",
    "memory",
    "generation_config",
    "device",
    "kernels",
}
THINKING = {"thoughts", "sampler and trainer", "draws", "a group alone", "a thought alone", "layouts", "fresh weights"}
LABELLED = {"label mass", "spread of scores"}
BEGIN = "<|begin|>"
TURNS = "kind: dialog\nevaluate: 'check {aspect}'\nrate: rate\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "tiny")
    tiny_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


def report(place: Path, *more: str) -> Report:
    given = {"--model_name_or_path": f"{place}/tiny", "--dataset_name": f"{place}/pairs.jsonl"}
    given |= {"--max_completion_length": "12", "--num_generations": "4"}
    given |= dict(zip(more[::2], more[1::2], strict=True))
    return run(parse_doctor([part for pair in given.items() for part in pair]), Console(quiet=True))


def finding(found: Report, name: str) -> Finding:
    (one,) = (each for each in found.findings if each.name == name)
    return one


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    values = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_a_sound_set_up_passes(place: Path) -> None:
    found = report(place)
    assert {each.name for each in found.findings} == OWN | THINKING | LABELLED
    # A model with random weights does not answer Yes or No, and seldom ends a thought.
    assert set(found.named("pass")) >= OWN | THINKING - {"thoughts"}, found.to_dict()
    assert found.left_out == {
        "there is one process: start it with torchrun": ["collectives", "uneven ranks", "sharded gradients", "replicas"]
    }
    assert all(each.remedy for each in found.findings if each.status != "pass")


def with_begin(place: Path, chat_template: str, *, added: bool) -> None:
    """The tiny model with a BOS token, which the tokenizer adds to plain texts or not."""
    tokenizer: Any = make_tokenizer()
    before = tokenizer.chat_template
    tokenizer.add_special_tokens({"bos_token": BEGIN})
    if added:
        single = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = single
    model = tiny_model()
    model.lm.resize_token_embeddings(len(tokenizer))
    dialog = tiny_dialog()
    dialog.tokenizer = tokenizer
    tokenizer.chat_template = chat_template + before
    card = {"method": "dwrl", "score_normalization": "vocab", "temperature": 1.0, "max_completion_length": 6}
    save_pretrained(place / "tiny", GenerativeModel(model.lm), dialog, card)


@pytest.mark.parametrize(
    ("planted", "status", "mended"),
    [("{{ bos_token }}{{ bos_token }}", "fail", "{{ bos_token }}"), ("", "warn", "{{ bos_token }}")],
)
def test_a_doubled_and_a_missing_bos(place: Path, planted: str, status: str, mended: str) -> None:
    with_begin(place, planted, added=True)
    found = finding(report(place), "BOS")
    assert found.status == status and BEGIN in found.seen and "chat template" in found.remedy
    template = place / "tiny" / "chat_template.jinja"
    template.write_text(mended + template.read_text().removeprefix(planted))
    assert finding(report(place), "BOS").status == "pass"


def test_a_tokenizer_that_adds_no_bos_needs_none(place: Path) -> None:
    with_begin(place, "", added=False)
    assert finding(report(place), "BOS").status == "pass"


@pytest.mark.parametrize(
    ("old", "new"),
    [  # The last turn is marked; earlier turns of the assistant are cut.
        ("'<|end|>' }}", "'<|end|>' }}{{ '<|pad|>' if loop.last else '' }}"),
        ("message['content']", "(message['content'] if loop.index > loop.length - 2 else '7')"),
    ],
)
def test_a_template_that_strips_earlier_turns(place: Path, old: str, new: str) -> None:
    template = place / "tiny" / "chat_template.jinja"
    sound = template.read_text()
    assert old in sound
    template.write_text(sound.replace(old, new))
    found = report(place)
    assert found.named("fail") == ["chat template"]
    assert "chat_template.jinja" in finding(found, "chat template").remedy
    template.write_text(sound)
    assert finding(report(place), "chat template").status == "pass"


def test_a_template_that_trims_is_counted(place: Path) -> None:
    template = place / "tiny" / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "message['content'] | trim"))
    row = {"prompt": " 1 2 ", "chosen": " 3", "rejected": "4 "}
    (place / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert "2 conversations trimmed" in finding(report(place), "texts").seen


@pytest.mark.parametrize(("method", "wrong", "right"), [("dwrl", "right", "left"), ("bt", "left", "right")])
def test_a_wrong_pad_side(place: Path, method: str, wrong: str, right: str) -> None:
    settings = place / "tiny" / "tokenizer_config.json"
    edit(settings, padding_side=wrong)
    found = finding(report(place, "--method", method), "padding")
    assert found.status == "warn" and f'"padding_side": "{right}"' in found.remedy
    edit(settings, padding_side=right)
    assert finding(report(place, "--method", method), "padding").status == "pass"


def test_a_label_of_two_tokens(place: Path) -> None:
    wrong = place / "labels.yaml"
    wrong.write_text(TURNS + 'labels: ["Yes ok", "No"]\n')
    found = report(place, "--template", str(wrong))
    assert found.named("fail") == ["labels"]
    assert "does not keep the label 'Yes ok' one token" in finding(found, "labels").seen
    assert "--template" in finding(found, "labels").remedy
    wrong.write_text(wrong.read_text().replace("Yes ok", "Yes"))
    assert finding(report(place, "--template", str(wrong)), "labels").status == "pass"


def test_a_template_file_that_is_wrong_is_not_taken_for_the_chat_template(place: Path) -> None:
    wrong = place / "labels.yaml"
    wrong.write_text(TURNS.replace(" {aspect}", "") + 'labels: ["Yes", "No"]\n')
    found = report(place, "--template", str(wrong))
    assert found.named("fail") == ["template"] and "{aspect} is missing" in finding(found, "template").seen
    wrong.write_text(TURNS + 'labels: ["Yes", "No"]\n')
    assert finding(report(place, "--template", str(wrong)), "chat template").status == "pass"


def test_labels_that_the_model_does_not_give(place: Path) -> None:
    """The line names the labels that it does give; a template with them is the remedy."""
    found = finding(report(place), "label mass")
    assert found.status == "fail" and "--template" in found.remedy
    likely = found.seen.split("most likely tokens are ")[1].split("'")[1::2]
    other = place / "labels.yaml"
    other.write_text(TURNS + f"labels: {json.dumps(likely[:2])}\n")
    assert finding(report(place, "--template", str(other)), "label mass").figures["mass"] > 10 * found.figures["mass"]
    drawn = ("--model_config", f"{place}/tiny/config.json", "--tokenizer_name_or_path", f"{place}/tiny")
    argv = [*drawn, "--dataset_name", f"{place}/pairs.jsonl", "--max_completion_length", "6"]
    assert finding(run(parse_doctor(argv), Console(quiet=True)), "label mass").status == "warn", (
        "its weights were drawn"
    )


def top_k(logits: Any, temperature: float) -> Any:
    """The distribution of an engine that keeps only the most likely tokens."""
    whole = logprobs_at(logits, temperature)
    least = whole.topk(3, dim=-1).values[..., -1:]
    return whole.masked_fill(whole < least, -torch.inf).log_softmax(-1)


def picked_from_top_k(logprob: Any, temperature: float, *rest: Any) -> Any:
    """A draw of such an engine, with log-probs of the full distribution."""
    chosen, _ = pick(top_k(logprob, 1.0).clamp_min(-1e9), temperature, *rest)
    return chosen, logprob.gather(-1, chosen[:, None]).squeeze(-1)


def plant(planted: pytest.MonkeyPatch, name: str, other: Any) -> None:
    """Put `other` into the sampler, after the model has been tried with the original."""

    def made(*given: Any, **options: Any) -> TreeSampler:
        planted.setattr(tree, name, other)
        return TreeSampler(*given, **options)

    planted.setattr(runtime, "TreeSampler", made)


def test_a_sampler_with_top_k(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = report(place)
    with monkeypatch.context() as planted:
        plant(planted, "logprobs_at", top_k)
        found = report(place)
    assert {"sampler and trainer", "draws"} <= set(found.named("fail"))
    assert "top-k" in finding(found, "sampler and trainer").remedy
    assert finding(found, "sampler and trainer").figures["past"] > 0.5
    with monkeypatch.context() as planted:
        plant(planted, "pick", picked_from_top_k)
        found = report(place)
    assert finding(found, "sampler and trainer").status == "pass", "the log-probs that it claims are the trainer's"
    assert finding(found, "draws").status == "fail" and finding(found, "draws").figures["surplus"] > 0.1
    for name in ("sampler and trainer", "draws"):  # that sampler is left out
        assert finding(sound, name).status == finding(report(place), name).status == "pass"


def test_a_generation_config_that_shapes_samples(place: Path) -> None:
    config = place / "tiny" / "generation_config.json"
    edit(config, do_sample=True, top_k=20, temperature=0.7, repetition_penalty=1.05)
    found = finding(report(place), "generation_config")
    assert found.status == "warn" and "temperature 0.7, top_k 20, repetition_penalty 1.05" in found.seen
    assert "generation_config.json" in found.remedy
    edit(config, top_k=None, temperature=None, repetition_penalty=None)
    assert finding(report(place), "generation_config").status == "pass"


class StalePrefixes:
    """An engine that loads new weights but keeps its prefix cache."""

    float32 = True

    def __init__(self, model: Any, stop_ids: Sequence[int], **options: Any) -> None:
        self.lm, self.stop_ids = model.lm, stop_ids
        self.cached: dict[tuple[int, ...], Any] = {}

    @torch.no_grad()
    def sample(self, contexts: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[Thought]]:
        return [[self._thought(tuple(ids), i, **options) for i in range(n)] for ids in contexts]

    def _thought(self, ids: tuple[int, ...], index: int, **options: Any) -> Thought:
        if ids not in self.cached:
            self.cached[ids] = self.lm(torch.tensor([ids[:-1]]), past_key_values=DynamicCache(), use_cache=True)
        cache, token, drawn, logprobs = copy.deepcopy(self.cached[ids].past_key_values), ids[-1], [], []
        key = torch.tensor([request_key(options["seed"], ids, index)])
        for t in range(options["max_tokens"]):
            out = self.lm(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logprob = logprobs_at(out.logits[:, -1], options["temperature"])
            chosen, found = pick(logprob, options["temperature"], key, torch.tensor([t]))
            token = int(chosen)
            drawn.append(token)
            logprobs.append(found.item())
            if token in self.stop_ids:
                return Thought(drawn, logprobs, True)
        return Thought(drawn, logprobs, False)


def stale_weights(model: Any, stop_ids: Sequence[int], **options: Any) -> TreeSampler:
    """An engine that gets the weights only once."""
    return TreeSampler(copy.deepcopy(model), stop_ids, **options)


@pytest.mark.parametrize("engine", [stale_weights, StalePrefixes])
def test_a_stale_engine(place: Path, monkeypatch: pytest.MonkeyPatch, engine: Callable[..., Any]) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(runtime, "TreeSampler", engine)
        found = report(place)
    assert finding(found, "sampler and trainer").status == "pass", "before the weights change nothing shows"
    assert (
        finding(found, "fresh weights").status == "fail"
        and "not those of the model" in finding(found, "fresh weights").seen
    )
    assert "prefix cache" in finding(found, "fresh weights").remedy
    assert finding(report(place), "fresh weights").status == "pass"


def weights_changed(place: Path, name: str, value: float) -> None:
    path = place / "tiny" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan")),  # the trial on a few tokens meets it
        ("model.embed_tokens.weight", float("inf")),  # of a token that none of them is
    ],
)
def test_a_weight_that_is_not_finite(place: Path, name: str, value: float) -> None:
    path = place / "tiny" / "model.safetensors"
    sound = path.read_bytes()
    weights_changed(place, name, value)
    found = report(place)
    assert found.named("fail") == ["weights"] and name in finding(found, "weights").seen
    assert "copy the model again" in finding(found, "weights").remedy
    path.write_bytes(sound)
    assert finding(report(place), "weights").status == "pass"


def test_memory_that_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: size for name, size in finding(report(place), "memory").figures.items() if size}
    trained = sum(p.numel() for p in tiny_model().parameters())
    assert parts["weights GiB"] == parts["gradients GiB"] == parts["optimizer states GiB"] / 2 == 4 * trained / 2**30
    for free, total, status in ((1.0, 1.0, "pass"), (1e-6, 1.0, "warn"), (1e-6, 1e-5, "fail")):
        monkeypatch.setattr(machine, "available", lambda device, found=(free, total): found)
        found = finding(report(place), "memory")
        assert found.status == status and "--use_peft" in found.remedy
    monkeypatch.setattr(machine, "available", lambda device: (2e-3, 1.0))
    small = ("--generation_batch_size", "1")
    assert finding(report(place, "--generation_batch_size", "2048"), "memory").status == "warn"
    assert finding(report(place, *small), "memory").status == "pass", "the first remedy"


def test_the_worst_rank_decides_and_is_named() -> None:
    def of(*statuses: Status) -> list[Finding]:
        return [Finding(str(i), status, "seen") for i, status in enumerate(statuses)]

    every = [of("pass", "warn", "fail"), of("pass", "warn", "warn"), of("warn", "warn", "fail")]
    ranks: Any = SimpleNamespace(gather=lambda own: every)
    seen = [(each.status, each.seen) for each in worst(every[1], ranks)]
    assert seen == [("warn", "rank 2: seen"), ("warn", "seen"), ("fail", "rank 0: seen")]
    assert worst(every[1], ALONE) == every[1]


def test_operators_that_were_not_built(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "problem", lambda: extension.MISSING.format(reason="planted", command="make it"))
    config = parse_doctor([])
    found = machine.kernels(machine.Compute.resolve(config.dtype))
    assert found.status == "warn" and "reference" in found.seen and found.remedy == "make it"


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small embedded task left by a run."""
    folder = tmp_path_factory.mktemp("work")
    embedded.prepare(folder / "runs" / "dwrl-1" / "embedded", 0, sizes=SIZES, plan=TINY)
    return folder


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    yield Console(quiet=True)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trains])
def test_every_method_on_the_embedded_task(
    left: Path, monkeypatch: pytest.MonkeyPatch, quiet: Console, method: str
) -> None:
    monkeypatch.chdir(left)
    try:
        config = parse_doctor(["--method", method, "--max_completion_length", "16"])
    except ConfigError as error:
        assert "has no recipe" in str(error)
        return
    found = run(config, quiet)
    names = {each.name for each in found.findings}
    assert set(found.named("fail")) <= {"label mass", "verdicts"}, found.to_dict()  # it was hardly warmed up
    assert {"a group alone", "layouts"} <= names
    made = METHODS[method]
    assert ("label mass" in names) == made.verdict.startswith("label")
    for name in ("sampler and trainer", "fresh weights"):
        said = [each for some in found.left_out.values() for each in some]
        assert (name in names) == made.thinks and (name in said) == (not made.thinks)


def test_a_rank_that_fails_on_the_embedded_model_waits_for_no_other(quiet: Console) -> None:
    waits: list[None] = []
    ranks: Any = SimpleNamespace(from_first=lambda make: ("made", "which"), gather=waits.append)
    with pytest.raises(RuntimeError, match="planted"), embedded_task(parse_doctor([]), Display(quiet), ranks):
        raise RuntimeError("planted")
    assert not waits
    with embedded_task(parse_doctor([]), Display(quiet), ranks):
        assert not waits
    assert waits == [None]


def test_a_judge_is_examined_without_what_is_trained(left: Path, quiet: Console) -> None:
    model = left / "runs" / "dwrl-1" / "embedded" / "model-pairwise"
    rows = left / "runs" / "dwrl-1" / "embedded" / "test.jsonl"
    argv = ["--method", "judge", "--model_name_or_path", str(model), "--eval_dataset_name", str(rows)]
    found = run(parse_doctor([*argv, "--max_completion_length", "16"]), quiet)
    names = {each.name for each in found.findings}
    assert {"sampler and trainer", "verdicts"} <= names and "fresh weights" not in names
    assert "fresh weights" in str(found.left_out)


def test_the_report_as_json_and_the_exit_status(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name_or_path", f"{place}/tiny", "--dataset_name", f"{place}/pairs.jsonl", "--limit", "2"]
    argv += ["--max_completion_length", "12", "--json", f"{place}/report.json"]
    with pytest.raises(UnfitError, match="label mass") as error:
        main(argv)
    assert error.value.status == 4
    written = json.loads((place / "report.json").read_text())
    mass = next(each for each in written["findings"] if each["name"] == "label mass")
    assert mass["status"] == "fail" and 0 < mass["figures"]["mass"] < 0.05 and written["options"]["limit"] == 2
    printed = capsys.readouterr().out
    assert all(f"{each['status']}  {each['name']}" in printed for each in written["findings"])
    assert f"-> {mass['remedy']}" in printed
    with pytest.raises(ConfigError, match="exists already"):
        main(argv)


def test_rows_and_options_that_are_wrong(place: Path) -> None:
    found = report(place, "--dataset_name", f"{place}/none.jsonl")
    assert found.named("fail") == ["rows"] and "none.jsonl" in finding(found, "rows").seen
    found = report(place, "--model_name_or_path", f"{place}/none")
    assert found.named("fail") == ["tokenizer"]
    with pytest.raises(ConfigError, match="limit"):
        parse_doctor(["--limit", "0"])


def test_a_model_without_data_gets_rows_of_the_package(place: Path) -> None:
    config = parse_doctor(["--model_name_or_path", f"{place}/tiny"])
    assert Path(str(config.dataset_name)).is_file() and config.own_data
    judge = parse_doctor(["--model_name_or_path", f"{place}/tiny", "--method", "judge"])
    assert [part.dataset_name for part in judge.eval_dataset_name] == [config.dataset_name]
