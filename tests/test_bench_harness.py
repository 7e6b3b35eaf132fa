"""The benchmark harness: its counts are right, and it detects a variant that computes something else."""

import torch
from torch import Tensor

from bench.harness import Case, Variant, matrix_products, measure


def test_bytes_follow_the_dtype() -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        a, b = torch.ones(4, 8, dtype=dtype), torch.ones(8, 3, dtype=dtype)
        found = matrix_products(lambda a=a, b=b: a @ b, unit=24)  # type: ignore[misc]
        assert found == {"products": 1, "rows": 4, "bytes": size * (32 + 24 + 12)}


def test_a_disagreeing_variant_is_found_out() -> None:
    right = torch.arange(1.0, 9)

    def broken(at: int, value: float) -> tuple[Tensor]:
        wrong = right.clone()
        wrong[at] = value
        return (wrong,)

    variants = [
        Variant("first", lambda: (right,)),
        Variant("rounded", lambda: (right * (1 + 1e-6),)),
        Variant("wrong", lambda: broken(7, 0.0)),
        Variant("nan", lambda: broken(0, torch.nan)),
        Variant("shape", lambda: (right[:4],)),
        Variant("other", lambda: (right[:4],), comparable=False),
    ]
    rows = list(measure(Case("case", lambda: variants), repeats=1, seconds=1.0, quick=False))
    assert {row.variant for row in rows if row.disagrees} == {"wrong", "nan", "shape"}
    assert all(row.beyond_bytes is None or row.beyond_bytes <= (row.peak_bytes or 0) for row in rows)
