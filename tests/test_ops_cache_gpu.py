"""The Triton kernels of cache_attention on a GPU, against float64.

Their bodies run on the CPU too, in float32 on small trees, through Triton's interpreter, which test_ops_triton.py
starts. Its products of bfloat16 are wrong, so those are tested only on a GPU.
"""

import os
from importlib.metadata import version
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attention_cases import OPTIONS, TREES, Plan, drawn, inputs, plan_of
from cache_cases import Cache, assert_accurate, found, limit, ways
from dwrl_fast.kernels import cache as kernels
from dwrl_fast.kernels.attention import Blocks
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.errors import UserError
from dwrl_fast.ops import CacheStep

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
    pytest.skip("the interpreter of Triton 3.6 has no loop to a number that was loaded", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
on_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has neither bfloat16 products nor streams")
FLOAT32, BF16 = torch.float32, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [FLOAT32] if INTERPRETED else [FLOAT32, BF16], ids=str)
GROUP = plan_of([(20, -1), (9, 0), (66, 1), (5, 1), (1, 0), (7, -1)])
FORESTS = {"a small group": GROUP} | (
    {"empty nodes": TREES["empty nodes"]} if INTERPRETED else {n: TREES[n] for n in TREES if n != "one token"}
)  # the interpreter is slow


