"""tree_attention by varlen calls: both ways to lay them out, and what is named to the kernels.

The kernels are CUDA's, so on the CPU their operators get the implementation of varlen_kernels.py; the rest of the way
is the real one. The tests at the end run the kernels themselves.
"""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import OPTIONS, TREES, Plan, assert_accurate, drawn, inputs, plan_of, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from varlen_kernels import in_place_of_cuda

from bench.operators.tree_attention import going
from dwrl_fast import log, ops
from dwrl_fast.errors import UserError
from dwrl_fast.ops import oracle, paths, varlen
from dwrl_fast.ops.attention import _able
from dwrl_fast.ops.varlen import VARLEN, VarlenOptions

CUDA = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with in_place_of_cuda():
        yield


def by_calls(x: dict[str, Tensor], plan: Plan, name: str = "flash_attn", **options: Any) -> dict[str, Tensor]:
    q, k, v = x["q"], x["k"], x["v"]
    how = VarlenOptions(**{"scale": q.shape[-1] ** -0.5} | options)
    out = paths.varlen_tree_attention(q, k, v, plan, VARLEN[name], how)
    return {"out": out.detach()} | dict(
        zip(("d_q", "d_k", "d_v"), torch.autograd.grad(out, (q, k, v), x["grad"]), strict=True)
    )


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
    x = inputs(plan, (4, 2), 16, dtype)
    with going(by_path):
        assert_accurate(x, plan, by_calls(x, plan, **options), **options)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[varlen.Segments]:
    """The segments of the calls forward, as they come."""
    seen: list[varlen.Segments] = []
    forward = varlen.Aten.forward

    def spy(
        self: varlen.Aten, q: Tensor, k: Tensor, v: Tensor, segments: varlen.Segments, options: VarlenOptions
    ) -> Any:
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
        out = paths.varlen_tree_attention(
            x["q"], x["k"], x["v"], plan, VARLEN["varlen"], VarlenOptions(0.3, None, window)
        )
    lse = (4, len(out))
    assert [tuple(y.shape) for y in kept] == [*(tuple(y.shape) for y in (x["q"], x["k"], x["v"], out)), lse]


def test_a_double_backward_raises() -> None:
    x = inputs(TREES["a group"], (2, 2), 8, torch.float32)
    given = x["q"], x["k"], x["v"]
    out = paths.varlen_tree_attention(*given, TREES["a group"], VARLEN["flash_attn"], VarlenOptions(0.3))
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
        paths.varlen_tree_attention(q, k, k, plan_of(nodes), VARLEN["varlen"], VarlenOptions(1.0))
    gap = plan_of([(100, -1), (169, 0)])
    with pytest.raises(ValueError, match="must follow one another"):
        paths.varlen_tree_attention(q, k, k, gap._replace(start=gap.start * 2), VARLEN["varlen"], VarlenOptions(1.0))


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
    out = paths.varlen_tree_attention(q, k, v, plan, VARLEN["varlen"], VarlenOptions(0.3, None, window))
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
        out = paths._TreeAttention.forward(kept, q, k, v, calls, VARLEN["varlen"], VarlenOptions(0.3, None, window))
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
    for plan in TREES.values():
        for d in (16, 64, 128):
            x = moved(inputs(plan, (4, 2), d, BF16))
            with going(by_path):
                assert_accurate(x, plan, results(x, plan, name, **options), **options)


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
    want = oracle.tree_attention(x["q"], x["k"], x["v"], plan)
    assert torch.equal(oracle.tree_attention(x["q"], x["k"], x["v"], there), want)
