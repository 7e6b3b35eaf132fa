"""The options of `dwrl_fast.train`. The method's defaults are those of the paper."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dwrl_fast.config.common import CommonOptions, data_option, evaluation_option, model_option, run_option
from dwrl_fast.config.reporting import ReportingOptions
from dwrl_fast.data.mixture import Part, check_evaluated, check_mixture
from dwrl_fast.dialog import Thinking
from dwrl_fast.errors import ConfigError
from dwrl_fast.log import warn_once
from dwrl_fast.methods import METHODS
from dwrl_fast.methods.method_options import method_option
from dwrl_fast.options import FRACTION, OPEN_FRACTION, POSITIVE, Base, at_least, option, parse

# ruff: noqa: RUF009 - what option() returns is a dataclass field

adapters_option = partial(option, group="Adapters", needs=("use_peft", True))
updates_option = partial(option, group="Updates")
optimizer_option = partial(option, group="Optimizer")
ranks_option = partial(option, group="Several GPUs")

NEWEST = ("latest", "auto")  # values of --resume_from_checkpoint that mean the newest intact checkpoint
STREAMING = ("streaming", True)
OWNERS = tuple(dict.fromkeys(owner for method in METHODS.values() for owner in method.options))
if TYPE_CHECKING:  # mypy cannot read computed base classes, so their attributes are listed here
    from dwrl_fast.methods.bt import PrefilledOptions
    from dwrl_fast.methods.dpo import BetaOptions
    from dwrl_fast.methods.dwrl import DualOptions
    from dwrl_fast.methods.method_options import RatioOptions, SamplingOptions, WritingOptions
    from dwrl_fast.methods.star_rationalizer import RationalizerOptions

    MethodName = str

    class MethodOptions(
        WritingOptions, SamplingOptions, RatioOptions, DualOptions, BetaOptions, PrefilledOptions, RationalizerOptions
    ):
        pass

else:
    MethodName = Literal[tuple(METHODS)]
    MethodOptions = dataclasses.make_dataclass(
        "MethodOptions",
        (),
        bases=OWNERS[::-1],
        namespace={"__doc__": "The options of all methods."},
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MethodOptions, ReportingOptions, CommonOptions):
    """The options of `python -m dwrl_fast.train`: its own, and those that the methods declare."""

    command: ClassVar[str] = "python -m dwrl_fast.train"
    summary: ClassVar[str] = (
        "Trains a generative preference model: a language model that writes a thought about a response and then rates"
        " it. Without --dataset_name it runs the embedded task, which needs no files: a tiny model is created, trained"
        " and evaluated in a few minutes. Exit status: 2 if an argument or a file is wrong; 3 if the run ended and"
        " nothing was trained; 130 and 143 after SIGINT and SIGTERM."
    )
    examples: ClassVar[str] = """
# the whole embedded task, with another seed
python -m dwrl_fast.train --seed 1

# your own pairs (JSONL with prompt, chosen, rejected) and a model
python -m dwrl_fast.train --model_name_or_path Qwen/Qwen2.5-3B-Instruct --dataset_name pairs.jsonl \\
    --output_dir runs/mine

# two files, mixed 7 to 3, read on demand
python -m dwrl_fast.train --model_name_or_path Qwen/Qwen2.5-3B-Instruct --output_dir runs/mixed \\
    --dataset_mixture chat.jsonl:0.7:helpfulness maths.jsonl:0.3:correctness --streaming --max_steps 400

# a file of options; the command line changes two of them
python -m dwrl_fast.train --config mine.yaml --learning_rate 1e-6 --alternate joint

# several files, merged from left to right
python -m dwrl_fast.train --config backbone.yaml data.yaml method.yaml --output_dir runs/mine

# one machine with 8 GPUs; the same command resumes an interrupted run
torchrun --nproc-per-node 8 -m dwrl_fast.train --config mine.yaml --output_dir runs/mine \\
    --resume_from_checkpoint auto

