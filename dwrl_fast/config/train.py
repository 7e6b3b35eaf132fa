"""The options of `dwrl_fast.train`. The defaults of the method are the paper's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dwrl_fast.config.common import (
    CONTRASTED,
    DUAL,
    DWRL,
    RATIO,
    WRITING,
    CommonOptions,
    adapters_option,
    data_option,
    dwrl_option,
    embedded_option,
    evaluation_option,
    method_option,
    model_option,
    optimizer_option,
    run_option,
    thoughts_option,
    updates_option,
)
from dwrl_fast.data.mixture import Part, check_evaluated, check_mixture
from dwrl_fast.dialog import Thinking
from dwrl_fast.errors import ConfigError
from dwrl_fast.log import warn_once
from dwrl_fast.options import FRACTION, OPEN_FRACTION, POSITIVE, Base, Bound, at_least, option, parse
from dwrl_fast.registry import MethodName, described

# ruff: noqa: RUF009 - what option() returns is a dataclass field

STREAMING = ("streaming", True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonOptions):
    """The options of `python -m dwrl_fast.train`."""

    command: ClassVar[str] = "python -m dwrl_fast.train"
    summary: ClassVar[str] = (
        "Trains a generative preference model: a language model that writes a thought about a response and then rates"
        " it. Without --dataset_name it runs the embedded task, which needs no files: a tiny model is made, trained and"
        " evaluated in a few minutes. It ends with status 2 where something that was given is wrong, and with 3 where"
        " the run came to its end and nothing was trained in it."
    )
    examples: ClassVar[str] = """
# the embedded task, whole, from another seed
python -m dwrl_fast.train --seed 1

# one's own pairs (JSONL with prompt, chosen, rejected) and a model
python -m dwrl_fast.train --model_name_or_path Qwen/Qwen2.5-3B-Instruct --dataset_name pairs.jsonl \\
    --output_dir runs/mine

# two files, 7 rows of one to 3 of the other, read as they are needed
python -m dwrl_fast.train --model_name_or_path Qwen/Qwen2.5-3B-Instruct --output_dir runs/mixed \\
    --dataset_mixture chat.jsonl:0.7:helpfulness maths.jsonl:0.3:correctness --streaming --max_steps 400

# a file of options, of which the command line changes two
python -m dwrl_fast.train --config mine.yaml --learning_rate 1e-6 --alternate joint

