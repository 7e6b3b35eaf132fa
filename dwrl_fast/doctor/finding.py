"""The findings of checks, and the report of all findings."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from dwrl_fast.data.jsonl import finite
from dwrl_fast.ranks import ALONE, Ranks

Status = Literal["pass", "warn", "fail"]
STYLES: dict[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red"}
WIDTH = 21  # the longest name plus two spaces


@dataclass(frozen=True, slots=True)
class Finding:
    """seen: what was found, in words with figures. remedy: what to do; empty if the check passes."""

    name: str
    status: Status
    seen: str
    remedy: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def status_of(value: float, warn: float, fail: float = float("inf")) -> Status:
    """The status of a value that should be small; NaN fails."""
    return "pass" if value <= warn else "warn" if value <= fail else "fail"


def worst(findings: Sequence[Finding], ranks: Ranks) -> list[Finding]:
    """Each finding as the rank has it whose status is the worst; it names that rank if the ranks' statuses differ. All
    ranks call this together, with the same checks.
    """
    found, severities = [], list(STYLES)
    for each in zip(*ranks.gather(findings), strict=True):
        severity = [severities.index(one.status) for one in each]
        rank = severity.index(max(severity))
        named = f"rank {rank}: " if len(set(severity)) > 1 else ""
        found.append(dataclasses.replace(each[rank], seen=named + each[rank].seen))
    return found


class Report:
    """The findings, each printed when it is added, and the checks that were left out, by reason. ranks: they all make
    the report together, and each has the worst findings of all.
    """

    def __init__(self, console: Console, ranks: Ranks = ALONE):
        self.console, self.ranks = console, ranks
        self.findings: list[Finding] = []
        self.left_out: dict[str, list[str]] = {}

    def add(self, *findings: Finding) -> None:
        """Add and print findings. All ranks call this together."""
        for found in worst(findings, self.ranks):
            self.findings.append(found)
            line = Text(f"{found.status}  ", STYLES[found.status]) + Text(f"{found.name:<{WIDTH}}", "bold")
            self.console.print(line + Text(found.seen), soft_wrap=True)
            if found.remedy and found.status != "pass":
                self.console.print(Text(" " * 6 + "-> " + found.remedy), soft_wrap=True)

    def leave_out(self, reason: str, *names: str) -> None:
        """Print in one line which checks do not apply."""
        self.left_out.setdefault(reason, []).extend(names)
        self.console.print(Text(f"left out: {', '.join(names)} ({reason})", "dim"), soft_wrap=True)

    def named(self, status: Status) -> list[str]:
        """The names of the findings of this status."""
        return [found.name for found in self.findings if found.status == status]

    @property
    def summary(self) -> str:
        """The number of findings of each status."""
        counts = Counter(found.status for found in self.findings)
        return ", ".join(f"{counts[status]} {status}" for status in STYLES)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; NaN becomes null."""
        found = {"findings": [dataclasses.asdict(each) for each in self.findings], "left_out": self.left_out}
        return finite(found)
