"""tree_attention by varlen calls: both ways to lay them out, and what is named to the kernels.

The kernels are CUDA's, so on the CPU their operators get an implementation written here from what they document; the
rest of the way is the real one. The tests at the end run the kernels themselves.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import OPTIONS, TREES, Plan, double, drawn, inputs, plan_of, results
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import assert_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dwrl_fast import log, ops, reference
from dwrl_fast.errors import UserError
from dwrl_fast.ops import paths, varlen
from dwrl_fast.ops.attention import _able
from dwrl_fast.ops.varlen import VARLEN, Options

CUDA = torch.device("cuda")


def segment_logits(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, longest_q: int, longest_k: int, scale: float,
    causal: bool, window: tuple[int, int], softcap: float,
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Of each segment: its rows of q and of k, the heads of k and v as q has them, and the logits [Hq, Tq, Tk]."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and bounds_q.is_contiguous() and bounds_k.is_contiguous()
    assert bounds_q[0] == bounds_k[0] == 0 and bounds_q[-1] == len(q) and bounds_k[-1] == len(k)
    assert longest_q == bounds_q.diff().max() and longest_k == bounds_k.diff().max()
    assert bounds_q.diff().min() > 0 and bounds_k.diff().min() > 0  # the kernels leave empty segments unwritten
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    left, right = window[0], 0 if causal else window[1]
    group = q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(bounds_q.unfold(0, 2, 1).tolist(), bounds_k.unfold(0, 2, 1).tolist(), strict=True):
        wide_k, wide_v = (x[k0:k1].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        logits = q[q0:q1].double().transpose(0, 1) @ wide_k.mT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        back = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)  # how far a key lies back
        hidden = torch.zeros_like(back, dtype=torch.bool)
        hidden |= (back > left) & (left >= 0)
        hidden |= (back < -right) & (right >= 0)
        yield slice(q0, q1), slice(k0, k1), wide_k, wide_v, logits.masked_fill(hidden, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=ops.products.wide(q.dtype))
    for rows, _, _, wide_v, logits in segment_logits(q, k, v, *rest):
        out[rows] = (logits.softmax(-1) @ wide_v).transpose(0, 1).to(q.dtype)
        lse[:, rows] = logits.logsumexp(-1).to(lse.dtype)
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """From the given out and lse alone, as the kernels do."""
    scale, softcap = rest[4], rest[7]
    dq, dk, dv = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    for rows, keys, wide_k, wide_v, logits in segment_logits(q, k, v, *rest):
        wide_grad, wide_out, wide_q = (x[rows].double().transpose(0, 1) for x in (grad, out, q))
        weights = (logits - lse[:, rows, None].double()).exp()
        d_logits = weights * (wide_grad @ wide_v.mT - (wide_grad * wide_out).sum(-1, keepdim=True))
        if softcap:
            d_logits = d_logits * (1 - (logits.clamp_min(-softcap) / softcap).square())
        dq[rows] = (d_logits @ wide_k * scale).transpose(0, 1).to(q.dtype)
        for total, part in ((dk, d_logits.mT @ wide_q * scale), (dv, weights.mT @ wide_grad)):
            total[keys] = part.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1).to(k.dtype)
    return dq, dk, dv


def aten_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not dropout_p and not return_debug_mask and not any(others.values())
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    out, lse = attend(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, window, 0.0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def aten_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not dropout_p and rng_state.numel() == 2
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    return attend_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, window, 0.0
    )


# Of flash_attn 2.8.3.
FLASH_FORWARD = (
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None, "
    "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    "bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
FLASH_BACKWARD = (
    "_flash_attn_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, "
    "Tensor? rng_state=None, bool zero_tensors=False) -> Tensor"
)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not dropout_p and not any(others)
    window = window_size_left, window_size_right
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *attend(q, k, v, *lengths, softmax_scale, causal, window, softcap), torch.empty(0), torch.empty(2)


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: None, deterministic: bool, *others: Any,
) -> Tensor:  # fmt: skip
    assert deterministic and not dropout_p and alibi_slopes is None and not any(others)
    window = window_size_left, window_size_right
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    rest = *lengths, softmax_scale, causal, window, softcap
    for to_fill, found in zip((dq, dk, dv), attend_backward(dout, q, k, v, out, softmax_lse, *rest), strict=True):
        to_fill.copy_(found)
    return torch.empty(0)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with (
        torch.library._scoped_library("aten", "IMPL") as aten,
        torch.library._scoped_library("flash_attn", "FRAGMENT") as flash,
    ):
        aten.impl("_flash_attention_forward", aten_forward, "CPU")
        aten.impl("_flash_attention_backward", aten_backward, "CPU")
        if varlen._flash_attn_missing() is not None:
            flash.define(FLASH_FORWARD)
            flash.define(FLASH_BACKWARD)
        flash.impl("_flash_attn_varlen_forward", flash_forward, "CPU")
        flash.impl("_flash_attn_varlen_backward", flash_backward, "CPU")
        yield


def by_calls(x: dict[str, Tensor], plan: Plan, name: str = "flash_attn", **options: Any) -> dict[str, Tensor]:
    q, k, v = x["q"], x["k"], x["v"]
    how = Options(**{"scale": q.shape[-1] ** -0.5} | options)
    out = paths.varlen_tree_attention(q, k, v, plan, VARLEN[name], how)
    return {"out": out.detach()} | dict(
        zip(("d_q", "d_k", "d_v"), torch.autograd.grad(out, (q, k, v), x["grad"]), strict=True)
    )


@contextmanager
def going(by_path: bool) -> Iterator[None]:
    """Without a window, this way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths._Layout, "shorter_by_path", lambda self, group: by_path)
        yield


