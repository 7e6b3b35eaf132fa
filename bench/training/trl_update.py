"""TRL's policy update: `GRPOTrainer`'s loss and backward pass, on inputs in its own form."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.operators.peers import NEEDS_CUDA
from bench.training import lengths
from bench.training.flops import attended_keys, head_flops, trunk_flops
from bench.training.update import COUNTERS, Setting, Way, accumulated, powers, sharing_weights, without_gradients
from dwrl_fast.dialog import TokenSequence

PAD = 0


def trl_missing() -> str:
    """The reason why TRL's update cannot run here; empty if it can."""
    return "" if find_spec("trl") else "trl is not installed"


def trl(it: Setting, liger: bool) -> Iterator[Way]:
    """TRL's update in micro-batches of 4, 8 ... thoughts; with Liger's layers if a GPU can run them."""
    sequences = [sequence for group in it.groups for sequence in group.flat]
    advantages = torch.randn(len(sequences), generator=torch.Generator().manual_seed(0))
    trainer = grpo_trainer(sharing_weights(it.lm), liger)

    def run(found: Way) -> object:
        with without_gradients(trainer.model):
            return found.run()

    for size in powers(lengths.THOUGHTS, len(sequences)):
        found = trl_update(trainer, sequences, it.old, advantages, size)
        yield found._replace(note=f"{found.note}, {liger_note(liger)}", run=partial(run, found))


def liger_installed() -> bool:
    """Whether Liger's layers are available."""
    return find_spec("liger_kernel") is not None


def liger_note(liger: bool) -> str:
    """A note about Liger's layers: whether they are used, and if not, why."""
    installed = "" if liger_installed() else ": it is not installed"
    return "Liger on" if liger else f"Liger off{installed if torch.cuda.is_available() else f': {NEEDS_CUDA}'}"


def trl_update(
    trainer: Any, sequences: Sequence[TokenSequence], old: Sequence[Tensor], advantages: Tensor, size: int
) -> Way:
    """One pass of `trainer` over `sequences` in micro-batches of `size`: forward and backward, without an optimizer
    step. It returns the loss, a mean over sequences of means over tokens.

    The completion is the thought and the prompt is everything before it; everything after the thought is left out.
    Every micro-batch is padded separately, as TRL does with steps_per_generation=1; by default TRL pads the prompts of
    a whole accumulation window to the longest. Without CUDA its head computes every position, including prompts.
    """
    lm = trainer.model
    micro_batches = [
        prepared(sequences[i : i + size], old[i : i + size], advantages[i : i + size], lm.device)
        for i in range(0, len(sequences), size)
    ]

    def run() -> Tensor:
        trainer.current_gradient_accumulation_steps = len(micro_batches)
        lm.zero_grad(set_to_none=True)
        losses = (trainer.compute_loss(lm, inputs) for inputs in micro_batches)
        return accumulated(losses, trainer.accelerator.backward)

    stops = [sequence.thought.stop for sequence in sequences]
    computed = sum(x["prompt_ids"].numel() + x["completion_ids"].numel() for x in micro_batches)
    scored = sum(map(len, old)) if torch.cuda.is_available() else computed - len(sequences)
    gflop = (trunk_flops(lm, sum(stops), attended_keys(stops)) + head_flops(lm, scored)) / 1e9
    counters = dict(zip(COUNTERS, (computed, sum(stops), scored, computed - sum(stops)), strict=True))
    return Way(f"micro-batches of {size} thoughts", run, counters | {"model GFLOP": gflop, "naive GFLOP": gflop})


def prepared(
    sequences: Sequence[TokenSequence], old: Sequence[Tensor], advantages: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """A micro-batch in TRL's form."""
    from trl.trainer.utils import pad

    prompts = [torch.tensor(s.ids[: s.thought.start]) for s in sequences]
    completions = [torch.tensor(s.ids[s.thought]) for s in sequences]
    found = {
        "prompt_ids": pad(prompts, padding_value=PAD, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(x) for x in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(completions, padding_value=PAD, padding_side="right"),
        "completion_mask": pad([torch.ones_like(x) for x in completions], padding_value=0, padding_side="right"),
        "old_per_token_logps": pad(old, padding_value=0.0, padding_side="right"),
        "advantages": advantages,
    }
    return {key: value.to(device) for key, value in found.items()}


def grpo_trainer(lm: Any, liger: bool = False, **options: Any) -> Any:
    """A `GRPOTrainer` for `lm` (which it patches), in the state in which its training loop calls `compute_loss`.
    options: override its configuration.
    """
    from datasets import Dataset
    from transformers.integrations.liger import apply_liger_kernel
    from trl import GRPOConfig, GRPOTrainer

    from dwrl_fast.embedded.tokenizer import make_tokenizer

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", FutureWarning)
        settings: dict[str, Any] = {
            "num_generations": 2,  # for its sampling, which `trl_update` does not use, like its batches
            "beta": 0.0,
            "loss_type": "grpo",
            "use_liger_kernel": liger,
            "gradient_checkpointing": lm.is_gradient_checkpointing,
            "bf16": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
        }
        arguments = GRPOConfig(output_dir=folder, **settings | options)
        trainer = GRPOTrainer(
            model=lm,
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],  # for its sampling
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=make_tokenizer(),
        )
    if liger:
        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    trainer.model.train()
    return trainer
