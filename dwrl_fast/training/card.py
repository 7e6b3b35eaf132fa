"""The model card, README.md next to the weights: what the model is, its training, its accuracy, and how to use it."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import yaml

from dwrl_fast.config import TrainConfig
from dwrl_fast.data.locations import FILES, HUB, PACKED, files_of
from dwrl_fast.data.mixture import Part
from dwrl_fast.evaluation.escaping import block, plain, table_row
from dwrl_fast.files import bounded_text
from dwrl_fast.methods import METHODS, Method
from dwrl_fast.models.hub import on_hub
from dwrl_fast.models.pretrained import CARD
from dwrl_fast.training.runlog import METRICS, read_metrics

README = "README.md"
FEW = 100  # below this number of held-out rows an accuracy says little
HERE = "path/to/this/folder"


def write_card(run: Path, config: TrainConfig, result: Mapping[str, Any], **where: Any) -> None:
    """Write the card of a finished run next to the weights in its folder; see `model_card`. Raises OSError if it cannot
    be written.
    """
    text = model_card(config, result, read_metrics(run / METRICS), **where)
    (run / "model" / README).write_text(text, encoding="utf-8")


def model_card(
    config: TrainConfig,
    result: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    repository: str | None = None,
    processes: int = 1,
) -> str:
    """The card: YAML for the Hugging Face hub, then Markdown. result: as in result.json. metrics: the rows of
    metrics.jsonl. repository: USER/NAME that the model is uploaded to. processes: the number that trained it.
    """
    method = METHODS[config.method]
    parts = [
        f"---\n{_front(config, method)}\n---\n",
        f"# {plain(PurePath(repository or config.output_dir or config.method).name)}\n",
        f"{_what(method)}\n",
        _use(method, repository or HERE),
        "## Training\n\n" + "".join(_training(config, method, result)),
        "## Held-out pairs\n\n" + "".join(_held_out(config, method, result, metrics)),
        "## Limits\n\n" + "".join(f"- {line}\n" for line in _limits(config, method, result)),
        "## Command\n\n" + block(_command(config, processes, repository), "bash"),
        "## Versions\n\n" + "".join(f"- {name} {plain(number)}\n" for name, number in result["versions"].items()),
    ]
    return "\n".join(parts)


def _front(config: TrainConfig, method: type[Method]) -> str:
    """The YAML; license and base model only if they are known."""
    from huggingface_hub import ModelCardData

    base = config.model_name_or_path
    known = {"license": None, "base_model": base if base and on_hub(base) else None} | _said_by(base)
    datasets = [name.partition(":")[0] for name in _sources(config) if _of_hub(name)]
    data = ModelCardData(
        **known,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="transformers",
        pipeline_tag="text-classification" if method.scalar else "text-generation",
        tags=["dwrl_fast", "preference-model", method.name],
    )
    return data.to_yaml()


def _said_by(base: str | None) -> dict[str, Any]:
    """License and base model from the card of a model in a folder."""
    from huggingface_hub import ModelCard

    with suppress(OSError, ValueError, yaml.YAMLError):
        text = bounded_text(Path(base or "") / README)
        if text.startswith("---"):
            data = ModelCard(text).data
            return {name: data.get(name) for name in ("license", "base_model") if data.get(name)}
    return {}


def _sources(config: TrainConfig) -> list[str]:
    mixed = [part.dataset_name for part in config.dataset_mixture]
    return [config.dataset_name] if config.dataset_name else mixed


def _of_hub(name: str) -> bool:
    """Whether `name` is a data set of the hub. A file that has been deleted since is not."""
    file = Path(name).suffix in (*FILES, *PACKED) or Path(name).exists() or files_of(name)
    return not file and HUB.fullmatch(name) is not None


def _shown(name: str) -> str:
    """The name of a data set of the hub, or the name of a file without its folders."""
    return name if _of_hub(name) else PurePath(name).name


def _what(method: type[Method]) -> str:
    if method.verdict == "likelihood":
        kind = "A policy: a language model that writes responses"
    elif method.thinks:
        kind = "A generative preference model: a language model that writes a thought before its verdict on a response"
    else:
        kind = "A preference model: it judges responses without a thought"
    return f"{kind}. Trained with dwrl_fast, `--method {method.name}`: {method.summary}."


def _use(method: type[Method], name: str) -> str:
    auto = "AutoModelForSequenceClassification" if method.scalar else "AutoModelForCausalLM"
    compares = method.verdict in ("label", "lead", "choice after a thought")
    scored = "judge.score(prompts, responses, reference=others)" if compares else "judge.score(prompts, responses)"
    judge = f"""\
from dwrl_fast import Scorer

