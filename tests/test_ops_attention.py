"""tree_attention against the definition in float64 and against unpacked attention, and its other guarantees."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import OPTIONS, TREES, Plan, assert_accurate, inputs, plan_of, results
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.errors import UserError
from dwrl_fast.ops import extension, oracle

built = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")


def assert_equal_in_float64(tree: str, heads: tuple[int, int], d: int, options: dict[str, Any]) -> None:
    x = inputs(TREES[tree], heads, d, torch.float64)
    got, want = results(x, TREES[tree], **options), results(x, TREES[tree], "reference", **options)
    for name, y in want.items():
        torch.testing.assert_close(got[name], y, rtol=1e-10, atol=1e-10, msg=name)


def check(tree: str, dtype: torch.dtype, heads: tuple[int, int], d: int, options: dict[str, Any]) -> None:
    x = inputs(TREES[tree], heads, d, dtype)
    assert_accurate(x, TREES[tree], results(x, TREES[tree], **options), **options)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ALL_TREES = pytest.mark.parametrize("tree", TREES)
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS, ids=str)
SHAPES = pytest.mark.parametrize(
    ("heads", "d"), [(h, d) for h in [(2, 2), (4, 2), (4, 1)] for d in (1, 8, 64, 80, 128)] + [((66, 1), 16)], ids=str
)


@built
@ALL_OPTIONS
@ALL_TREES
def test_trees_in_float64(tree: str, options: dict[str, Any]) -> None:
    assert_equal_in_float64(tree, (4, 2), 20, options)


@built
def test_every_width_of_a_window() -> None:
    """The window decides whether a tile is skipped, masked or used whole. A difference of one token can matter."""
    plan = TREES["one sequence"]
    x = {n: y.detach() for n, y in inputs(plan, (1, 1), 4, torch.float64).items()}
    q, k, v = x["q"], x["k"], x["v"]
    for window in range(1, 152):
        want = ops.tree_attention(q, k, v, plan, window=window, backend="reference")
        torch.testing.assert_close(ops.tree_attention(q, k, v, plan, window=window), want, rtol=1e-10, atol=1e-10)


@built
@DTYPES
@ALL_OPTIONS
@ALL_TREES
def test_trees(tree: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(tree, dtype, (4, 2), 16, options)


@built
def test_a_token_alone_gets_its_value() -> None:
    x = inputs(TREES["one token"], (4, 2), 16, torch.float32)
    assert torch.equal(results(x, TREES["one token"])["out"], x["v"].repeat_interleave(2, 1))


@built
@SHAPES
def test_shapes_in_float64(heads: tuple[int, int], d: int) -> None:
    assert_equal_in_float64("many roots", heads, d, {"softcap": 2.0})


@built
@DTYPES
@SHAPES
def test_shapes(heads: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    check("many roots", dtype, heads, d, {})


def paths(plan: Plan) -> list[Tensor]:
    """The tokens from the root to the end of each node."""
    found: list[Tensor] = []
    for start, stop, parent in zip(*(x.tolist() for x in plan), strict=True):
        own = torch.arange(start, stop)
        found.append(own if parent < 0 else torch.cat([found[parent], own]))
    return found


@pytest.mark.parametrize("window", [None, 13])
@ALL_TREES
def test_the_definition_is_unpacked_attention(tree: str, window: int | None) -> None:
    plan = TREES[tree]
    x = {n: y.detach() for n, y in inputs(plan, (4, 2), 8, torch.float64).items()}
    got = oracle.tree_attention(x["q"], x["k"], x["v"], plan, window=window)
    for path in paths(plan):
        q, k, v = (x[n][path].transpose(0, 1) for n in "qkv")
        n = len(path)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            mask &= ~torch.ones(n, n, dtype=torch.bool).tril(-window)
        want = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        torch.testing.assert_close(got[path], want.transpose(0, 1), rtol=1e-12, atol=1e-12)


@built
@DTYPES
@ALL_OPTIONS
def test_no_cross_talk(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Another thought's tokens change no bit of a token's output. Its gradients do not change either, if the other
    thought's output has no gradient.
    """
    plan = TREES["a group"]
    changed = slice(int(plan.start[3]), int(plan.stop[3]))
    x = inputs(plan, (4, 2), 16, dtype)
    x["grad"][changed] = 0
    before = results(x, plan, **options)
    with torch.no_grad():
        for n in "qkv":
            x[n][changed] = 30 * torch.randn_like(x[n][changed])
    after = results(x, plan, **options)
    others = torch.ones(len(x["q"]), dtype=torch.bool)
    others[changed] = False
    for name in before:
        assert torch.equal(before[name][others], after[name][others]), name
    assert not torch.equal(before["out"][changed], after["out"][changed])


@built
def test_equal_bits_every_time_and_on_any_number_of_threads() -> None:
    plan = TREES["long roots"]
    x = inputs(plan, (6, 3), 24, torch.float32)
    first = results(x, plan)
    threads = torch.get_num_threads()
    try:
        for repeat in range(20):
            torch.set_num_threads(1 + repeat % 3)
            for name, y in results(x, plan).items():
                assert torch.equal(y, first[name]), name
    finally:
        torch.set_num_threads(threads)


