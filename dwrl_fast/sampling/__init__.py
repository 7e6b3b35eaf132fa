"""Sampling thoughts. One small interface; each engine is a file beside it."""

from dwrl_fast.sampling.groups import sample_groups
from dwrl_fast.sampling.sampler import Sampler
from dwrl_fast.sampling.transformers import TransformersSampler

__all__ = ["Sampler", "TransformersSampler", "sample_groups"]