# resume an interrupted run from its last checkpoint
python -m dwrl_fast.train --config runs/mine/config.yaml --resume_from_checkpoint latest
"""

    model_name_or_path: str | None = model_option(
        None,
        "A causal language model: a local folder, a hub name, or a local FILE.gguf, whose weights are dequantised. "
        "Code that comes with a model is never run. A folder of LoRA adapters is loaded as the merged model.",
    )
    model_config: str | None = model_option(
        None, "A config.json: the model is initialised at random from --seed. Replaces --model_name_or_path."
    )
    tokenizer_name_or_path: str | None = model_option(
        None, "The tokenizer, if it is not in the model's folder. It must have a chat template."
    )
    use_liger_kernel: bool = model_option(
        False,
        "Use Liger's Triton kernels for norms, rotary embedding and gated MLP. Needs CUDA and liger-kernel.",
    )
    gradient_checkpointing: bool = model_option(
        False, "Recompute activations in the backward pass: about a third more time, far less memory."
    )

    use_peft: bool = option(
        False,
        "Train LoRA adapters (peft) on a frozen model instead of the model itself. Uses far less memory; use "
        "learning rates about ten times higher. The scalar head of bt is trained in full. OUTPUT_DIR/model holds the "
        "merged model, OUTPUT_DIR/adapter and the checkpoints only the adapters.",
        group="Adapters",
    )
    lora_r: int = adapters_option(16, "Rank of the adapters.", bound=at_least(1))
    lora_alpha: int = adapters_option(32, "The adapters' output is scaled by lora_alpha / lora_r.", bound=at_least(1))
    lora_dropout: float = adapters_option(0.0, "Must be 0; docs/methods.md explains why.", bound=at_least(0))
    lora_target_modules: tuple[str, ...] = adapters_option(
        (), "Names of the linear layers that get adapters: q_proj v_proj. none: all except the head."
    )
    load_in_4bit: bool = adapters_option(
        False, "Keep the frozen model in 4 bits (NF4), as QLoRA does. Needs bitsandbytes."
    )

    dataset_name: str | None = data_option(
        None,
        "Preference data: JSON lines, JSON, CSV or Parquet, a folder saved by the datasets library, or NAME:SPLIT of "
        "the Hugging Face hub. The column names identify the format, for example prompt, chosen and rejected. "
        "docs/data.md lists all formats and layouts.",
    )
    dataset_mixture: tuple[Part, ...] = data_option(
        (),
        "Several files instead of --dataset_name, each as FILE:WEIGHT or FILE:WEIGHT:ASPECT. At any point of the run "
        "each file has given its share of the rows to within one row. The aspect applies to rows without an aspect "
        "column. In YAML also {dataset_name: FILE, weight: 0.7, aspect: TEXT}.",
    )
    streaming: bool = data_option(
        False,
        "Read rows on demand, in constant memory. Needs --max_steps. Rows are shuffled within a buffer; a row that "
        "is too long is dropped and counted when it is drawn. The file must not change during the run.",
    )
    shuffle_buffer_size: int = data_option(
        10_000,
        "Rows of each file in the shuffle buffer. Training starts once it is full.",
        bound=at_least(1),
        needs=STREAMING,
    )
    eval_dataset_name: tuple[Part, ...] = data_option(
        (),
        "Held-out preference data in the same formats: FILE, or FILE::ASPECT. Several files are also evaluated one by "
        "one. Without this option nothing is evaluated.",
    )
    aspect: str | None = data_option(
        None,
        "The criterion for judging. none: the aspect that the model was trained on before, or helpfulness. A column "
        "named aspect sets it for each row.",
    )
    template: str | None = data_option(
        None,
        "The turns that ask the model to judge: the name of a packaged template, or a YAML file like those in "
        "dwrl_fast/templates. none: the template the model was trained with before, or dialog.",
    )
    enable_thinking: Thinking = data_option(
        "auto",
        "Whether a thought may start with a think block, for chat templates that support enable_thinking (Qwen3) or "
        "open one (DeepSeek-R1). auto: as the model was trained before; otherwise off if the template has the choice.",
    )

    method: MethodName = method_option(
        "dwrl", ". ".join(f"{name}: {method.summary}" for name, method in METHODS.items()) + "."
    )

    rollout_batch_size: int = updates_option(
        256,
        "Preference groups per rollout batch: their thoughts are sampled with the same weights. For the star methods "
        "a rollout batch is a round. The papers' three rounds over disjoint thirds are a third of the rows, rounded "
        "up to a multiple of --minibatch_size, with --num_train_epochs 1.",
        bound=at_least(1),
    )
    minibatch_size: int = updates_option(
        32, "Preference groups per update. Must divide --rollout_batch_size.", bound=at_least(1)
    )
    num_train_epochs: int = updates_option(2, "Passes over the data.", bound=at_least(1))
    max_steps: int = updates_option(
        -1, "Number of rollout batches. Overrides --num_train_epochs. -1: use the epochs.", bound=at_least(-1)
    )
    max_minutes: float | None = updates_option(
        None,
        "Time limit of training in minutes. No rollout batch starts that would not end in time, judged by the one "
        "before it. Evaluation and the last checkpoint come on top. The learning rate falls over the time or the "
        "rows, whichever ends first, so the result depends on the machine's speed. A resumed run has the remaining "
        "time.",
        bound=POSITIVE,
    )

    learning_rate: float = optimizer_option(5e-7, "Peak learning rate of AdamW.", bound=POSITIVE)
    adam_beta1: float = optimizer_option(0.9, "Decay rate of AdamW's first moment.", bound=OPEN_FRACTION)
    adam_beta2: float = optimizer_option(0.999, "Decay rate of AdamW's second moment.", bound=OPEN_FRACTION)
    adam_epsilon: float = optimizer_option(
        1e-8, "Epsilon of AdamW, added to the square root of the second moment.", bound=POSITIVE
    )
    weight_decay: float = optimizer_option(
        0.0, "Weight decay of AdamW, multiplied by the learning rate.", bound=at_least(0)
    )
    max_grad_norm: float = optimizer_option(1.0, "Gradients are clipped to this norm in each update.", bound=POSITIVE)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = optimizer_option(
        "linear", "Shape of the learning-rate decay, from the peak to the end of the run."
    )
    warmup_steps: int = optimizer_option(
        0, "Minibatches of linear warm-up from 0 to the peak learning rate.", bound=at_least(0)
    )
    min_learning_rate_ratio: float = optimizer_option(
        0.0, "Final learning rate as a fraction of the peak.", bound=FRACTION
    )

    eval_steps: int = evaluation_option(
        0, "Rollout batches between evaluations. 0: only before and after training.", bound=at_least(0)
    )

    output_dir: str | None = run_option(
        None, "Output folder. Only one run at a time may write to it. none: runs/METHOD-TIME."
    )
    save_steps: int = run_option(20, "Rollout batches between checkpoints. 0: only at the end.", bound=at_least(0))
    save_updates: int = run_option(
        0,
        "Updates between checkpoints within a rollout batch. Such a checkpoint also holds the batch's thoughts. 0: no "
        "checkpoints within a rollout batch.",
        bound=at_least(0),
    )
    save_total_limit: int | None = run_option(
        2,
        "Checkpoints to keep: the newest ones, and the best one of --eval_steps. Each takes 12 bytes a parameter. "
        "none: all.",
        bound=at_least(1),
    )
    async_save: bool = run_option(
        True,
        "Write checkpoints in the background, from a copy in CPU memory (12 bytes a parameter). With several processes "
        "training waits until they are written.",
    )
    resume_from_checkpoint: str | None = run_option(
        None,
        "Checkpoint folder to resume from, or latest: the newest undamaged checkpoint in --output_dir. Damaged newer "
        "ones are renamed. The resumed run equals an uninterrupted one bit for bit. With latest, a run without "
        "checkpoints starts from the beginning, and a finished run is left as it is. auto: like latest, without a "
        "warning when there is no checkpoint yet.",
    )
    resume_anyway: bool = run_option(
        False,
        "Resume even if the data set, template, tokenizer, base model or options differ from the checkpoint's. The "
        "consequences are reported.",
    )
    skip_bad_batches: int = run_option(
        0,
        "Number of batches that may be skipped because a log-prob, a loss or a gradient is not finite. Each is written "
        "to OUTPUT_DIR/bad_batches. One more ends the run.",
        bound=at_least(0),
    )

    cpu_offload: bool = ranks_option(
        False,
        "Keep this rank's shard of weights, gradients and optimizer states in CPU memory (16 bytes a parameter over "
        "all ranks) and copy layers to the GPU on demand. Needs CUDA and torchrun.",
    )
    reshard_after_backward: bool = ranks_option(
        True,
        "Free a layer's gathered weights after its backward pass. off: keep them between micro-batches, which saves "
        "one of two all-gathers per micro-batch and costs 2 bytes a parameter of the whole model on every GPU in "
        "bf16, 4 in fp32.",
    )
    hsdp: bool = ranks_option(
        False,
        "On several machines, let each machine hold a whole model, sharded over its own GPUs: weights are gathered "
        "within a machine, and only gradients cross between machines. Takes as much memory as on one machine. Needs "
        "torchrun on two machines or more.",
    )
    ddp_timeout: int = ranks_option(
        7200,
        "Seconds that a rank waits for the others before it stops. Must exceed the longest step of a single rank: "
        "sampling its share of a rollout batch, or writing a checkpoint.",
        bound=at_least(1),
    )

    dry_run: bool = run_option(
        False,
        "Check options, data and template, and report what the run would be. Nothing is trained or written. If the "
        "weights are in a local folder, they are loaded, and packing, sampling and saving are tried on a few tokens. "
        "The tokenizer is needed; if the model's cannot be reached, give --tokenizer_name_or_path.",
    )

    easy_fraction: float = option(
        0.7,
        "Share of easy pairs: those whose wrong answer could not be right for any question.",
        group="Embedded task",
        bound=FRACTION,
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
        if self.resume_from_checkpoint in NEWEST and self.output_dir is None:
            raise ConfigError(
                f"resume_from_checkpoint = {self.resume_from_checkpoint}: give --output_dir, the folder of the run "
                "that is to go on."
            )
        self.say_without_effect()

    def _validate_sources(self) -> None:
        """Check that a model and data are given together, or neither: the embedded task creates both."""
        self._refuse_two_models()
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
        """The option that names the training data (or the evaluation data, for a method that trains nothing); empty for
        the embedded task.
        """
        if not METHODS[self.method].trains and self.eval_dataset_name:
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
        if self.use_peft and not METHODS[self.method].trains:
            raise ConfigError(f"use_peft with method = {self.method}, which trains nothing: leave it out.")
        self._refuse_drawn_base()

    def refusal(self, *, sharded: bool, cuda: bool) -> str:
        """Why a model with these options cannot be placed, and what to do; empty if it can. sharded: over the processes
        that torchrun started. cuda: whether the device is a GPU.
        """
        if self.cpu_offload and not (sharded and cuda):
            return "cpu_offload needs GPUs and processes started by torchrun. Leave it out."
        if self.cpu_offload and self.use_liger_kernel:
            return "use_liger_kernel needs the model on the GPU, and cpu_offload keeps it on the CPU. Leave one out."
        if self.load_in_4bit and sharded:
            return "load_in_4bit: weights in 4 bits are not sharded. Leave it out, or use one process without torchrun."
        return ""

    def _refuse_two_models(self) -> None:
        if self.model_name_or_path is not None and self.model_config is not None:
            raise ConfigError(
                "model_name_or_path and model_config exclude each other: the first brings its weights, those of the"
                " second are drawn."
            )

    def _refuse_drawn_base(self) -> None:
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
        method = METHODS[self.method]
        if not method.trains and not self.own_data:
            raise ConfigError(
                f"method = {self.method} trains nothing and only evaluates: give --model_name_or_path, the model that "
                "judges, and --eval_dataset_name, the pairs to judge."
            )
        if not method.trains and (self.dataset_name or self.dataset_mixture):
            warn_once(f"dataset_name and dataset_mixture have no effect here: {self.method} trains nothing.")
        method.validate(self)
        model = self.model_config or self.model_name_or_path
        if self.push_to_hub and self.prefilled_thoughts and (model is None or Path(model).exists()):
            raise ConfigError(
                "push_to_hub with prefilled_thoughts: the model scores only together with the model that writes its "
                f"thoughts, {model or 'the embedded model'}, which is on this machine and is not uploaded. Name a "
                "model of the hub by --model_name_or_path, or leave push_to_hub out."
            )

    @classmethod
    def needs(cls, f: dataclasses.Field) -> tuple[str, str | bool | tuple[str, ...]] | None:
        """As declared by the option, otherwise the methods that use the class which declares the option."""
        own = super().needs(f)
        owner = next((each for each in OWNERS if f.name in each.__annotations__), None)
        if own is not None or owner is None:
            return own
        return "method", tuple(name for name, method in METHODS.items() if owner in method.options)

    def without_effect(self) -> dict[str, str]:
        taken = METHODS[self.method].takes(self)
        found = {name: need for name, need in super().without_effect().items() if name not in taken}
        untold = () if self.report_to else ("project", "run_name")
        return found | {name: "report_to" for name in untold if self.changed(name)}


def parse_train(argv: Sequence[str], base: Base | None = None) -> TrainConfig:
    """The training options of a command line (without the program's name); see `options.parse`."""
    return parse(TrainConfig, argv, base)
