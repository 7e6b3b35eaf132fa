"""Writes the recipes: one YAML file for each backbone, data set and method of the papers' tables.

    python -m recipes.make          # from the root of the checkout

A recipe holds what differs from the defaults, which are the DWRL paper's. What a paper does not say is chosen here, and
marked so in the file. The files are made, never edited: change the tables below and run this again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dwrl_fast.training.dry_run import preparation

FOLDER = Path(__file__).resolve().parent
CHOSEN = "chosen: the paper does not say"


@dataclass(frozen=True)
class Value:
    """An option's value with the reason that stands behind it in the file."""

    value: Any
    why: str = CHOSEN


@dataclass(frozen=True)
class Recipe:
    """name: the file under recipes/ without .yaml, and the run's folder under runs/. about: the lines at the top."""

    name: str
    about: list[str]
    options: dict[str, Any]

    @property
    def text(self) -> str:
        lines = [f"# {line}" for line in self.about]
        for name, given in (self.options | {"output_dir": f"runs/{self.name}"}).items():
            value, why = (given.value, f"  # {given.why}") if isinstance(given, Value) else (given, "")
            lines.append(yaml.safe_dump({name: value}, width=1000).strip() + why)
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Data:
    """folder: has train.jsonl and test.jsonl. about: how it differs from what the paper trained on."""

    title: str
    folder: str
    aspect: str | None = None
    about: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, str]:
        return {"dataset_name": f"{self.folder}/train.jsonl", "eval_dataset_name": f"{self.folder}/test.jsonl"}

    @property
    def source(self) -> str:
        command = preparation(f"{self.folder}/train.jsonl")
        return f"Data: {command or f'yours, in {self.folder}; recipes/README.md says which rows'}"


MEMORY = {"gradient_checkpointing": Value(True, "chosen: less memory, the same result")}
ONE_LABEL = {"learning_rate": Value(5e-6)}
GREEDY = {"eval_votes": Value(0, "one greedy thought, as in the paper")}

# DWRL (arXiv 2510.15242): Tables 1 to 4. Accuracies are Table 4's, Table 3's for the ablations, Table 2's for RM-R1.

BACKBONES = {
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}
TASKS = {
    "hh": Data(
        "helpfulness and harmlessness",
        "data/hh",
        "helpfulness and harmlessness",
        ["The paper's 20,000 and 1,000 pairs are another draw from the same data."],
    ),
    "if": Data(
        "instruction following",
        "data/ultrafeedback-14407-784",
        "instruction following",
        ["The paper's pairs are a vendor's: UltraFeedback stands in, in the same sizes. Accuracies do not compare."],
    ),
    "math": Data(
        "math reasoning",
        "data/gsm8k",
        "correctness",
        ["The paper's 16,252 pairs are not public: GSM8K's solutions stand in, fewer. Accuracies do not compare."],
    ),
}
DWRL_METHODS: dict[str, dict[str, Any]] = {
    "dwrl": {"method": "dwrl"} | GREEDY,
    "bt": {"method": "bt"} | ONE_LABEL,
    "gram": {"method": "gram"} | ONE_LABEL,
    "grpo-pair": {"method": "grpo-pair"} | GREEDY,
    "grpo-point": {"method": "grpo-point"} | GREEDY,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "bt-prefilled": {"method": "bt", "prefilled_thoughts": True} | ONE_LABEL,
    "dwrl-unweighted": {"method": "dwrl", "misalignment_weight": False} | GREEDY,
}
RM_R1 = "gaotang/RM-R1-Qwen2.5-Instruct-7B"
ACCURACY = {  # %, for each of TASKS
    "qwen2.5-3b": {
        "bt": (67.1, 57.0, 76.3),
        "gram": (67.4, 53.3, 74.9),
        "grpo-pair": (61.0, 51.1, 50.0),
        "grpo-point": (54.9, 50.0, 50.0),
        "dwrl": (68.5, 58.7, 85.4),
    },
    "qwen2.5-7b": {
        "bt": (67.9, 58.7, 84.5),
        "gram": (68.7, 50.2, 81.0),
        "grpo-pair": (64.7, 52.2, 53.7),
        "grpo-point": (59.3, 50.0, 52.4),
        "dwrl": (70.4, 60.1, 87.6),
    },
    "llama3.2-3b": {
        "bt": (69.2, 58.7, 77.2),
        "gram": (68.7, 50.4, 72.8),
        "grpo-pair": (63.2, 50.1, 50.0),
        "grpo-point": (55.8, 50.0, 50.0),
        "dwrl": (70.5, 61.4, 81.6),
        "bt-prefilled": (69.1, 59.6, 78.1),
        "dwrl-unweighted": (59.1, 58.5, 62.1),
    },
    "llama3.1-8b": {
        "bt": (67.4, 63.4, 80.4),
        "gram": (67.1, 50.0, 71.9),
        "grpo-pair": (65.3, 53.4, 50.2),
        "grpo-point": (58.7, 50.0, 58.4),
        "dwrl": (72.2, 65.2, 84.2),
    },
    "rm-r1-7b": {"judge": (62.7, 52.2, 55.0), "grpo-pair": (62.7, 52.2, 55.9)},
}