judge = Scorer.from_pretrained({name!r})
prompts, responses, others = ["Name a prime."], ["7"], ["9"]
scores = {scored}
better = judge.probability(prompts, responses, reference=others)  # how probably 7 is better than 9
"""
    plainly = f"""\
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = {auto}.from_pretrained({name!r})
"""
    return (
        f"## Use\n\nAs a judge:\n\n{block(judge.rstrip(), 'python')}\nWithout dwrl_fast it is a plain model of "
        f"transformers, without code of its own. `{CARD}` next to the weights has the turns that ask it and the labels "
        f"that are read:\n\n{block(plainly.rstrip(), 'python')}"
    )


def _training(config: TrainConfig, method: type[Method], result: Mapping[str, Any]) -> Iterator[str]:
    base = config.model_name_or_path or config.model_config
    drawn = " (drawn at random from this configuration)" if config.model_config else ""
    rows = result.get("rows")
    phases = {name: getattr(config, f"{name}_learning_rate") for name in ("score", "thought")}
    rates = [f"{rate:g} ({name})" for name, rate in phases.items() if rate is not None]
    rates = rates if len(rates) == 2 else [f"{config.learning_rate:g}", *rates]
    facts: dict[str, Any] = {
        "method": f"{method.name}: {method.summary}",
        "started from": (base if base and on_hub(base) else PurePath(base).name) + drawn if base else "a tiny model",
        "data": ", ".join(map(_shown, _sources(config))) or ("none" if config.own_data else "the embedded task"),
        "preference groups": "not counted (streamed)" if rows is None else f"{rows:,}",
        "rollout batches": f"{result['steps']:,} of {config.rollout_batch_size} groups, in minibatches of "
        f"{config.minibatch_size}",
        "learning rate": f"{', '.join(rates)}, {config.lr_scheduler_type}",
        "adapters": f"LoRA, rank {config.lora_r}, merged" if config.use_peft else None,
        "thoughts": f"{config.num_generations} of at most {config.max_completion_length} tokens, temperature "
        f"{config.temperature:g}" if method.thinks else None,
        "seed": config.seed,
        "time": f"{sum(result['seconds_by_stage'].values()) / 60:,.1f} minutes",
    }  # fmt: skip
    yield from (line + "\n" for line in (table_row(("", "")), table_row(("---", "---"))))
    yield from (table_row(item) + "\n" for item in facts.items() if item[1] is not None)


def _reports(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each report with what it is of, as `result.json` names them: report_before, report_after_4_thoughts/chat."""
    for key, report in result.items():
        if key.startswith(("report_before", "report_after")):
            kind, _, source = key.removeprefix("report_").partition("/")
            yield kind.replace("_", " ") + (f", {source}" if source else ""), report


def _held_out(
    config: TrainConfig, method: type[Method], result: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    reports = list(_reports(result))
    if not reports:
        yield "The run had no held-out pairs: how well this model judges was not measured.\n"
    else:
        files = ", ".join(_shown(part.dataset_name) for part in config.eval_dataset_name) or "the embedded task"
        yield f"How often the better response scores higher, on {plain(files)}"
        yield "; with one greedy thought where no number is named.\n\n" if method.thinks else ".\n\n"
        header = ("", "accuracy", "95 % interval", "rows", "nll, nats", "calibration error")
        yield table_row(header) + "\n" + table_row(["---"] + ["---:"] * 5) + "\n"
        for name, report in reports:
            interval = f"{report['low']:.3f} to {report['high']:.3f}"
            figures = [f"{report['accuracy']:.3f}", interval, f"{report['groups']:,}", _number(report["nll"], 3)]
            yield table_row([name, *figures, _number(report.get("calibration_error"), 3)]) + "\n"
        yield (
            "\nThe calibration error is the expected one of sigmoid(score difference): the mean distance between "
            "confidence and accuracy over ten bins.\n"
        )
    if metrics and metrics[-1].get("label_mass") is not None:
        yield (
            f"\nLabel mass: where the verdict is read in the last rollout batch, the labels have "
            f"{metrics[-1]['label_mass']:.1%} of the probability.\n"
        )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _limits(config: TrainConfig, method: type[Method], result: Mapping[str, Any]) -> Iterator[str]:
    reports = list(_reports(result))
    if not result.get("trained", True):
        yield f"Training did not work: {plain(result['why'])}."
    if not config.own_data:
        yield "A demonstration: a tiny model on a made task. It judges nothing else."
    if reports and min(report["groups"] for _, report in reports) < FEW:
        yield f"It was measured on fewer than {FEW} rows: see the interval."
    if config.prefilled_thoughts:
        yield (
            f"It scores only together with the model that writes its thoughts, which `{CARD}` names and which is not "
            "in this folder."
        )
    if method.limit:
        yield method.limit
    yield (
        "Its scores order responses as the held-out pairs say. On other prompts, languages and aspects nothing was "
        "measured: `python -m dwrl_fast.evaluate` does that on your pairs."
    )
    yield (
        "A response may try to influence its judge. No such attack was measured here; `python -m dwrl_fast.evaluate "
        "--probe` does that."
    )


def _command(config: TrainConfig, processes: int, repository: str | None) -> str:
    """The command that trained the model, which needs no other file of options. The folders of absolute paths are
    omitted if the model is uploaded: they may name people and projects.
    """
    once = dataclasses.replace(config, resume_from_checkpoint=None, resume_anyway=False)
    python = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    # Over the embedded task's recipe, what the user gave counts also where it is the default.
    also = () if config.own_data else config.explicit - {"resume_from_checkpoint", "resume_anyway"}
    arguments = once.to_arguments(also, _without_folders if repository else None)
    return shlex.join([*python, "-m", "dwrl_fast.train", *arguments])


def _without_folders(value: Any) -> Any:
    """The value of an option, without the folders of absolute paths."""
    if isinstance(value, tuple):
        return tuple(map(_without_folders, value))
    if isinstance(value, Part):
        return dataclasses.replace(value, dataset_name=_without_folders(value.dataset_name))
    if not isinstance(value, str):
        return value
    names = value.split(",")  # a data set may be several files
    return ",".join(PurePath(name).name if name.startswith(("/", "~", "file:")) else name for name in names)
