"""The processes of one run: what they tell each other, and how they start and end."""

from dwrl_fast.ranks.launch import culprit, start, stop
from dwrl_fast.ranks.ranks import ALONE, Ranks

__all__ = ["ALONE", "Ranks", "culprit", "start", "stop"]
