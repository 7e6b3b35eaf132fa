"""The processes of one run: communication, start and end."""

from dwrl_fast.ranks.launch import culprit, mesh_of, start, stop
from dwrl_fast.ranks.ranks import ALONE, Ranks

__all__ = ["ALONE", "Ranks", "culprit", "mesh_of", "start", "stop"]