def assert_as_defined(plan: Plan, heads: tuple[int, int], d: int, name: str, options: dict[str, Any]) -> None:
    x = inputs(plan, heads, d, torch.float64)
    want = results(x, plan, "reference", **options)
    for by_path in (False, True)[: 1 + (options.get("window") is None)]:
        with going(by_path):
            got = by_calls(x, plan, name, **options)
        for key, y in want.items():
            torch.testing.assert_close(got[key], y, rtol=1e-10, atol=1e-10, msg=f"{key} {options} {by_path}")


@pytest.mark.parametrize("name", VARLEN)
@pytest.mark.parametrize("options", [*OPTIONS, {"scale": 0.3}, {"window": 1}], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_trees_in_float64(tree: str, options: dict[str, Any], name: str) -> None:
    if name == "varlen":
        options = {k: v for k, v in options.items() if k != "softcap"}
    assert_as_defined(TREES[tree], (4, 2), 8, name, options)


@pytest.mark.parametrize("tree", ["a group", "empty nodes", "deep chain"])
def test_every_width_of_a_window(tree: str) -> None:
    for window in range(1, 30):
        assert_as_defined(TREES[tree], (2, 1), 4, "flash_attn", {"window": window})


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (5, 1)], ids=str)
def test_heads(heads: tuple[int, int]) -> None:
    for options in ({}, {"window": 9}):
        assert_as_defined(TREES["forest"], heads, 3, "flash_attn", options)


