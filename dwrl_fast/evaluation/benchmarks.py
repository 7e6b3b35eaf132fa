"""RM-Bench and JudgeBench, scored as by their authors.

RM-Bench (THU-KEG/RM-Bench) has three right and three wrong responses per prompt, in the same three styles, from terse
to elaborate. A matrix holds how often right response i beats wrong response j. On its diagonal the styles are the same
(normal), above it the wrong response is more elaborate (hard), below it the right one is (easy). JudgeBench
(ScalerLab/JudgeBench) has pairs of four categories, which follow from the source of a pair.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from dwrl_fast.data import Preference
from dwrl_fast.errors import DataError
from dwrl_fast.evaluation.judged import Judged
from dwrl_fast.evaluation.rewardbench import Benchmark, benchmark, check_rows, rewardbench, rewardbench2
from dwrl_fast.scoring import Kind

Name = Literal["rewardbench", "rewardbench2", "rmbench", "judgebench"]

STYLES = 3
DOMAINS: Mapping[str, str] = {"chat": "chat", "math": "math", "code": "code", "safety": "safety"}
CATEGORIES: Mapping[str, str] = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


def check_benchmark(name: Name, rows: Sequence[Preference]) -> None:
    """Raise DataError if the rows do not belong to the benchmark. Called before the rows are scored."""
    if name == "rewardbench" or name == "rewardbench2":
        check_rows(name, rows)
        return
    for row in rows:
        if name == "rmbench":
            _part(row, DOMAINS, "RM-Bench", "domain")
            if row.ranks != (1,) * STYLES + (2,) * STYLES:
                raise DataError(f"{row.source}: a row of RM-Bench has {STYLES} chosen and {STYLES} rejected responses")
        else:
            _part(row, CATEGORIES, "JudgeBench", "source")
            if len(row.responses) != 2:
                raise DataError(f"{row.source}: a row of JudgeBench has two responses")


def scored_as(name: Name, judged: Sequence[Judged], kind: Kind) -> Benchmark:
    """The score of the benchmark with this name, as defined by its authors. Raises DataError like `check_benchmark`."""
    if name == "rewardbench":
        return rewardbench(judged, kind)
    found: Mapping[str, Callable[[Sequence[Judged]], Benchmark]] = {
        "rewardbench2": rewardbench2,
        "rmbench": rmbench,
        "judgebench": judgebench,
    }
    return found[name](judged)


def rmbench(judged: Sequence[Judged]) -> Benchmark:
    """easy, normal and hard are means over the domains; the headline is the mean of the three. A tie counts as
    wrong.
    """
    wins: dict[str, list[np.ndarray]] = {}
    for row in judged:
        right, wrong = np.array(row.scores[:STYLES]), np.array(row.scores[STYLES:])
        wins.setdefault(_part(row, DOMAINS, "RM-Bench", "domain"), []).append(right[:, None] > wrong[None, :])
    matrices = {name: np.mean(some, axis=0) for name, some in wins.items()}
    levels: Mapping[str, tuple[np.ndarray, ...]] = {
        "easy": np.tril_indices(STYLES, -1),
        "normal": np.diag_indices(STYLES),
        "hard": np.triu_indices(STYLES, 1),
    }
    parts = {level: float(np.mean([matrix[at].mean() for matrix in matrices.values()])) for level, at in levels.items()}
    details = {
        f"{name}, {level}": float(matrix[at].mean())
        for name, matrix in matrices.items()
        for level, at in levels.items()
    }
    whole = np.mean(list(matrices.values()), axis=0)
    details |= {f"chosen {i + 1} over rejected {j + 1}": float(whole[i, j]) for i, j in np.ndindex(STYLES, STYLES)}
    return benchmark("RM-Bench", parts, details, [name for name in DOMAINS.values() if name not in matrices])


def judgebench(judged: Sequence[Judged]) -> Benchmark:
    """Accuracy by category. The headline is the accuracy over all pairs. A tie counts as wrong."""
    right: dict[str, list[bool]] = {}
    for row in judged:
        right.setdefault(_part(row, CATEGORIES, "JudgeBench", "source"), []).append(row.scores[0] > row.scores[1])
    parts = {name: float(np.mean(right[name])) for name in CATEGORIES.values() if name in right}
    counts = {f"pairs of {name}": float(len(right[name])) for name in parts}
    missing = [name for name in CATEGORIES.values() if name not in right]
    overall = float(np.mean([each for some in right.values() for each in some]))
    return benchmark("JudgeBench", parts, counts, missing, overall)


def _part(row: Preference | Judged, known: Mapping[str, str], name: str, column: str) -> str:
    """The part of the benchmark for the subset of a row, found from the beginning of the subset's name."""
    subset = (row.subset or "").casefold()
    found = next((part for start, part in known.items() if subset.startswith(start)), None)
    if found is None:
        raise DataError(
            f"{row.source}: the subset {row.subset!r} is not one of {name}'s ({', '.join(known)}). Leave --benchmark "
            f"out, or name the column with --columns subset={column}"
        )
    return found
