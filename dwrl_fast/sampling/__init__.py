"""Sampling of thoughts: one small interface, and one file per engine."""

from dwrl_fast.sampling.groups import sample_groups
from dwrl_fast.sampling.kept import KeptThoughts
from dwrl_fast.sampling.sampler import Limits, Rating, RatingSampler, Sampler
from dwrl_fast.sampling.split import split
from dwrl_fast.sampling.transformers import TransformersSampler
from dwrl_fast.sampling.tree import TreeSampler

__all__ = [
    "KeptThoughts",
    "Limits",
    "Rating",
    "RatingSampler",
    "Sampler",
    "TransformersSampler",
    "TreeSampler",
    "sample_groups",
    "split",
]
