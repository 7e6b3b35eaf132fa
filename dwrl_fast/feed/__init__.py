"""Feeds training with rows, batch by batch: from memory or from a stream, from one file or from a mixture."""

from dwrl_fast.feed.feed import Feed
from dwrl_fast.feed.memory import Shuffled
from dwrl_fast.feed.opening import open_feed, read_rows
from dwrl_fast.feed.shared_prompts import warn_of_shared_prompts
from dwrl_fast.feed.source import Source
from dwrl_fast.feed.stream import Streamed

__all__ = ["Feed", "Shuffled", "Source", "Streamed", "open_feed", "read_rows", "warn_of_shared_prompts"]
