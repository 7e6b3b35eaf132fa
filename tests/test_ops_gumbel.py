"""gumbel_pick: Philox against published numbers, draws that follow the softmax, and independence of other rows."""

import os

import pytest
import torch
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.errors import UserError
from dwrl_fast.ops import extension, oracle

built = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")
BACKENDS = [pytest.param("cpu", marks=built), "reference"]


def pick(logprob: Tensor, keys: Tensor, position: int, backend: str = "auto") -> Tensor:
    return ops.gumbel_pick(logprob, keys, torch.full_like(keys, position), backend=backend)


def keys_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def test_philox_gives_its_published_numbers() -> None:
    """The known answer of Random123 with a counter that ends in two zero words."""
    found = oracle.philox(torch.tensor([0]), torch.tensor([0]), 0)
    assert [int(word) for word in found] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def philox_by_hand(key: int, low: int, high: int) -> list[int]:
    """Philox as defined in its paper, with Python's integers."""
    c, k = [low, high, 0, 0], [key % 2**32, (key >> 32) % 2**32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_philox_of_any_key_and_counter() -> None:
    for key in (-1, 1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF):
        for low, high in ((0, 1), (2**32 - 1, 2**32 - 1), (12345, 678)):
            found = oracle.philox(torch.tensor([key]), torch.tensor([low]), high)
            assert [int(word) for word in found] == philox_by_hand(key, low, high)


@built
@pytest.mark.parametrize("v", [1, 2, 5, 97, 4099])
def test_both_backends_draw_the_same(v: int) -> None:
    """An ulp in a logarithm may exchange two tokens with almost equal values. This may happen in one draw at most."""
    logprob = (4 * torch.randn(300, v, generator=torch.Generator().manual_seed(v))).log_softmax(-1)
    found = [
        torch.stack([pick(logprob, keys_of(300), t, backend=name) for t in (0, 1, 2**32 - 1)])
        for name in ("cpu", "reference")
    ]
    assert (found[0] != found[1]).sum() <= 1
    assert int(found[0].min()) >= 0 and int(found[0].max()) < v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("over", ["keys", "positions"])
def test_draws_follow_softmax(backend: str, over: str) -> None:
    """A chi-square test over keys and positions, with tokens as rare as 1 in 100,000."""
    n = 200_000 if over == "keys" else 400
    p = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.008, 0.00199, 0.00001], dtype=torch.float64)
    logprob = p.log().float().expand(n, -1)
    positions = range(1) if over == "keys" else range(500)
    drawn = torch.cat([pick(logprob, keys_of(n), t, backend=backend) for t in positions])
    seen, expected = torch.bincount(drawn, minlength=7).double(), p * len(drawn)
    chi2 = ((seen - expected).square() / expected)[:6].sum()
    assert chi2 < 5 + 4 * 10**0.5
    assert seen[6] <= 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_drawn_alike_in_any_batch(backend: str) -> None:
    logprob = (3 * torch.randn(64, 333, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    keys = keys_of(64)
    whole = pick(logprob, keys, 5, backend=backend)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pick(logprob[order], keys[order], 5, backend=backend), whole[order])
    each = [pick(logprob[i : i + 1], keys[i : i + 1], 5, backend=backend) for i in range(64)]
    assert torch.equal(torch.cat(each), whole)
    places = torch.arange(64) % 7
    mixed = ops.gumbel_pick(logprob, keys, places, backend=backend)
    assert torch.equal(mixed[places == 5], whole[places == 5])
    other = pick(logprob, keys, 6, backend=backend)
    assert (other != whole).any() and (pick(logprob, keys + 1, 5, backend=backend) != whole).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_impossible_and_what_is_certain(backend: str) -> None:
    logprob = torch.full((1000, 9), -torch.inf)
    logprob[:, 4] = 0
    assert (pick(logprob, keys_of(1000), 0, backend=backend) == 4).all()
    logprob[:, 7] = torch.nan
    assert (pick(logprob, keys_of(1000), 0, backend=backend) == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_changes_few_draws(backend: str) -> None:
    """Another batch size changes log-probs by about 1e-6. This changes about the same small share of the draws."""
    g = torch.Generator().manual_seed(0)
    logprob = (2 * torch.randn(20_000, 50, generator=g)).log_softmax(-1)
    off = logprob + 1e-6 * torch.randn(logprob.shape, generator=g)
    pair = [pick(x, keys_of(20_000), 0, backend=backend) for x in (logprob, off)]
    assert (pair[0] != pair[1]).sum() <= 3


def test_what_is_wrong_is_named() -> None:
    logprob, keys = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    for given, said in (
        ((logprob.double(), keys, keys), r"logprob is torch.float64 \[3, 5\]"),
        ((logprob[:, :0], keys, keys), r"logprob is torch.float32 \[3, 0\]"),
        ((logprob, keys[:2], keys), r"keys is torch.int64 \[2\] on cpu; expected int64 \[R = 3\] on cpu"),
        ((logprob, keys.int(), keys), "keys is torch.int32"),
        ((logprob, keys, keys[:2]), r"positions is torch.int64 \[2\] on cpu; expected int64 \[R = 3\] on cpu"),
        ((logprob, keys, keys - 1), "positions hold -1 to -1"),
        ((logprob, keys, keys + 2**32), "positions hold 4294967296 to 4294967296"),
    ):
        with pytest.raises(UserError, match=f"gumbel_pick: {said}"):
            ops.gumbel_pick(*given)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs it")
def test_a_backend_that_cannot_run_is_named() -> None:
    for name, said in (("triton", "cannot run: the tensors are on cpu"), ("best", "it can be auto, reference, cpu")):
        with pytest.raises(UserError, match=f"gumbel_pick: backend .*'?{name}'?.*{said}"):
            pick(torch.zeros(1, 2), keys_of(1), 0, backend=name)
