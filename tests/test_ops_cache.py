"""cache_attention against the definition of tree attention in float64, and its other guarantees."""

from typing import Any

import pytest
import torch
from attention_cases import OPTIONS, TREES, inputs, plan_of
from cache_cases import Cache, assert_accurate, found, limit, ways
from torch import Tensor

from dwrl_fast import ops
from dwrl_fast.errors import UserError
from dwrl_fast.ops import CacheStep, extension

built = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")
BACKENDS = [pytest.param("cpu", marks=built), "reference"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
RUN = ("cpu", "reference") if extension.problem() is None else ("reference",)


def check(tree: str, heads: tuple[int, int], d: int, dtype: torch.dtype, *only: str, **options: Any) -> None:
    """Check every backend with the ways `only` of feeding tokens, or with all ways."""
    x = inputs(TREES[tree], heads, d, dtype)
    bound = limit(TREES[tree], x, **options)
    for way, calls in ways(TREES[tree]).items():
        if way in only or not only:
            for backend in RUN:
                out = found(TREES[tree], x, calls, backend, **options)
                assert out.dtype == dtype
                assert_accurate(bound, out)


@DTYPES
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("tree", ["a group", "deep chain", "many roots", "long roots", "forest", "empty nodes"])
def test_trees(tree: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """For every way of feeding tokens, each token gets the result of one call of tree_attention."""
    check(tree, (4, 2), 16, dtype, **options)


@DTYPES
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)], ids=str)
def test_shapes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Head sizes that are multiples of no vector size, of some, and of all."""
    for d in (1, 7, 20, 64, 80, 128):
        check("empty nodes", heads, d, dtype, "at random")


@DTYPES
def test_more_heads_than_a_block_of_queries(dtype: torch.dtype) -> None:
    check("empty nodes", (66, 1), 20, dtype, "at random")


def test_every_width_of_a_window() -> None:
    """The window decides whether a piece is skipped, masked or used whole. A difference of one token can matter."""
    for window in (1, 2, 12, 63, 64, 65, 66, 128, 131, 149, 150):
        check("one sequence", (1, 1), 4, torch.float64, "at once", "in chunks", window=window)


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"window": 13}, {"scale": 0.3}], ids=str)
def test_each_option(option: dict[str, Any]) -> None:
    check("a group", (4, 2), 20, torch.float32, "prefill, then several tokens", **option)


@ALL_BACKENDS
def test_nobody_sees_what_was_not_written(backend: str) -> None:
    """The cache starts as NaN. Places that were not written, also those in partly filled blocks, stay NaN."""
    plan = TREES["a group"]
    x = inputs(plan, (4, 2), 7, torch.float32)
    cache = Cache(plan, x)
    for tokens in ways(plan)["in chunks"]:
        assert cache.run(tokens, backend).isfinite().all()
    written = torch.zeros(len(cache.keys) * ops.BLOCK, dtype=torch.bool)
    written[cache.slot] = True
    written = written.view(-1, ops.BLOCK)
    assert torch.equal(cache.keys.isnan().any(2).any(1), ~written)
    assert torch.equal(cache.values[..., :7].isnan().any(3).any(1), ~written)
    block, place = cache.slot // ops.BLOCK, cache.slot % ops.BLOCK
    assert torch.equal(cache.keys[block, :, :, place], x["k"])
    assert torch.equal(cache.values[block, :, place, :7], x["v"])


@ALL_BACKENDS
@DTYPES
def test_what_is_not_kept_is_not_seen(dtype: torch.dtype, backend: str) -> None:
    """Of four new tokens only the first is kept. Each other token is like a different query in its place."""
    plan = plan_of([(70, -1)])
    x = inputs(plan, (4, 2), 20, dtype)
    cache = Cache(plan, x)
    cache.run(torch.arange(66), backend)
    step = cache.step(torch.arange(66, 70))
    tiles, slot = step.tiles.clone(), step.slot.index_fill(0, torch.arange(1, 4), -1)
    tiles[1, 2] = 3  # the number of tokens in the second block
    q, k, v = (x[n].detach()[66:] for n in "qkv")
    before = cache.keys.clone(), cache.values.clone()
    out = ops.cache_attention(q, k, v, cache.keys, cache.values, CacheStep(step.position, slot, tiles), backend=backend)
    for was, now in zip(before, (cache.keys, cache.values), strict=True):
        changed = ~((was == now) | (was.isnan() & now.isnan()))
        assert set(changed.nonzero()[:, 0].tolist()) == {int(slot[0]) // ops.BLOCK}
    for i in range(4):
        swapped = {n: y.detach()[:67].clone() for n, y in x.items()}
        swapped["q"][66] = q[i]
        assert_accurate(limit(plan_of([(67, -1)]), swapped)[66], out[i])


@ALL_BACKENDS
def test_who_sees_nothing_gets_zeros(backend: str) -> None:
    """No piece at all, no piece for this token, a piece that begins after it, or a piece outside its window."""
    x = inputs(plan_of([(3, -1)]), (4, 2), 20, torch.float32)
    cache = Cache(plan_of([(3, -1)]), x)
    q, k, v = (x[n].detach() for n in "qkv")
    position, slot = torch.tensor([1, 5, 90]), torch.full((3,), -1)
    given = q, k, v, torch.ones_like(cache.keys), torch.ones_like(cache.values)
    pieces: list[tuple[list[list[int]], list[bool]]] = [
        ([], [False, False, False]),
        ([[0, 0, 1, 1, 2], [0, 0, 1, 3, 3]], [False, True, False]),
        ([[1, 5, 64, 0, 3]], [False, True, True]),
        ([[1, 0, 4, 0, 3], [0, 0, 1, 0, 0]], [True, True, False]),
    ]
    for rows, sees in pieces:
        step = CacheStep(position, slot, torch.tensor(rows, dtype=torch.int64).reshape(-1, 5))
        out = ops.cache_attention(*given, step, window=30, backend=backend)
        assert out.flatten(1).any(1).tolist() == sees
        assert out.isfinite().all()


@ALL_BACKENDS
def test_no_tokens(backend: str) -> None:
    x = inputs(plan_of([]), (4, 2), 8, torch.float32)
    cache = Cache(plan_of([]), x)
    assert cache.run(torch.zeros(0, dtype=torch.int64), backend).shape == (0, 4, 8)


@built
@DTYPES
def test_equal_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    plan = TREES["forest"]
    x = inputs(plan, (6, 3), 24, dtype)
    calls = ways(plan)["at random"]
    threads = torch.get_num_threads()
    first = found(plan, x, calls, "cpu")
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(found(plan, x, calls, "cpu"), first)
    finally:
        torch.set_num_threads(threads)


@built
@DTYPES
def test_what_other_texts_hold_changes_no_bit(dtype: torch.dtype) -> None:
    """The other texts are in the same calls, with different content. A call with different texts may round differently;
    test_trees tests that.
    """
    plan = TREES["a group"]
    changed = slice(int(plan.start[3]), int(plan.stop[3]))
    x = inputs(plan, (4, 2), 16, dtype)
    others = torch.ones(len(x["q"]), dtype=torch.bool)
    others[changed] = False
    for calls in ways(plan).values():
        before = found(plan, x, calls, "cpu")
        other = {n: y.detach().clone() for n, y in x.items()}
        for n in "qkv":
            other[n][changed] = 30
        after = found(plan, other, calls, "cpu")
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[changed], after[changed])


@ALL_BACKENDS
@DTYPES
def test_a_text_by_itself(dtype: torch.dtype, backend: str) -> None:
    """A text gets the same result with or without other texts in the call."""
    plan = plan_of([(70, -1), (9, -1), (40, -1)])
    x = inputs(plan, (4, 2), 16, dtype)
    for first, last in zip(plan.start.tolist(), plan.stop.tolist(), strict=True):
        alone = {n: y.detach()[first:last] for n, y in x.items()}
        one = plan_of([(last - first, -1)])
        apart = found(one, alone, ways(one)["in chunks"], backend)
        together = found(plan, x, ways(plan)["in chunks"], backend)[first:last]
        assert_accurate(limit(one, alone), apart, together)


@built
def test_not_a_number_stays_on_its_row() -> None:
    plan = plan_of([(5, -1), (3, 0), (4, 0)])
    x = {n: y.detach() for n, y in inputs(plan, (2, 1), 8, torch.float32).items()}
    x["q"][6] = torch.nan
    wrong = found(plan, x, [torch.arange(12)], "cpu").isnan().flatten(1)
    assert wrong[6].all()
    assert not wrong[torch.arange(12) != 6].any()


@ALL_BACKENDS
def test_strided_inputs(backend: str) -> None:
    plan = TREES["forest"]
    x = {n: y.detach() for n, y in inputs(plan, (4, 2), 16, torch.float32).items()}
    calls = [torch.arange(len(x["q"]))]
    want = found(plan, x, calls, backend)
    for layout in (
        lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),  # the strides in transformers
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),  # rows are not dense
    ):
        cache = Cache(plan, {n: layout(y) for n, y in x.items()})
        q, k, v = (cache.x[n] for n in "qkv")
        assert not q.is_contiguous()
        out = ops.cache_attention(q, k, v, cache.keys, cache.values, cache.step(calls[0]), backend=backend)
        if backend == "reference":  # a library multiplies its matrices, and its choice of kernel may depend on strides
            assert_accurate(limit(plan, cache.x), out, want)
        else:
            assert torch.equal(out, want)


@built
def test_autocast() -> None:
    plan = TREES["a group"]
    x = {n: y.detach() for n, y in inputs(plan, (2, 2), 16, torch.float32).items()}
    narrow = {n: y.bfloat16() for n, y in x.items()}
    tokens = torch.arange(len(x["q"]))
    cache = Cache(plan, narrow)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.cache_attention(x["q"], x["k"], x["v"], cache.keys, cache.values, cache.step(tokens))
    assert torch.equal(out, found(plan, narrow, [tokens], "cpu"))


@built
def test_eager_equals_compiled() -> None:
    """Compiled code changes the cache in place too."""
    plan = TREES["forest"]
    x = {n: y.detach() for n, y in inputs(plan, (4, 2), 8, torch.float32).items()}
    one, other = Cache(plan, x), Cache(plan, x)
    step = one.step(torch.arange(len(x["q"])))

    def run(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return ops.cache_attention(q * 2, x["k"], x["v"], keys, values, step, softcap=5.0, window=40).square()

    want = run(x["q"], one.keys, one.values)
    torch.testing.assert_close(
        torch.compile(run, fullgraph=True, backend="aot_eager")(x["q"], other.keys, other.values), want
    )
    torch.testing.assert_close(other.keys, one.keys, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(other.values, one.values, equal_nan=True, rtol=0, atol=0)


def good() -> dict[str, Any]:
    keys, values = (torch.zeros(3, *shape) for shape in ops.cache_shapes(2, 8))
    step = CacheStep(torch.arange(5), torch.arange(5), torch.tensor([[0, 0, 5, 0, 5]]))
    q, k, v = (torch.zeros(5, heads, 8) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "keys": keys, "values": values, "step": step}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backend": "flash"}, "backend is 'flash'"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "q has 4 heads; expected a multiple of the 3"),
        ({"k": torch.zeros(5, 2, 9)}, r"k is \[5, 2, 9\]"),
        ({"v": torch.zeros(5, 2, 8, dtype=torch.float64)}, "v is torch.float64"),
        ({"q": torch.zeros(1, 5, 4, 8)}, "flatten the batch"),
        ({"q": torch.zeros(5, 4, 8, dtype=torch.float16)}, "q is torch.float16"),
        ({"q": torch.zeros(5, 4, 8, requires_grad=True)}, "a cache takes no gradient"),
        ({"v": torch.zeros(5, 2, 8, requires_grad=True)}, "torch.no_grad"),
        ({"keys": torch.zeros(3, 2, 64, 8)}, r"keys is torch.float32 \[3, 2, 64, 8\] on cpu; expected contiguous"),
        ({"keys": torch.zeros(3, 2, 8, 64, dtype=torch.bfloat16)}, "keys is torch.bfloat16"),
        ({"keys": torch.zeros(3, 2, 64, 8).mT}, r"keys .* expected contiguous torch.float32 \[blocks, 2, 8, 64\]"),
        ({"values": torch.zeros(3, 2, 64, 8)}, r"values is .* \[blocks, 2, 64, 16\] on cpu"),
        ({"values": torch.zeros(2, 2, 64, 16)}, r"values has 2 blocks, keys 3"),
        ({"values": torch.zeros(3, 2, 64, 16, device="meta")}, "on meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"cache_attention: .*{message}"):
        ops.cache_attention(**good() | changed)


def test_inputs_with_gradients_are_taken_where_none_is_recorded() -> None:
    given = good()
    with torch.no_grad():
        out = ops.cache_attention(**given | {"q": given["q"].requires_grad_()})
    assert not out.requires_grad


STEPS: list[tuple[str, Tensor, str]] = [
    ("position", torch.arange(4), r"position is torch.int64 \[4\]; expected contiguous int64 \[5\]"),
    ("position", torch.arange(5, dtype=torch.int32), r"position is torch.int32 \[5\]"),
    ("slot", torch.arange(10)[::2], "slot is .* expected contiguous"),
    ("slot", torch.zeros(5, 1, dtype=torch.int64), r"slot is torch.int64 \[5, 1\]"),
    (
        "tiles",
        torch.zeros(2, 4, dtype=torch.int64),
        r"tiles is torch.int64 \[2, 4\]; expected contiguous int64 \[2, 5\]",
    ),
    ("tiles", torch.zeros(5, dtype=torch.int64), r"tiles is torch.int64 \[5\]"),
    ("tiles", torch.zeros(5, 2, dtype=torch.int64).t(), "tiles is .* expected contiguous"),
]


@ALL_BACKENDS
@pytest.mark.parametrize(("field", "value", "message"), STEPS)
def test_a_step_of_another_form(field: str, value: Tensor, message: str, backend: str) -> None:
    given = good()
    step = given["step"]._replace(**{field: value})
    with pytest.raises(UserError, match=f"cache_attention: step.{message}"):
        ops.cache_attention(**given | {"step": step}, backend=backend)


@built
@pytest.mark.parametrize("slot", [-2, 3 * ops.BLOCK, 2**40])
def test_a_slot_outside_the_cache(slot: int) -> None:
    given = good()
    step = given["step"]._replace(slot=torch.tensor([0, 1, slot, 3, 4]))
    with pytest.raises(ValueError, match=f"slot 2 is {slot}: the cache has 192"):
        ops.cache_attention(**given | {"step": step})
    assert not given["keys"].any()


@built
@pytest.mark.parametrize(
    "tile",
    [
        [-1, 0, 5, 0, 5], [3, 0, 5, 0, 5], [0, -1, 5, 0, 5], [0, 0, 0, 0, 5], [0, 0, 65, 0, 5], [0, 0, 5, -1, 5],
        [0, 0, 5, 3, 2], [0, 0, 5, 0, 6],
    ],
)  # fmt: skip
def test_a_tile_outside_the_cache(tile: list[int]) -> None:
    given = good()
    step = given["step"]._replace(tiles=torch.tensor([[0, 0, 5, 0, 5], tile]))
    message = rf"tile 1 is \({', '.join(map(str, tile))}\): block below 3, count 1 to 64, queries within 5"
    with pytest.raises(ValueError, match=message):
        ops.cache_attention(**given | {"step": step})


@built
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(5, 8), "q, k: "),
        (0, torch.zeros(5, 3, 8), "q has 3 heads, k 2"),
        (1, torch.zeros(4, 2, 8), r"k and v must be Float \[5, 2, 8\], not Float \[4, 2, 8\]"),
        (2, torch.zeros(5, 2, 8, dtype=torch.float64), "not Double"),
        (3, torch.zeros(3, 2, 64, 8).mT, "keys must be a contiguous Float"),
        (4, torch.zeros(3, 2, 64, 8), r"values must be a contiguous Float \[3, 2, 64, 16\]"),
        (5, torch.arange(4), r"position must be a contiguous int64 \[5\]"),
        (6, torch.arange(5, dtype=torch.int32), "slot must be a contiguous int64"),
        (7, torch.zeros(2, 4, dtype=torch.int64), r"tiles must be a contiguous int64 \[2, 5\]"),
    ],
)
def test_what_the_operator_itself_refuses(place: int, value: Tensor, message: str) -> None:
    """The operator can be called by its name, without the checks of the function."""
    given = good()
    arguments = [*(given[n] for n in ("q", "k", "v", "keys", "values")), *given["step"], 1.0, None, None]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.dwrl_fast.cache_attention_(*arguments)


@built
def test_the_operator_has_no_float16() -> None:
    given = good()
    arguments = [given[n].half() for n in ("q", "k", "v", "keys", "values")]
    with pytest.raises(TypeError, match="float32, float64 or bfloat16"):
        torch.ops.dwrl_fast.cache_attention_(*arguments, *given["step"], 1.0, None, None)
