"""Preferences and a dialog become what is asked: contexts to sample thoughts for, or sequences to score; and sampled
thoughts close their contexts to groups. Nothing here samples, writes or runs a model.
"""

from dwrl_fast.encode.comparisons import Comparison, both_orders, comparison_contexts, drawn_orders, label_groups
from dwrl_fast.encode.demonstrations import demonstration_group
from dwrl_fast.encode.fitting import drop_long, fit
from dwrl_fast.encode.group import Group
from dwrl_fast.encode.responses import closed_groups, completion_groups, plain_groups, response_contexts
from dwrl_fast.encode.thought import Thought

__all__ = [
    "Comparison",
    "Group",
    "Thought",
    "both_orders",
    "closed_groups",
    "comparison_contexts",
    "completion_groups",
    "demonstration_group",
    "drawn_orders",
    "drop_long",
    "fit",
    "label_groups",
    "plain_groups",
    "response_contexts",
]
