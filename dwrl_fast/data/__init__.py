"""Preference data: files in, validated groups out, nothing dropped in silence."""

from dwrl_fast.data.jsonl import read_preferences
from dwrl_fast.data.preference import Dataset, Message, Preference

__all__ = ["Dataset", "Message", "Preference", "read_preferences"]