def dwrl() -> Iterator[Recipe]:
    for backbone, model in BACKBONES.items():
        for method in DWRL_METHODS:
            yield from _on_tasks("dwrl", backbone, model, method, DWRL_METHODS[method], "DWRL paper, Table 4")
    for method in ABLATIONS:
        model = BACKBONES["llama3.2-3b"]
        yield from _on_tasks("dwrl", "llama3.2-3b", model, method, ABLATIONS[method], "DWRL paper, Table 3")
    for method in ("judge", "grpo-pair"):
        options = {"method": method} | GREEDY
        yield from _on_tasks("dwrl", "rm-r1-7b", RM_R1, method, options, "DWRL paper, Table 2")


def btpo() -> Iterator[Recipe]:
    """BTPO, the same work's later version: the same data, sizes and accuracies, one joint update."""
    for backbone, model in BACKBONES.items():
        yield from _on_tasks("btpo", backbone, model, "btpo", {"method": "btpo"} | GREEDY, "BTPO paper, Appendix B")
    options = {"method": "btpo", "misalignment_weight": False} | GREEDY
    model = BACKBONES["llama3.2-3b"]
    yield from _on_tasks("btpo", "llama3.2-3b", model, "btpo-unweighted", options, "BTPO paper, ablation")


def _on_tasks(
    folder: str, backbone: str, model: str, method: str, options: dict[str, Any], table: str
) -> Iterator[Recipe]:
    accuracies = ACCURACY[backbone][method.replace("btpo", "dwrl")]
    for (task, data), accuracy in zip(TASKS.items(), accuracies, strict=True):
        about = [f"{table}: {model}, {data.title}, {method}: {accuracy} % there.", *data.about, data.source]
        aspect = {"aspect": data.aspect} if method != "bt" else {}
        files = data.options if method != "judge" else {"eval_dataset_name": data.options["eval_dataset_name"]}
        memory = MEMORY if method != "judge" else {}
        yield Recipe(
            f"{folder}/{backbone}-{task}-{method}",
            about,
            {"model_name_or_path": model} | files | aspect | options | memory,
        )


# Generative Reward Models (arXiv 2410.12832). Its table of hyperparameters has no values in the text that we have.

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
RUBRIC = "helpfulness, relevance, accuracy, depth, creativity and level of detail"
THIRDS = "a third of the rows: three rounds, no row in two of them"
GENRM_DATA = {
    "ultrafeedback": Data("UltraFeedback", "data/ultrafeedback", RUBRIC),
    "ultrainteract": Data("UltraInteract", "data/ultrainteract", "correctness"),
}
ROUNDS = {"ultrafeedback": 20416, "ultrainteract": 72896}  # a third of 61,135 and of 218,522, rounded up to minibatches
VOTES = {"eval_votes": Value(32, "the majority of 32, as in the paper")}
ONE_EPOCH = {"minibatch_size": Value(64), "num_train_epochs": Value(1)}
SELF_TAUGHT: dict[str, Any] = VOTES | ONE_EPOCH | {"save_steps": Value(1, "after each round")}
GENRM_METHODS: dict[str, dict[str, Any]] = {
    "bt": ONE_LABEL | ONE_EPOCH,
    "pairrm": ONE_LABEL | ONE_EPOCH,
    "genrm": ONE_LABEL | ONE_EPOCH,
    "judge": VOTES,
    "star-sft": SELF_TAUGHT
    | {"num_generations": Value(1, "each pair is sampled once, as in the paper"), "learning_rate": Value(1e-6)},
    "star-dpo": SELF_TAUGHT | {"num_generations": Value(8, "chosen: right and wrong thoughts of one pair are needed")},
    "star-rationalizer": SELF_TAUGHT
    | {"num_generations": Value(1, "each pair is sampled once, as in the paper"), "learning_rate": Value(1e-6)},
}
GENRM_FIGURES = {  # %, on held-out UltraFeedback, where the text has them
    "bt": "73 to 74 %",
    "pairrm": "73 to 74 %",
    "genrm": "73 to 74 %",
    "judge": "67.75 %",
    "star-sft": "67.4 %",
    "star-dpo": "73.9 %",
    "star-rationalizer": "about as star-dpo",
}


