"""Turns preferences into requests for thoughts, or into sequences to score, and turns sampled thoughts and their
requests into groups. Pure functions and immutable records: nothing here samples, writes files or runs a model.
"""

from dwrl_fast.encode.comparisons import Comparison, both_orders, drawn_orders
from dwrl_fast.encode.completions import completion_groups, plain_groups
from dwrl_fast.encode.demonstrations import demonstration_group
from dwrl_fast.encode.fitting import drop_long, fit
from dwrl_fast.encode.group import Group
from dwrl_fast.encode.record import group_of, group_record
from dwrl_fast.encode.request import (
    Request,
    closed_groups,
    comparison_requests,
    label_groups,
    read_thoughts,
    response_requests,
)
from dwrl_fast.encode.thought import Thought

__all__ = [
    "Comparison",
    "Group",
    "Request",
    "Thought",
    "both_orders",
    "closed_groups",
    "comparison_requests",
    "completion_groups",
    "demonstration_group",
    "drawn_orders",
    "drop_long",
    "fit",
    "group_of",
    "group_record",
    "label_groups",
    "plain_groups",
    "read_thoughts",
    "response_requests",
]
