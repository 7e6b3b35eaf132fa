"""The Triton kernels of tree_attention on a GPU, against float64.

Their bodies run on the CPU too, in float32 on small tiles, through Triton's interpreter, which test_ops_triton.py
starts. Its products of bfloat16 are wrong, so those are tested only on a GPU.
"""

import os
from importlib.metadata import version
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attention_cases import OPTIONS, TREES, Plan, assert_accurate, drawn, inputs, plan_of, results
from dwrl_fast.kernels import attention
from dwrl_fast.kernels.attention import Blocks, Sizes
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.errors import UserError
from dwrl_fast.ops import oracle, tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
    pytest.skip("the interpreter of Triton 3.6 has no loop to a number that was loaded", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
on_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has neither bfloat16 products nor streams")
FLOAT32, BF16 = torch.float32, torch.bfloat16
DTYPES = [FLOAT32] if INTERPRETED else [FLOAT32, BF16]
GROUP = plan_of([(20, -1), (9, 0), (7, 1), (5, 1), (12, 0), (1, 4), (11, 4), (18, -1)])
FORESTS = {n: TREES[n] for n in ("one token", "deep chain", "empty nodes")} if INTERPRETED else TREES  # it is slow
SMALL = Sizes(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(64, 16, 4, 2))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def moved(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: y.detach().to(DEVICE).requires_grad_(y.requires_grad) for n, y in x.items()}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every tree has several of them, and the longest trees have several runs."""
    monkeypatch.setattr(attention, "sizes", lambda *shape: SMALL)
    monkeypatch.setattr(tiles, "SHORTEST_RUN", 64)
    monkeypatch.setattr(tiles, "RUN_UNIT", 32)


@dtypes
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]] if INTERPRETED else [*OPTIONS, {"window": 1}], ids=str)
@pytest.mark.parametrize("plan", [*FORESTS.values(), GROUP], ids=[*FORESTS, "small group"])
def test_trees(small_tiles: None, plan: Plan, options: dict[str, Any], dtype: torch.dtype) -> None:
    x = moved(inputs(plan, (4, 2), 16, dtype))
    assert_accurate(x, plan, results(x, plan, "triton", **options), **options)


@on_cuda
@dtypes
@pytest.mark.parametrize("d", [20, 64, 128, 256])
def test_channels(d: int, dtype: torch.dtype) -> None:
    """With the actual tile sizes, which depend on dtype and channels."""
    for tree in ("a group", "forest"):
        for options in ({}, {"softcap": 2.0, "window": 70}):
            x = moved(inputs(TREES[tree], (4, 2), d, dtype))
            assert_accurate(x, TREES[tree], results(x, TREES[tree], "triton", **options), **options)


@dtypes
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (5, 1)], ids=str)
def test_heads(small_tiles: None, heads: tuple[int, int], dtype: torch.dtype) -> None:
    plan = TREES["empty nodes"] if INTERPRETED else TREES["forest"]
    x = moved(inputs(plan, heads, 3, dtype))
    assert_accurate(x, plan, results(x, plan, "triton"))


@dtypes
def test_every_width_of_a_window(small_tiles: None, dtype: torch.dtype) -> None:
    plan = plan_of([(5, -1), (3, 0), (2, 1), (2, 1), (4, 0), (2, 4), (6, -1)])
    for window in (1, 2, 5, 12):
        x = moved(inputs(plan, (2, 1), 4, dtype))
        assert_accurate(x, plan, results(x, plan, "triton", window=window), window=window)


@dtypes
def test_strided_inputs_and_gradients(small_tiles: None, dtype: torch.dtype) -> None:
    plan = TREES["empty nodes"]
    x = moved(inputs(plan, (4, 2), 16, dtype))
    want = results(x, plan, "triton")
    for layout in (lambda y: y.transpose(0, 1).contiguous().transpose(0, 1), lambda y: y.mT.contiguous().mT):
        strided = {n: layout(y.detach()).requires_grad_(y.requires_grad) for n, y in x.items()}
        for name, y in results(strided, plan, "triton").items():
            assert torch.equal(y, want[name]), name


def test_no_tokens_and_once_differentiable(small_tiles: None) -> None:
    none = torch.zeros(0, 2, 16, device=DEVICE, requires_grad=True)
    out = ops.tree_attention(none, none, none, plan_of([]), backend="triton")
    assert out.shape == none.shape
    x = moved(inputs(TREES["empty nodes"], (2, 2), 16, FLOAT32))
    out = ops.tree_attention(x["q"], x["k"], x["v"], TREES["empty nodes"], backend="triton")
    (d_q,) = torch.autograd.grad(out.square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_q.sum().backward()


def test_float64_and_wide_heads_are_refused() -> None:
    wide = torch.zeros(3, 1, 264, device=DEVICE)
    with pytest.raises(UserError, match="float64 takes backend 'reference'"):
        ops.tree_attention(wide.double(), wide.double(), wide.double(), plan_of([(3, -1)]), backend="triton")
    with pytest.raises(UserError, match="heads have 264 channels"):
        ops.tree_attention(wide, wide, wide, plan_of([(3, -1)]), backend="triton")


@on_cuda
@pytest.mark.parametrize("options", [{}, {"window": 13}, {"softcap": 20.0}], ids=str)
def test_equal_bits_every_time_on_any_stream(options: dict[str, Any]) -> None:
    plan = drawn(200, 90, 0.45)
    x = moved(inputs(plan, (28, 4), 128, BF16))
    first = results(x, plan, "triton", **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [results(x, plan, "triton", **options) for _ in range(20)]
    torch.cuda.current_stream().wait_stream(stream)
    for other in found:
        for key, y in other.items():
            assert torch.equal(y, first[key]), key


@on_cuda
def test_under_autocast_and_on_a_plan_on_the_device() -> None:
    plan = TREES["forest"]
    x = moved(inputs(plan, (4, 2), 64, FLOAT32))
    there = Plan(*(y.cuda() for y in plan))
    with torch.autocast("cuda", BF16):
        out = ops.tree_attention(x["q"], x["k"], x["v"], there)
    q, k, v = (x[n].to(BF16) for n in "qkv")
    assert torch.equal(out, ops.tree_attention(q, k, v, plan, backend="triton"))
    assert torch.autograd.grad(out.sum(), x["q"])[0].dtype == FLOAT32


@on_cuda
def test_definition_on_cuda_takes_a_plan_on_either_device() -> None:
    plan = TREES["forest"]
    x = moved(inputs(plan, (4, 2), 16, BF16))
    there = Plan(*(y.cuda() for y in plan))
    want = oracle.tree_attention(x["q"], x["k"], x["v"], plan)
    assert torch.equal(oracle.tree_attention(x["q"], x["k"], x["v"], there), want)


@on_cuda
def test_a_minibatch_as_large_as_a_real_one() -> None:
    """Many tiles of every kind, with the actual tile sizes, compared with each sequence alone in float64."""
    from bench.operators.tree_attention import Heads, exact, minibatch
    from bench.operators.tree_attention import drawn as drawn_inputs

    plan, heads = minibatch("hh", 40, 6), Heads(14, 2, 128)
    flat, gradient = drawn_inputs(int(plan.stop[-1]), heads, BF16)
    out = ops.tree_attention(flat[0], flat[1], flat[2], plan, backend="triton")
    for found, right in zip(torch.autograd.grad(out, flat, gradient), exact(plan, flat, gradient), strict=True):
        assert (found.float() - right).norm() <= 2.0**-7 * right.norm()
