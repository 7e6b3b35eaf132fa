"""A tiny model and pairs, created quickly, for the tests of training."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dwrl_fast.config import TrainConfig
from dwrl_fast.data import Preference, read_preferences
from dwrl_fast.dialog import Dialog, Template
from dwrl_fast.embedded.arrays import EVALUATE, RATE
from dwrl_fast.embedded.task import draw_claims, prompts, write_pairs, write_rows
from dwrl_fast.embedded.tokenizer import IDS, make_tokenizer
from dwrl_fast.models.model import GenerativeModel
from dwrl_fast.models.pretrained import save_pretrained


def tiny_dialog() -> Dialog:
    return Dialog(make_tokenizer(), Template(EVALUATE, RATE), "correctness")


def tiny_model(seed: int = 0, head: int = 8) -> GenerativeModel:
    """A random model with weights so large that thoughts, labels and responses differ in probability."""
    config = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=2 * head,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IDS["<|end|>"],
        pad_token_id=IDS["<|pad|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GenerativeModel(LlamaForCausalLM(config))


def tiny_folder(folder: Path, seed: int = 0, head: int = 8) -> Path:
    """A model folder as `train` writes and reads it."""
    card = {"method": "dwrl", "score_normalization": "vocab", "temperature": 1.0, "max_completion_length": 6}
    save_pretrained(folder, tiny_model(seed, head), tiny_dialog(), card)
    return folder


def tiny_pairs(path: Path, count: int = 12, seed: int = 0) -> Path:
    write_pairs(path, *draw_claims(prompts("train"), count, 0.5, np.random.default_rng(seed)))
    return path


RULE = "7316905824"  # the digits, best first


def ruled_pairs(path: Path, split: str, count: int, seed: int = 0) -> Path:
    """Pairs of digits with prompts of one split. The better digit comes first in RULE. Splits share no prompt."""
    rng = np.random.default_rng(seed)
    asked = rng.permutation(prompts(split))[:count]
    places = [sorted(rng.choice(len(RULE), 2, replace=False)) for _ in asked]
    write_rows(path, ((digits, RULE[i], RULE[j], "ruled") for digits, (i, j) in zip(asked, places, strict=True)))
    return path


def tiny_rows(folder: Path, count: int = 12) -> list[Preference]:
    return read_preferences(tiny_pairs(folder / "pairs.jsonl", count)).rows


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        model_name_or_path=str(folder / "tiny"),
        dataset_name=str(folder / "pairs.jsonl"),
        max_completion_length=6,
        num_generations=3,
        rollout_batch_size=4,
        minibatch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        token_budget=400,
        save_total_limit=None,
    )
    return dataclasses.replace(base, **changes)