@st.composite
def forests(draw: st.DrawFn) -> Plan:
    """Any depth-first order: each node hangs somewhere on the path to the last one, or is a root."""
    nodes: list[tuple[int, int]] = [(draw(st.integers(1, 5)), -1)]
    path = [0]
    for node in range(1, draw(st.integers(1, 9))):
        path = path[: draw(st.integers(0, len(path)))]
        nodes.append((draw(st.integers(0, 5)), path[-1] if path else -1))
        path.append(node)
    return plan_of(nodes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(forests(), st.none() | st.integers(1, 12), st.sampled_from([None, 1.5]))
def test_drawn_trees(plan: Plan, window: int | None, softcap: float | None) -> None:
    assert_as_defined(plan, (2, 1), 2, "flash_attn", {"window": window, "softcap": softcap})


@pytest.mark.parametrize("by_path", [False, True], ids=["depth", "path"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 13}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tree", ["a group", "forest", "deep chain"])
def test_merging_is_accurate(tree: str, dtype: torch.dtype, options: dict[str, Any], by_path: bool) -> None:
    """Around kernels that round only what they return."""
    plan = TREES[tree]
    runs = []
    for seed in range(3):
        x = inputs(plan, (4, 2), 16, dtype, seed)
        plain, exact = (results(y, plan, "reference", **options) for y in (x, double(x)))
        with going(by_path):
            runs.append((by_calls(x, plan, **options), plain, exact))
    assert_accurate(runs)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[varlen.Segments]:
    """The segments of the calls forward, as they come."""
    seen: list[varlen.Segments] = []
    forward = varlen.Aten.forward

    def spy(self: varlen.Aten, q: Tensor, k: Tensor, v: Tensor, segments: varlen.Segments, options: Options) -> Any:
        seen.append(segments)
        return forward(self, q, k, v, segments, options)

    monkeypatch.setattr(varlen.Aten, "forward", spy)
    return seen


@pytest.mark.parametrize(
    ("nodes", "window", "calls"),
    [
        ([(5, -1), (3, -1), (9, -1)], None, 1),
        ([(5, -1), (3, -1), (9, -1)], 4, 1),
        ([(5, -1), (3, 0), (9, 0)], None, 2),
        ([(5, -1), (3, 0), (2, 1), (2, 1), (4, 0), (2, 4)], None, 3),
        ([(5, -1), (0, 0), (0, 1), (2, 2), (3, 2)], None, 2),
        ([(5, -1), (3, 0), (2, 1), (2, 1), (4, 0), (2, 4)], 3, 1),
        ([(5, -1), (3, 0), (9, 0)], 14, 2),
        ([(5, -1), (3, 0), (9, 0)], 13, 1),
    ],
    ids=["roots", "roots, window", "a root", "two depths", "empty nodes", "window", "window of a path", "one less"],
)
def test_as_many_calls_as_depths(
    nodes: list[tuple[int, int]], window: int | None, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counted(monkeypatch)
    plan = plan_of(nodes)
    for by_path, expected in ((False, calls), (True, 1)):
        seen.clear()
        with going(by_path):
            by_calls(inputs(plan, (2, 1), 8, torch.float64), plan, "varlen", window=window)
        assert len(seen) == expected


def test_a_window_gathers_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    plan = plan_of([(50, -1), (20, 0), (3, 1), (1, 1)])
    by_calls(inputs(plan, (2, 1), 8, torch.float64), plan, "varlen", window=8)
    assert seen[0].bounds_k.diff().tolist() == [50, 27, 10, 8]


def test_the_way_that_moves_fewer_bytes() -> None:
    """Thoughts longer than their prompt go by path, many short ones on a long prompt by depth; sooner so, the more of
    the bytes are keys.
    """
    long = plan_of([(100, -1), *[(200, 0)] * 4])
    short = plan_of([(2000, -1), *[(10, 0)] * 64])
    between = plan_of([(350, -1), *[(70, 0)] * 8])
    ways = [[paths._read(plan).shorter_by_path(group) for group in (1, 7)] for plan in (long, short, between)]
    assert ways == [[True, True], [False, False], [False, True]], ways


def test_a_plan_is_laid_out_once() -> None:
    plan = drawn(20, 5, 0.4)
    layout = paths._layout(plan, int(plan.stop[-1]))
    calls = layout.calls(None, torch.device("cpu"), 2)
    assert paths._layout(plan, int(plan.stop[-1])) is layout and layout.calls(None, torch.device("cpu"), 2) is calls
    flat = plan._replace(parent=torch.full_like(plan.parent, -1))
    assert len(paths._layout(flat, int(plan.stop[-1])).calls(None, torch.device("cpu"), 2)) == 1
    before = len(paths._LAYOUTS)
    del plan, flat, layout, calls
    assert len(paths._LAYOUTS) == before - 1


@pytest.mark.parametrize("window", [None, 9])
def test_saved_for_the_backward(window: int | None) -> None:
    """q, k, v, out and lse: what is gathered is gathered again."""
    plan = TREES["a group"]
    x = inputs(plan, (4, 2), 8, torch.float32)
    kept: list[Tensor] = []

    def keep(y: Tensor) -> Tensor:
        kept.append(y)
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        out = paths.varlen_tree_attention(x["q"], x["k"], x["v"], plan, VARLEN["varlen"], Options(0.3, None, window))
    lse = (4, len(out))
    assert [tuple(y.shape) for y in kept] == [*(tuple(y.shape) for y in (x["q"], x["k"], x["v"], out)), lse]


def test_a_double_backward_raises() -> None:
    x = inputs(TREES["a group"], (2, 2), 8, torch.float32)
    given = x["q"], x["k"], x["v"]
    out = paths.varlen_tree_attention(*given, TREES["a group"], VARLEN["flash_attn"], Options(0.3))
    (d_q,) = torch.autograd.grad(out.square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_q.sum().backward()


def test_strided_inputs_and_gradients() -> None:
    plan = TREES["forest"]
    x = inputs(plan, (4, 2), 8, torch.float64)
    ways: list[dict[str, Any]] = [{}, {"window": 9}]
    for options in ways:
        want = by_calls(x, plan, **options)
        for layout in (lambda y: y.transpose(0, 1).contiguous().transpose(0, 1), lambda y: y.mT.contiguous().mT):
            strided = {n: layout(y.detach()).requires_grad_(y.requires_grad) for n, y in x.items()}
            for name, y in by_calls(strided, plan, **options).items():
                torch.testing.assert_close(y, want[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([(200, -1)], "the tree has 200 tokens; q has U = 269"),
        ([(100, -1), (100, 0), (69, 5)], "not on the path to node 1"),
        ([(100, -1), (100, -1), (69, 0)], "depth-first order"),
    ],
)
def test_a_plan_that_is_no_tree(nodes: list[tuple[int, int]], message: str) -> None:
    q, k = torch.zeros(269, 4, 8), torch.zeros(269, 2, 8)
    with pytest.raises(ValueError, match=message):
        paths.varlen_tree_attention(q, k, k, plan_of(nodes), VARLEN["varlen"], Options(1.0))
    gap = plan_of([(100, -1), (169, 0)])
    with pytest.raises(ValueError, match="must follow one another"):
        paths.varlen_tree_attention(q, k, k, gap._replace(start=gap.start * 2), VARLEN["varlen"], Options(1.0))


BF16 = torch.bfloat16


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a new GPU with everything installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(varlen, "_flash_attn_missing", lambda: None)
    monkeypatch.setattr(varlen, "_aten_missing", lambda: None)
    log.info_once.cache_clear()
    log.warn_once.cache_clear()
    return monkeypatch


@pytest.mark.parametrize(
    ("names", "device", "dtype", "channels", "softcap", "problem"),
    [
        (["flash_attn", "varlen"], "cpu", BF16, 64, None, "the tensors are on cpu"),
        (["flash_attn", "varlen"], "cuda", torch.float32, 64, None, "compute in bfloat16, and q is torch.float32"),
        (["flash_attn", "varlen"], "cuda", torch.float64, 64, None, "compute in bfloat16, and q is torch.float64"),
        (["flash_attn", "varlen"], "cuda", BF16, 20, None, "heads have 20 channels"),
        (["flash_attn", "varlen"], "cuda", BF16, 264, None, "heads have 264 channels"),
        (["varlen"], "cuda", BF16, 64, 50.0, "no soft-cap.*pip install flash-attn"),
    ],
)
def test_what_a_backend_cannot_do(
    able: Any, names: list[str], device: str, dtype: torch.dtype, channels: int, softcap: float | None, problem: str
) -> None:
    for name in names:
        with pytest.raises(UserError, match=f"tree_attention: backend '{name}' cannot run: .*{problem}"):
            _able(name, torch.device(device), dtype, channels, softcap)
    for name in set(VARLEN) - set(names):
        assert _able(name, torch.device(device), dtype, channels, softcap) == name


def test_old_gpus_are_refused(able: pytest.MonkeyPatch) -> None:
    able.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    for each in VARLEN.values():
        assert "this GPU has 7.5" in (each.problem(CUDA, BF16, 64, None) or "")


@pytest.mark.parametrize(
    ("missing", "dtype", "softcap", "chosen", "said"),
    [
        ((), BF16, None, "flash_attn", "backend flash_attn$"),
        (("flash_attn",), BF16, None, "varlen", r"backend varlen \(flash_attn cannot run: nothing here"),
        (("flash_attn",), BF16, 50.0, "reference", "square of the tokens.*nothing here.*pip install flash-attn"),
        ((), torch.float32, None, "reference", "square of the tokens.*load the model in bfloat16"),
    ],
)
def test_auto_takes_the_first_that_can(
    able: Any, caplog: Any, missing: tuple[str, ...], dtype: torch.dtype, softcap: float | None, chosen: str, said: str
) -> None:
    if missing:
        able.setattr(varlen, "_flash_attn_missing", lambda: "nothing here")
    with caplog.at_level("INFO", "dwrl_fast"):
        assert [_able("auto", CUDA, dtype, 64, softcap) for _ in range(3)] == [chosen] * 3
    (record,) = caplog.records
    assert record.levelname == ("WARNING" if chosen == "reference" else "INFO")
    assert re.search(said, record.getMessage())


def test_arguments_are_those_of_the_operators() -> None:
    assert varlen._takes("aten", varlen.ATEN) and varlen._takes("flash_attn", varlen.FLASH_ATTN)
    forward = varlen.ATEN["_flash_attention_forward"]
    for wrong in (forward.replace("cum_seq_q", "cu_seq_q"), forward.replace("is_causal ", ""), forward + " sinks"):
        assert not varlen._takes("aten", {"_flash_attention_forward": wrong})
    assert not varlen._takes("aten", {"_flash_attention_sideways": ""})


@pytest.mark.parametrize("window", [None, 9])
def test_shapes_that_pytorch_says_of_its_kernels(window: int | None) -> None:
    plan = TREES["empty nodes"]
    q, k, v = (torch.empty(15, h, 16, device="meta", dtype=BF16, requires_grad=True) for h in (4, 2, 2))
    out = paths.varlen_tree_attention(q, k, v, plan, VARLEN["varlen"], Options(0.3, None, window))
    assert (out.shape, out.dtype) == (q.shape, BF16)
    for x, found in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert (found.shape, found.dtype) == (x.shape, BF16)


merging = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch merges no fake CUDA tensors")


@pytest.mark.parametrize("window", [pytest.param(None, marks=merging), 9])
def test_all_that_meets_the_kernels_lies_on_their_device(window: int | None) -> None:
    """On fake CUDA tensors, which know where they lie; autograd, which asks a driver, is left out."""
    plan = drawn(20, 9, 0.45)
    layout = paths._layout(plan, int(plan.stop[-1]))
    kept: Any = SimpleNamespace()
    kept.save_for_backward = lambda *given: setattr(kept, "saved_tensors", given)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        q, k, v = (torch.empty(int(layout.stop[-1]), h, 16, device=CUDA, dtype=BF16) for h in (4, 2, 2))
        calls = layout._by_depth(q.device) if window is None else [layout._by_path(window, q.device)]
        out = paths._TreeAttention.forward(kept, q, k, v, calls, VARLEN["varlen"], Options(0.3, None, window))
        gradients = paths._TreeAttention.backward(kept, torch.empty_like(out))
    for x, found in zip((q, q, k, v), (out, *gradients), strict=False):
        assert found is not None and (found.shape, found.dtype, found.device) == (x.shape, BF16, x.device)


on_cuda = pytest.mark.gpu


def moved(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: y.detach().cuda().requires_grad_(y.requires_grad) for n, y in x.items()}


def skip_unable(name: str, options: dict[str, Any]) -> None:
    if problem := VARLEN[name].problem(CUDA, BF16, 64, options.get("softcap")):
        pytest.skip(problem)


@on_cuda
@pytest.mark.parametrize("by_path", [False, True], ids=["depth", "path"])
@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n in VARLEN for o in OPTIONS if n != "varlen" or "softcap" not in o], ids=str
)
def test_kernels(name: str, options: dict[str, Any], by_path: bool) -> None:
    skip_unable(name, options)
    for tree in [t for t in TREES if t != "one token"]:  # there plain PyTorch is exact
        for d in (16, 64, 128):
            runs = []
            for seed in range(3):
                x = moved(inputs(TREES[tree], (4, 2), d, BF16, seed))
                plain, exact = (results(y, TREES[tree], "reference", **options) for y in (x, double(x)))
                with going(by_path):
                    runs.append((results(x, TREES[tree], name, **options), plain, exact))
            assert_accurate(runs)


@on_cuda
@pytest.mark.parametrize("by_path", [False, True], ids=["depth", "path"])
@pytest.mark.parametrize("options", [{}, {"window": 13}], ids=str)
@pytest.mark.parametrize("name", VARLEN)
def test_kernels_give_equal_bits_every_time(name: str, options: dict[str, Any], by_path: bool) -> None:
    skip_unable(name, options)
    plan = drawn(200, 90, 0.45)
    x = moved(inputs(plan, (28, 4), 128, BF16))
    with going(by_path):
        first = results(x, plan, name, **options)
        for _ in range(20):
            for key, y in results(x, plan, name, **options).items():
                assert torch.equal(y, first[key]), key


@on_cuda
@pytest.mark.parametrize("name", VARLEN)
def test_kernels_under_autocast_and_on_a_plan_on_the_device(name: str) -> None:
    skip_unable(name, {})
    plan = TREES["forest"]
    x = moved(inputs(plan, (4, 2), 64, torch.float32))
    there = Plan(*(y.cuda() for y in plan))
    with torch.autocast("cuda", BF16):
        out = ops.tree_attention(x["q"], x["k"], x["v"], there, backend=name)
    q, k, v = (x[n].to(BF16) for n in "qkv")
    assert torch.equal(out, ops.tree_attention(q, k, v, plan, backend=name))
    assert torch.autograd.grad(out.sum(), x["q"])[0].dtype == torch.float32


@on_cuda
def test_definition_on_cuda_takes_a_plan_on_either_device() -> None:
    plan = TREES["forest"]
    x = moved(inputs(plan, (4, 2), 16, BF16))
    there = Plan(*(y.cuda() for y in plan))
    want = reference.tree_attention(x["q"], x["k"], x["v"], plan)
    assert torch.equal(reference.tree_attention(x["q"], x["k"], x["v"], there), want)