def genrm() -> Iterator[Recipe]:
    for name, data in GENRM_DATA.items():
        for method, options in GENRM_METHODS.items():
            figure = f": {GENRM_FIGURES[method]} there" if name == "ultrafeedback" else ""
            figures = "Figure 2" if name == "ultrafeedback" else "Figure 4"
            about = [f"Generative Reward Models, {figures}: {LLAMA}, {data.title}, {method}{figure}.", data.source]
            thinks = method == "judge" or method.startswith("star")
            if thinks:
                about.append("The paper samples at top-p .95, which is off here: thoughts are the model's own.")
            if method.startswith("star") and name == "ultrafeedback":
                about.append("The paper passes three times over a round's thoughts, this once.")
            chosen: dict[str, Any] = {"model_name_or_path": LLAMA, **data.options}
            chosen |= {"aspect": data.aspect} if method != "bt" else {}
            if method == "judge":
                del chosen["dataset_name"]
            rounds = {"rollout_batch_size": Value(ROUNDS[name], THIRDS)} if method.startswith("star") else {}
            memory = MEMORY if method != "judge" else {}
            yield Recipe(
                f"genrm/llama3.1-8b-{name}-{method}", about, chosen | {"method": method} | options | rounds | memory
            )


# Data formats: sections 4 to 7. A base model learns to answer, then to prefer (dpo) or to score (bt) on each format.

BASES = {  # with the tokenizer whose chat template the base model lacks
    "llama3.2-1b": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    "llama3.2-3b": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    "gemma3-1b": ("google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
    "gemma3-4b": ("google/gemma-3-4b-pt", "google/gemma-3-4b-it"),
}
FORMATS = {name: Data(name.upper(), f"data/formats/{name}") for name in ("binary", "binarymagn", "ranking", "single")}
FORMAT_OPTIONS = {"max_length": 2048, "minibatch_size": 64, "num_train_epochs": 1, "gradient_checkpointing": True}


def formats() -> Iterator[Recipe]:
    for base, (model, chat) in BASES.items():
        yield Recipe(
            f"formats/{base}-sft",
            [
                f"Data-format paper, section 5: {model}, sft.",
                "Its demonstrations are single turns of the Tulu 3 mixture: here the chosen responses stand in.",
                FORMATS["binary"].source,
            ],
            {
                "model_name_or_path": model,
                "tokenizer_name_or_path": Value(chat, "chosen: its chat template, where the paper adds ChatML"),
            }
            | FORMATS["binary"].options
            | {"method": "sft", "learning_rate": 2e-5}
            | FORMAT_OPTIONS,
        )
        start = {"model_name_or_path": Value(f"runs/formats/{base}-sft/model", f"from recipes/formats/{base}-sft.yaml")}
        for name, data in FORMATS.items():
            margin = [] if name == "binary" else ["Margins are part of dpo's likelihood here; the paper's has none."]
            yield Recipe(
                f"formats/{base}-{name}-dpo",
                [f"Data-format paper, section 6: {model}, {data.title}, dpo.", *margin, data.source],
                start | data.options | {"method": "dpo", "learning_rate": 1e-6} | FORMAT_OPTIONS,
            )
            if base.startswith("llama"):  # the only ones in Table 5
                variant = "" if name == "binary" else " with margin"
                yield Recipe(
                    f"formats/{base}-{name}-bt",
                    [f"Data-format paper, Table 5: {model}, {data.title}{variant}, bt.", data.source],
                    start | data.options | {"method": "bt", "learning_rate": 2e-5} | FORMAT_OPTIONS,
                )


def recipes() -> list[Recipe]:
    return [*dwrl(), *btpo(), *genrm(), *formats()]


def main() -> None:
    made = recipes()
    for recipe in made:
        path = FOLDER / f"{recipe.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(recipe.text, encoding="utf-8")
    for path in set(FOLDER.glob("*/*.yaml")) - {FOLDER / f"{recipe.name}.yaml" for recipe in made}:
        path.unlink()
    print(f"{len(made)} recipes in {FOLDER}")


if __name__ == "__main__":
    main()
