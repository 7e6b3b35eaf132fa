"""Reads preference data from files into validated groups. Every dropped row is reported."""

from dwrl_fast.data.judgements import Demonstration
from dwrl_fast.data.locations import open_rows
from dwrl_fast.data.preference import Cluster, Dataset, Message, Preference, Rankings, Ties
from dwrl_fast.data.reading import Outcome, Reader, read_preferences
from dwrl_fast.data.row_source import START, Position, Row, RowSource

__all__ = [
    "START",
    "Cluster",
    "Dataset",
    "Demonstration",
    "Message",
    "Outcome",
    "Position",
    "Preference",
    "Rankings",
    "Reader",
    "Row",
    "RowSource",
    "Ties",
    "open_rows",
    "read_preferences",
]