@pytest.fixture(params=["a program for all tiles", "shares"])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps so small that a block of the cache takes several. A block of rows has several tokens, or part of one."""
    monkeypatch.setattr(kernels, "sizes", lambda *shape: Blocks(16, 32, 4, 1))
    monkeypatch.setattr(kernels, "PROGRAMS", 1 if request.param != "shares" else 10**6)
    monkeypatch.setattr(kernels, "SHORTEST_SHARE", 2)
    monkeypatch.setattr(kernels, "LISTED", 4)


def moved(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: y.detach().to(DEVICE) for n, y in x.items()}


def check(plan: Plan, heads: tuple[int, int], d: int, dtype: torch.dtype, *only: str, **options: Any) -> None:
    """Check the ways `only` of feeding tokens, or all ways."""
    x = moved(inputs(plan, heads, d, dtype))
    bound = limit(plan, x, **options)
    for way, calls in ways(plan).items():
        if way in only or not only:
            assert_accurate(bound, found(plan, x, calls, "triton", **options))


@dtypes
@pytest.mark.parametrize("options", [{}, OPTIONS[-1] | {"window": 13}], ids=str)
@pytest.mark.parametrize("plan", FORESTS.values(), ids=[*FORESTS])
def test_trees(shares: None, plan: Plan, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(plan, (4, 2), 16, dtype, *(["in chunks"] if INTERPRETED else []), **options)


@dtypes
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (5, 1), (33, 1)], ids=str)
def test_heads(shares: None, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """The rows of one token can be in several blocks."""
    for d in (3, 20):
        check(TREES["empty nodes"], heads, d, dtype, "at random")


@on_cuda
@dtypes
@pytest.mark.parametrize("d", [7, 20, 64, 80, 128, 256])
def test_channels(d: int, dtype: torch.dtype) -> None:
    """With the actual step sizes, which depend on dtype and channels."""
    for options in ({}, {"softcap": 2.0, "window": 70}):
        check(TREES["a group"], (14, 2), d, dtype, **options)


@dtypes
def test_nobody_sees_what_was_not_written(shares: None, dtype: torch.dtype) -> None:
    """The cache has the tokens that were written, and the rest is still NaN."""
    plan = plan_of([(66, -1), (3, 0), (5, 0)])
    x = moved(inputs(plan, (2, 1), 20, dtype))
    cache = Cache(plan, x)
    for tokens in ways(plan)["in chunks"]:
        assert cache.run(tokens, "triton").isfinite().all()
    other = Cache(plan, x)
    for tokens in ways(plan)["in chunks"]:
        other.run(tokens, "reference")
    assert torch.equal(cache.keys.nan_to_num(nan=77), other.keys.nan_to_num(nan=77))
    assert torch.equal(cache.values[..., :20].nan_to_num(nan=77), other.values[..., :20].nan_to_num(nan=77))
    assert not cache.values[..., 20:].nan_to_num().any()


def given(*, d: int = 16, dtype: torch.dtype = FLOAT32) -> dict[str, Any]:
    """Arguments for five tokens of a text in the first of three blocks."""
    keys, values = (torch.ones(3, *shape, dtype=dtype, device=DEVICE) for shape in ops.cache_shapes(2, d))
    step = CacheStep(*(torch.tensor(x, device=DEVICE) for x in ([*range(5)], [*range(5)], [[0, 0, 5, 0, 5]])))
    q, k, v = (torch.ones(5, heads, d, dtype=dtype, device=DEVICE) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "keys": keys, "values": values, "step": step, "backend": "triton"}


@pytest.mark.parametrize(
    ("tiles", "sees"),
    [
        ([], [False] * 5),
        ([[1, 2, 64, 1, 4], [0, 0, 1, 3, 3], [0, 40, 1, 0, 5]], [False, False, True, True, False]),
        ([[1, 0, 1, 0, 5]], [True, True, True, False, False]),
    ],
)
def test_who_sees_nothing_gets_zeros(shares: None, tiles: list[list[int]], sees: list[bool]) -> None:
    """A slot of -1 is not written."""
    x = given()
    rows = torch.tensor(tiles, dtype=torch.int64, device=DEVICE).reshape(-1, 5)
    x["k"], x["v"], x["step"] = x["k"] * 2, x["v"] * 2, x["step"]._replace(tiles=rows, slot=x["step"].slot * 0 - 1)
    assert (ops.cache_attention(**x, window=3).flatten(1) == 1).all(1).tolist() == sees
    assert all(bool((x[n] == 1).all()) for n in ("keys", "values"))


@pytest.mark.parametrize(
    "tile", [[-1, 0, 5, 0, 5], [3, 0, 5, 0, 5], [0, -1, 5, 0, 5], [0, 0, 0, 0, 5], [0, 0, 65, 0, 5], [0, 0, 5, 0, 6]]
)
def test_a_tile_outside_the_cache_is_not_a_number(shares: None, tile: list[int]) -> None:
    x = given()
    tiles = torch.tensor([[0, 0, 5, 0, 5]] * 3 + [tile], device=DEVICE)
    slot = torch.tensor([0, -2, 192, 2**40, 1], device=DEVICE)  # slots outside the cache are not written
    x["step"] = x["step"]._replace(tiles=tiles, slot=slot)
    assert ops.cache_attention(**x).isnan().all()


@dtypes
def test_strided_inputs(shares: None, dtype: torch.dtype) -> None:
    plan = TREES["empty nodes"]
    x = moved(inputs(plan, (4, 2), 16, dtype))
    tokens = torch.arange(len(x["q"]))
    want = found(plan, x, [tokens], "triton")
    for layout in (lambda y: y.transpose(0, 1).contiguous().transpose(0, 1), lambda y: y.mT.contiguous().mT):
        q, k, v = (layout(x[n]) for n in "qkv")
        cache = Cache(plan, x)
        step = cache.step(tokens)  # on the CPU, so the operator copies it
        assert torch.equal(ops.cache_attention(q, k, v, cache.keys, cache.values, step, backend="triton"), want)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="float64 takes backend 'reference'"):
        ops.cache_attention(**given(dtype=torch.float64))
    with pytest.raises(UserError, match="cache_attention: heads have 264 channels"):
        ops.cache_attention(**given(d=264))
    with pytest.raises(UserError, match=r"step\.slot"):
        ops.cache_attention(**given() | {"step": given()["step"]._replace(slot=torch.zeros(4, device=DEVICE))})


def test_no_tokens() -> None:
    cache = Cache(plan_of([]), moved(inputs(plan_of([]), (4, 2), 8, FLOAT32)))
    assert cache.run(torch.zeros(0, dtype=torch.int64), "triton").shape == (0, 4, 8)


@on_cuda
@dtypes
def test_long_texts_and_many(dtype: torch.dtype) -> None:
    """With the actual step sizes: one text of many blocks, whose tiles several programs share, and many short texts."""
    for plan in (plan_of([(1200, -1)]), drawn(60, 70, 0.45)):
        check(plan, (7, 1), 64, dtype, "in chunks", "prefill, then single tokens")


@on_cuda
def test_equal_bits_every_time_on_any_stream() -> None:
    plan = drawn(60, 90, 0.45)
    x = moved(inputs(plan, (28, 4), 128, BF16))
    calls = ways(plan)["at random"]
    first = found(plan, x, calls, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = [found(plan, x, calls, "triton") for _ in range(5)]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(y, first) for y in again)


@on_cuda
def test_it_waits_for_nothing_and_can_be_a_graph() -> None:
    """The graph is captured with one call's step. It is replayed with that step and the next, of the same shapes."""
    plan = plan_of([(102, -1), (22, -1)])
    x = moved(inputs(plan, (14, 2), 64, BF16))
    calls = [torch.cat([torch.arange(100), torch.arange(102, 122)]), torch.tensor([100, 122]), torch.tensor([101, 123])]
    want = found(plan, x, calls, "triton")
    cache = Cache(plan, x)
    cache.run(calls[0], "triton")
    steps = [CacheStep(*(y.cuda() for y in cache.step(tokens))) for tokens in calls[1:]]
    step = CacheStep(*(y.clone() for y in steps[0]))
    q, k, v = (x[n][calls[1].cuda()] for n in "qkv")
    run = lambda: ops.cache_attention(q, k, v, cache.keys, cache.values, step, backend="triton")  # noqa: E731
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for tokens, its in zip(calls[1:], steps, strict=True):
        now = tokens.cuda()
        for to, y in zip((q, k, v, *step), (*(x[n][now] for n in "qkv"), *its), strict=True):
            to.copy_(y)
        graph.replay()
        assert torch.equal(out, want[now])


@on_cuda
def test_under_autocast() -> None:
    plan = TREES["forest"]
    x = moved(inputs(plan, (4, 2), 64, FLOAT32))
    narrow = {n: y.to(BF16) for n, y in x.items()}
    tokens = torch.arange(len(x["q"]))
    cache = Cache(plan, narrow)
    step = cache.step(tokens)
    with torch.autocast("cuda", BF16):
        out = ops.cache_attention(x["q"], x["k"], x["v"], cache.keys, cache.values, step)
    assert torch.equal(out, found(plan, narrow, [tokens], "triton"))
