"""Conversations as token ids with named spans: the dialog of DWRL, and the single-turn prompts of other methods."""

from dwrl_fast.dialog.chat import DEFAULT_ASPECT, Chat, Thinking, named_aspect
from dwrl_fast.dialog.dialog import Dialog
from dwrl_fast.dialog.sequence import Context, TokenSequence
from dwrl_fast.dialog.single_turn import SingleTurn
from dwrl_fast.dialog.verdict import read_choice, read_score, write_choice, write_score
from dwrl_fast.templates import Template, load_template

__all__ = [
    "DEFAULT_ASPECT",
    "Chat",
    "Context",
    "Dialog",
    "SingleTurn",
    "Template",
    "Thinking",
    "TokenSequence",
    "load_template",
    "named_aspect",
    "read_choice",
    "read_score",
    "write_choice",
    "write_score",
]