@built
@ALL_OPTIONS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(options: dict[str, Any], backend: str) -> None:
    plan = plan_of([(3, -1), (2, 0), (1, 0), (2, -1)])
    x = inputs(plan, (2, 1), 3, torch.float64)
    run = lambda q, k, v: ops.tree_attention(q, k, v, plan, backend=backend, **options | {"window": 3})  # noqa: E731
    assert torch.autograd.gradcheck(run, (x["q"], x["k"], x["v"]))


@built
def test_a_double_backward_raises() -> None:
    x = inputs(TREES["a group"], (2, 2), 8, torch.float32)
    out = ops.tree_attention(x["q"], x["k"], x["v"], TREES["a group"])
    (d_q,) = torch.autograd.grad(out.square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        d_q.sum().backward()


@built
def test_opcheck() -> None:
    plan = TREES["a group"]
    x = inputs(plan, (4, 2), 8, torch.float32)
    raw: Any = torch.ops.dwrl_fast
    given = x["q"], x["k"], x["v"]
    for options in ((0.3, None, None), (0.3, 5.0, 20)):
        torch.library.opcheck(raw.tree_attention.default, (*given, *plan, *options))
        with torch.no_grad():
            made = raw.tree_attention(*given, *plan, *options)
        plain = (y.detach() for y in given)
        torch.library.opcheck(raw.tree_attention_backward.default, (x["grad"], *plain, *made, *plan, *options))


@pytest.mark.slow
@built
def test_eager_equals_compiled() -> None:
    plan = TREES["a group"]
    x = inputs(plan, (4, 2), 8, torch.float32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.tree_attention(q * 2, k, v, plan, softcap=5.0, window=40).square()

    given = x["q"], x["k"], x["v"]
    outs = run(*given), torch.compile(run, fullgraph=True)(*given)
    torch.testing.assert_close(outs[1], outs[0])
    gradients = [torch.autograd.grad(y.sum(), given) for y in outs]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


@built
def test_strided_inputs_and_gradients() -> None:
    plan = TREES["forest"]
    x = inputs(plan, (4, 2), 16, torch.float32)
    want = results(x, plan)
    layouts = (
        lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),  # the strides in transformers
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),  # rows are not dense
        lambda y: y.repeat(1, 1, 2)[..., :16],
    )
    for layout in layouts:
        strided = {n: layout(y.detach()).requires_grad_(y.requires_grad) for n, y in x.items()}
        assert not strided["q"].is_contiguous()
        for name, y in results(strided, plan).items():
            assert torch.equal(y, want[name]), name


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=built), "reference"])
def test_empty(backend: str) -> None:
    plan = plan_of([])
    x = inputs(plan, (4, 2), 8, torch.float32)
    assert all(y.shape[0] == 0 for y in results(x, plan, backend).values())


@built
def test_not_a_number_stays_on_its_row() -> None:
    plan = plan_of([(5, -1), (3, 0), (4, 0)])
    x = inputs(plan, (2, 1), 8, torch.float32)
    with torch.no_grad():
        x["q"][6] = torch.nan
    found = ops.tree_attention(x["q"], x["k"], x["v"], plan).isnan().flatten(1)
    assert found[6].all()
    assert not found[torch.arange(12) != 6].any()


@built
def test_autocast() -> None:
    plan = TREES["a group"]
    x = inputs(plan, (2, 2), 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.tree_attention(x["q"], x["k"], x["v"], plan)
    q, k, v = (x[n].bfloat16() for n in "qkv")
    assert torch.equal(out, ops.tree_attention(q, k, v, plan))
    assert torch.autograd.grad(out.sum(), x["q"])[0].dtype == torch.float32


def bad(**changed: Any) -> dict[str, Any]:
    x = inputs(TREES["a group"], (4, 2), 8, torch.float32)
    return {"q": x["q"], "k": x["k"], "v": x["v"], "plan": TREES["a group"]} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backend": "flash"}, "backend is 'flash'"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"k": torch.zeros(269, 3, 8), "v": torch.zeros(269, 3, 8)}, "q has 4 heads; expected a multiple of the 3"),
        ({"k": torch.zeros(269, 2, 9)}, r"k is \[269, 2, 9\]"),
        ({"v": torch.zeros(269, 1, 8)}, r"v is \[269, 1, 8\]"),
        ({"v": torch.zeros(269, 2, 8, dtype=torch.float64)}, "v is torch.float64"),
        ({"q": torch.zeros(1, 269, 4, 8)}, "flatten the batch"),
        ({"q": torch.zeros(269, 4, 8, dtype=torch.float16)}, "use bfloat16"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"tree_attention: .*{message}"):
        ops.tree_attention(**bad(**changed))


@built
@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([(269, -1), (5, 0)], "nodes must follow one another"),
        ([(200, -1)], "the tree has 200 tokens; q has U = 269"),
        ([(100, -1), (100, 0), (69, 5)], "not on the path to node 1"),
        ([(100, -1), (100, -1), (69, 0)], "depth-first order"),
    ],
)
def test_a_plan_that_is_no_tree(nodes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.tree_attention(**bad(plan=plan_of(nodes)))
