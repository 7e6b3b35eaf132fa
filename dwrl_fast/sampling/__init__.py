"""Sampling thoughts. One small interface; each engine is a file beside it."""

from dwrl_fast.sampling.groups import sample_groups
from dwrl_fast.sampling.kept import KeptThoughts
from dwrl_fast.sampling.sampler import Sampler
from dwrl_fast.sampling.transformers import TransformersSampler

__all__ = ["KeptThoughts", "Sampler", "TransformersSampler", "sample_groups"]