# a run that was interrupted goes on where its last checkpoint stands
python -m dwrl_fast.train --config runs/mine/config.yaml --resume_from_checkpoint latest
"""

    model_name_or_path: str | None = model_option(
        None,
        "A local folder or a hub name of a causal language model, or a local FILE.gguf, whose weights are dequantised. "
        "Code that comes with a model is not run. A folder of LoRA adapters stands for the model that they merge into.",
    )
    model_config: str | None = model_option(
        None, "A config.json whose weights are drawn from --seed, in place of --model_name_or_path."
    )
    tokenizer_name_or_path: str | None = model_option(
        None, "The tokenizer, where it is not in the model's own folder. It must have a chat template."
    )
    use_liger_kernel: bool = model_option(
        False,
        "Liger's Triton kernels for the model's norms, rotary embedding and gated MLP. Needs CUDA and liger-kernel.",
    )
    gradient_checkpointing: bool = model_option(
        False, "Recompute activations in the backward pass: about a third more time for far less memory."
    )

    use_peft: bool = option(
        False,
        "Train LoRA adapters in a frozen model, by peft, in place of the model itself: far less memory, and learning "
        "rates some ten times higher. bt's scalar head trains whole. OUTPUT_DIR/model is merged, OUTPUT_DIR/adapter "
        "holds the adapters alone, as checkpoints do.",
        group="Adapters",
    )
    lora_r: int = adapters_option(16, "Rank of the adapters.", bound=at_least(1))
    lora_alpha: int = adapters_option(
        32, "What the adapters add is multiplied by lora_alpha / lora_r.", bound=at_least(1)
    )
    lora_dropout: float = adapters_option(0.0, "Always 0: see docs/methods.md.", bound=at_least(0))
    lora_target_modules: tuple[str, ...] = adapters_option(
        (), "Linear layers that get adapters, by name: q_proj v_proj. none: all of them but the head."
    )
    load_in_4bit: bool = adapters_option(
        False, "Hold the frozen model in 4 bits (NF4), as QLoRA does. Needs CUDA and bitsandbytes."
    )

    dataset_name: str | None = data_option(
        None,
        "Preferences: JSON lines (.jsonl, .jsonl.gz), a Parquet file, a folder that datasets saved, or NAME:SPLIT of "
        "the Hugging Face hub. The columns say the format, as chosen and rejected do, with a prompt where those do not "
        "hold it; docs/data.md has them all.",
    )
    dataset_mixture: tuple[Part, ...] = data_option(
        (),
        "Several files in place of --dataset_name: FILE:WEIGHT or FILE:WEIGHT:ASPECT each. Of any number of rows each "
        "gives its share to within one row; the aspect is that of its rows that have no column of the name. In YAML "
        "also {dataset_name: FILE, weight: 0.7, aspect: TEXT}.",
    )
    streaming: bool = data_option(
        False,
        "Read rows when they are needed, in constant memory, where a file does not fit: needs --max_steps. Rows are "
        "shuffled within a buffer; an over-long one is found, and counted, when it is its turn. The file must stay as "
        "it is until the run ends.",
    )
    shuffle_buffer_size: int = data_option(
        10_000,
        "Rows of each file among which the next is drawn. The first batch comes once it is full.",
        bound=at_least(1),
        needs=STREAMING,
    )
    eval_dataset_name: tuple[Part, ...] = data_option(
        (),
        "Held-out pairs in the same form; without it nothing is evaluated. Of several files each also gets an accuracy "
        "of its own. FILE, or FILE::ASPECT.",
    )
    aspect: str | None = data_option(
        None,
        "What the model is asked to judge. none: what it was trained on before, else helpfulness. A column named "
        "aspect sets it row by row.",
    )
    template: str | None = data_option(
        None,
        "The turns that make the model judge: the name of a template of the package, or a YAML file like those in "
        "dwrl_fast/templates. none: what it was trained with before, else dialog.",
    )
    enable_thinking: Thinking = data_option(
        "auto",
        "Whether a thought may start with a think block, for chat templates that know enable_thinking (Qwen3) or open "
        "one (DeepSeek-R1). auto: as the model was trained before, else off where the template lets one choose.",
    )

    method: MethodName = method_option("dwrl", described())
    prefilled_thoughts: bool = method_option(
        False,
        "Each response is read with one greedy thought about it, written by the model as it was before training. The "
        "thoughts are kept in prefilled.jsonl in --output_dir; to score later, that model must stay where it is.",
        needs=("method", "bt"),
    )
    beta: float | None = method_option(
        None,
        "How closely DPO holds the policy to its reference: the model before training or, for star-dpo, as it was when "
        "the round's thoughts were sampled. It is no weight of a KL term, as GRPO has one elsewhere. none: 0.22, the "
        "paper's; 0.1 for star-dpo.",
        bound=POSITIVE,
        needs=("method", ("dpo", "star-dpo")),
    )
    rationalizer_model: str | None = method_option(
        None,
        "Another model, a folder or a hub name, that writes the thoughts to imitate. none: the model itself.",
        needs=("method", "star-rationalizer"),
    )
    rationalizer_template: str = method_option(
        "rationalizer",
        "What it is asked: a template of kind rationalizer, by name or as a YAML file. It must lead to the verdict "
        "that --template asks for.",
        needs=("method", "star-rationalizer"),
    )
    num_generations: int = thoughts_option(
        4, "Thoughts sampled for each response, or for each comparison. At least 2.", bound=at_least(1)
    )
    alternate: Literal["minibatch", "rollout", "joint"] = dwrl_option(
        "minibatch",
        "How the two updates take turns, A (scores) and B (thoughts). minibatch: A then B on each minibatch. rollout:"
        " every A of the rollout batch, then every B. joint: both in one update.",
    )
    joint_reward: Literal["centred", "standardised"] = dwrl_option(
        "standardised",
        "The thoughts' advantages: their weights less 1/n, or divided by their spread as well.",
        needs=("alternate", "joint"),
    )
    misalignment_weight: bool = dwrl_option(
        True,
        "Weight each pair by the probability that the model has it the wrong way round. off is the paper's ablation.",
    )
    score_normalization: Literal["vocab", "yes_no"] = dwrl_option(
        "vocab",
        "The score is the log-probability of Yes: over the whole vocabulary (the paper's), or over Yes and No alone.",
    )
    thought_normalization: Literal["paper", "likelihood"] = dwrl_option(
        "paper",
        "paper: thoughts are averaged over n and over their tokens. likelihood: plain sums; A and B together are then"
        " the consistent estimator of the marginal likelihood's gradient, and B is far larger.",
    )
    epsilon: float = thoughts_option(
        0.2, "Clip range of the ratio to the sampling policy: 1 - epsilon.", bound=OPEN_FRACTION, needs=RATIO
    )
    epsilon_high: float | None = thoughts_option(
        None, "The upper side, 1 + epsilon_high. none: as epsilon.", bound=POSITIVE, needs=RATIO
    )
    truncated_thoughts: Literal["keep", "mask"] = thoughts_option(
        "keep",
        "Whether the tokens of a thought cut at --max_completion_length are trained. Masked, it still counts in n and"
        " is scored; the star methods leave it out.",
    )
    old_logprobs: Literal["auto", "recompute", "sampler"] = thoughts_option(
        "auto",
        "Where the sampling policy's log-probabilities come from: recompute takes one more pass before the first "
        "update, sampler keeps the generator's own. auto: sampler where it computes in float32, otherwise recompute.",
        needs=RATIO,
    )

    max_completion_length: int = thoughts_option(
        1000,
        "The most tokens of a thought. One cut here is still followed by the rating turn and scored.",
        bound=Bound("in [1, 1000000]", lambda v: 1 <= v <= 1_000_000),
        needs=WRITING,
    )
    temperature: float = thoughts_option(
        1.0,
        "Of sampled thoughts. Top-k, top-p and penalties are always off, whatever the model's generation_config says:"
        " the thoughts must come from the distribution that is trained.",
        bound=at_least(0.01),
        needs=WRITING,
    )

    rollout_batch_size: int = updates_option(
        256,
        "Preference groups that thoughts are sampled for at once, with the same weights. For the star methods this is "
        "a round: a third of the rows, rounded up to a multiple of --minibatch_size, with --num_train_epochs 1 gives "
        "the papers' three rounds over disjoint thirds, each sampled by the model that the last one left.",
        bound=at_least(1),
    )
    minibatch_size: int = updates_option(
        32, "Preference groups in one update. Must divide --rollout_batch_size.", bound=at_least(1)
    )
    num_train_epochs: int = updates_option(2, "Passes over the data.", bound=at_least(1))
    max_steps: int = updates_option(
        -1, "Stop after so many rollout batches, whatever the epochs. -1: by epochs.", bound=at_least(-1)
    )

    learning_rate: float = optimizer_option(5e-7, "Of AdamW, at its highest.", bound=POSITIVE)
    score_learning_rate: float | None = optimizer_option(
        None, "For update A alone. none: --learning_rate.", bound=POSITIVE, needs=DWRL
    )
    thought_learning_rate: float | None = optimizer_option(
        None, "For update B alone. none: --learning_rate.", bound=POSITIVE, needs=DWRL
    )
    optimizer_state: Literal["shared", "per_phase"] = optimizer_option(
        "shared",
        "Gradients of A are often ten times those of B, and in a shared state A's second moment then starves B. "
        "per_phase keeps AdamW's moments twice: 8 bytes a parameter more.",
        needs=DWRL,
    )
    adam_beta1: float = optimizer_option(0.9, "Decay of AdamW's first moment.", bound=OPEN_FRACTION)
    adam_beta2: float = optimizer_option(0.999, "Decay of AdamW's second moment.", bound=OPEN_FRACTION)
    adam_epsilon: float = optimizer_option(1e-8, "Added to the root of AdamW's second moment.", bound=POSITIVE)
    weight_decay: float = optimizer_option(0.0, "AdamW's, times the learning rate.", bound=at_least(0))
    max_grad_norm: float = optimizer_option(
        1.0, "Gradients are scaled down to this norm, in each update.", bound=POSITIVE
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = optimizer_option(
        "linear", "How the learning rate falls from its highest to the end of the run."
    )
    warmup_steps: int = optimizer_option(
        0, "Minibatches over which the learning rate first rises from 0.", bound=at_least(0)
    )
    min_learning_rate_ratio: float = optimizer_option(
        0.0, "What is left of the learning rate at the end of the run, as a fraction.", bound=FRACTION
    )

    eval_steps: int = evaluation_option(
        0, "Rollout batches between evaluations. 0: only before and after.", bound=at_least(0)
    )
    eval_votes: int = evaluation_option(
        4,
        "Beside the one greedy thought, also so many sampled ones: the mean of p(Yes), or the majority of the "
        "verdicts. 0: greedy only.",
        bound=at_least(0),
        needs=WRITING,
    )

    output_dir: str | None = run_option(
        None, "Where everything is written, by one run at a time. none: runs/METHOD-TIME."
    )
    save_steps: int = run_option(20, "Rollout batches between checkpoints. 0: only at the end.", bound=at_least(0))
    save_total_limit: int | None = run_option(
        2, "Keep so many of the newest checkpoints, each 12 bytes a parameter. none: all of them.", bound=at_least(1)
    )
    resume_from_checkpoint: str | None = run_option(
        None,
        "A checkpoint's folder, or latest: the newest whole one in --output_dir; damaged ones past it are renamed. The "
        "run goes on to the bit. With latest a run that has not begun begins, and a finished one is left as it is.",
    )

    dry_run: bool = run_option(
        False,
        "Train nothing and leave nothing written: check options, data and template, and say what the run would be. "
        "Weights in a local folder are loaded, and the layout, sampling and saving are tried on a few tokens. The "
        "tokenizer is needed; where that of the model cannot be reached give --tokenizer_name_or_path.",
    )

    easy_fraction: float = embedded_option(
        0.7, "Share of pairs whose wrong answer could not be right for any question.", bound=FRACTION
    )

    def validate(self) -> None:
        self._validate_sources()
        self._validate_method()
        self._validate_adapters()
        if self.minibatch_size > self.rollout_batch_size or self.rollout_batch_size % self.minibatch_size:
            raise ConfigError(
                f"minibatch_size = {self.minibatch_size} must divide rollout_batch_size = {self.rollout_batch_size}:"
                " a rollout batch is made of whole minibatches, so that its updates see equally many preference groups."
            )
        if self.max_steps == 0:
            raise ConfigError(
                "max_steps = 0 would train nothing: give a number of rollout batches, or -1 to go by num_train_epochs."
            )
        if self.resume_from_checkpoint == "latest" and self.output_dir is None:
            raise ConfigError(
                "resume_from_checkpoint = latest: give --output_dir, the folder of the run that is to go on."
            )
        for name, need in self.without_effect().items():
            warn_once(f"{name} has no effect here: it applies only with {need}.")

    def _validate_sources(self) -> None:
        """The model and the data belong together; the embedded task has its own of both."""
        if self.model_name_or_path is not None and self.model_config is not None:
            raise ConfigError(
                "model_name_or_path and model_config exclude each other: the first brings its weights, those of the"
                " second are drawn."
            )
        self._validate_files()
        model = self.model_name_or_path or self.model_config
        if self.own_data:
            if model is None:
                raise ConfigError(
                    f"{self.own_data} needs a model: give --model_name_or_path (a folder or a hub name), or "
                    "--model_config (a config.json whose weights are drawn)."
                )
            if self.changed("easy_fraction"):
                raise ConfigError(
                    f"easy_fraction belongs to the embedded task, which --{self.own_data} replaces: leave one of them "
                    "out."
                )
            return
        own = ("model_name_or_path", "model_config", "tokenizer_name_or_path", "eval_dataset_name", "columns")
        stray = [name for name in own if getattr(self, name)]
        own_kind = ("template", "enable_thinking", "ties", "rankings", "streaming", "shuffle_buffer_size")
        stray += [name for name in own_kind if self.changed(name)]
        if stray:
            raise ConfigError(
                f"{' and '.join(stray)} without dataset_name: the embedded task makes its own model and data. Give"
                " --dataset_name to train on pairs of your own."
            )

    @property
    def own_data(self) -> str:
        """The option that names the data to train on (of `judge`, to evaluate on); empty for the embedded task."""
        if self.method == "judge" and self.eval_dataset_name:
            return "eval_dataset_name"
        return "dataset_name" if self.dataset_name is not None else "dataset_mixture" if self.dataset_mixture else ""

    def _validate_adapters(self) -> None:
        if self.lora_dropout:
            raise ConfigError(
                f"lora_dropout = {self.lora_dropout}: under dropout the log-probabilities of a thought would not be "
                "those it was sampled with, and no ratio between the two would be right. Leave it at 0."
            )
        if self.load_in_4bit and not self.use_peft:
            raise ConfigError("load_in_4bit without use_peft: weights in 4 bits cannot be trained. Add --use_peft.")
        if self.use_peft and self.method == "judge":
            raise ConfigError("use_peft with method = judge, which trains nothing: leave it out.")
        if self.use_peft and self.model_config is not None:
            raise ConfigError(
                "use_peft with model_config: adapters belong to a model that is kept, and that one is drawn. Give "
                "--model_name_or_path."
            )

    def _validate_files(self) -> None:
        if self.dataset_mixture:
            if self.dataset_name is not None:
                raise ConfigError("dataset_name and dataset_mixture exclude each other: put the file into the mixture.")
            check_mixture(self.dataset_mixture)
        if self.streaming and self.max_steps < 0:
            raise ConfigError(
                "streaming needs max_steps: how many rows a file has is not known before it is read, and the learning "
                "rate falls over the whole run. Give --max_steps, in rollout batches of --rollout_batch_size rows."
            )
        check_evaluated("eval_dataset_name", self.eval_dataset_name)

    def _validate_method(self) -> None:
        if self.method in CONTRASTED and self.num_generations < 2:
            raise ConfigError(
                "num_generations = 1: with one thought there is nothing to compare it with (its weight is 1 and its "
                "advantage 0), so that no thought would be learnt. Give at least 2 (the papers use 4)."
            )
        if self.method == "btpo":
            self._make_joint()
        if self.method == "judge" and not self.own_data:
            raise ConfigError(
                "method = judge trains nothing and only evaluates: give --model_name_or_path, the model that judges, "
                "and --eval_dataset_name, the pairs to judge."
            )
        if self.method == "judge" and (self.dataset_name or self.dataset_mixture):
            warn_once("dataset_name and dataset_mixture have no effect here: judge trains nothing.")
        if self.prefilled_thoughts and self.model_config is not None:
            raise ConfigError(
                "prefilled_thoughts with model_config: the thoughts are written by the model before training, which "
                "must be found again to score later. Give it as --model_name_or_path."
            )
        if self.method not in DUAL:
            return
        phased = [name for name in ("score_learning_rate", "thought_learning_rate") if getattr(self, name) is not None]
        phased += ["optimizer_state = per_phase"] if self.optimizer_state == "per_phase" else []
        if self.alternate == "joint" and phased:
            raise ConfigError(
                f"{' and '.join(phased)} with alternate = joint: its one update holds both terms, and has one"
                " learning rate and one optimizer state. Use --learning_rate and --optimizer_state shared, or another"
                " --alternate."
            )

    def _make_joint(self) -> None:
        """`btpo` names one setting of `dwrl`'s options; what contradicts it is refused."""
        contrary = {"alternate": ("joint", self.alternate == "rollout" or "alternate" in self.explicit)}
        contrary["joint_reward"] = ("standardised", True)
        for name, (value, given) in contrary.items():
            if given and getattr(self, name) != value:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} with method = btpo, which is dwrl with {name} = {value}: leave it "
                    "out, or use --method dwrl."
                )
        object.__setattr__(self, "alternate", "joint")

    def without_effect(self) -> dict[str, str]:
        unmet = super().without_effect()
        written = ("max_completion_length", "generation_batch_size") if self.prefilled_thoughts else ()
        return {name: need for name, need in unmet.items() if name not in written or self.method != "bt"}


def parse_train(argv: Sequence[str], base: Base | None = None) -> TrainConfig:
    """The training options of a command line (without the program's name); see `options.parse`."""
    return parse(TrainConfig, argv, base)
