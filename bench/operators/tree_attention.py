"""Times attention, forward and backward, for sequences and for ragged preference trees.

    python -m bench.operators.tree_attention --quick

A tree is a prompt, two responses and their thoughts. "Padded" is the usual layout without a tree: separate causal
sequences, right-padded to the longest. For each variant the attended pairs of query and key per head are counted,
including padding, and their FLOPs for one layer (like the time): seven products of D per pair and head, two in the
forward pass and five in the backward pass, which recomputes the logits.

On a GPU the heads are those of Qwen2.5-7B in bfloat16, and the trees are minibatches of 32 pairs with the lengths of hh
and rmb. The lower bound is "equal work": PyTorch's varlen flash attention over ordinary causal sequences of equal
length, with as many queries and pairs as the tree. The tree's FLOP rate is compared with its rate. Further variants are
the same kernels on the tree, each node with the gathered keys of its path, and FlexAttention with the tree's mask.
Differences are relative to attention in float64, sequence by sequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench.harness import Case, Row, Variant, main
from bench.operators import varlen
from bench.training import lengths
from dwrl_fast import ops
from dwrl_fast.batching.tree import tree_batch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE_TOKENS = 2048  # the definition stores [heads, U, U] several times
EQUAL = "equal work"
LEAST_RATE = 0.85  # target for a GPU, relative to the rate of equal work
PAIRS = 32


class Heads(NamedTuple):
    """The sizes of an attention layer: query heads, key and value heads, and channels of each."""

    query: int
    key: int
    channels: int

    def flops(self, pairs: int) -> float:
        """FLOPs of forward and backward for `pairs` pairs of query and key."""
        return 7 * 2 * self.channels * self.query * pairs


SMALL, QWEN7B = Heads(4, 4, 64), Heads(28, 4, 128)


class Plan(NamedTuple):
    """A forest in the form of `ops.tree_attention`: start, stop and parent of each node, [M] int64."""

    start: Tensor
    stop: Tensor
    parent: Tensor


def sequences_of(tokens: int, count: int = 1) -> Plan:
    """`count` sequences of `tokens` tokens each, without sharing."""
    stop = torch.arange(1, count + 1) * tokens
    return Plan(stop - tokens, stop, torch.full((count,), -1))


def minibatch(data: str, mean: int, pairs: int = PAIRS) -> Plan:
    """Pairs with the lengths of a data set, each response with thoughts of `mean` tokens on average, as one tree whose
    root is the common beginning of all prompts.
    """
    thoughts = lengths.thought_lengths(mean, 2 * lengths.THOUGHTS * pairs)
    groups = lengths.groups(lengths.drawn(data, pairs), thoughts, 151936)
    plan = tree_batch(groups, torch.device("cpu")).plan
    return Plan(plan.start, plan.stop, plan.parent)


def ragged_trees(count: int, thoughts: int = 4) -> Plan:
    """Random trees. Thoughts have 40 tokens on average, after 50 tokens of fixed turns, which belong to the
    response.
    """
    g = torch.Generator().manual_seed(0)
    sizes_of_one = [(32, 256), *2 * [(66, 210), *thoughts * [(5, 76)]]]  # minimum and maximum tokens, depth first
    parents_of_one = [-1, *(up for response in (1, 2 + thoughts) for up in (0, *thoughts * [response]))]
    sizes = torch.tensor([int(torch.randint(*bounds, (), generator=g)) for bounds in count * sizes_of_one])
    parent = [up if up < 0 else up + i * len(sizes_of_one) for i in range(count) for up in parents_of_one]
    stop = sizes.cumsum(0)
    return Plan(stop - sizes, stop, torch.tensor(parent))


def sequences(plan: Plan) -> list[Tensor]:
    """For each leaf, the tokens from the root to its end."""
    paths: list[Tensor] = []
    for start, stop, up in zip(*(x.tolist() for x in plan), strict=True):
        own = torch.arange(start, stop)
        paths.append(own if up < 0 else torch.cat([paths[up], own]))
    inner = set(plan.parent.tolist())
    return [path for node, path in enumerate(paths) if node not in inner]


def attended(plan: Plan) -> int:
    """The total number of pairs of query and key."""
    place = torch.zeros(int(plan.stop[-1]), dtype=torch.int64)  # position of each token in its sequence
    for path in sequences(plan):
        place[path] = torch.arange(len(path))
    return int((place + 1).sum())


def equal_work(plan: Plan) -> Plan:
    """Causal sequences of equal length with about as many tokens and pairs."""
    tokens = int(plan.stop[-1])
    length = max(1, round(2 * attended(plan) / tokens - 1))
    return sequences_of(length, max(1, round(tokens / length)))


def drawn(tokens: int, heads: Heads, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output."""
    g = torch.Generator(DEVICE).manual_seed(0)
    draw = lambda n: torch.randn(tokens, n, heads.channels, generator=g, device=DEVICE).to(dtype)  # noqa: E731
    return [draw(n).requires_grad_() for n in (heads.query, heads.key, heads.key)], draw(heads.query)


def variant(name: str, run: Callable[[], object], heads: Heads, pairs: int, why: str = "", **options: Any) -> Variant:
    """A variant that attends to `pairs` pairs. why: the reason if it cannot run."""
    work = heads.flops(pairs)
    return Variant(
        name, None if why else run, why, counters={"pairs": pairs, "MFLOP": work / 1e6}, flops=work, **options
    )


def variants(plan: Plan, heads: Heads, dtype: torch.dtype) -> list[Variant]:
    """The variants: ours, padded SDPA and the definition; on a GPU also `gpu_variants`."""
    tokens, leaves, needed = int(plan.stop[-1]), sequences(plan), attended(plan)
    longest, whole = max(map(len, leaves)), len(leaves) == 1
    flat, gradient = drawn(tokens, heads, dtype)
    copied = torch.stack([F.pad(path, (0, longest - len(path))) for path in leaves])  # padding repeats token 0
    inputs = [x.detach()[copied].transpose(1, 2).contiguous().requires_grad_() for x in flat]
    copied_gradient = gradient[copied].transpose(1, 2)

    def padded() -> tuple[Tensor, ...]:
        q, k, v = inputs
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads.query != heads.key)
        found = torch.autograd.grad(out, inputs, copied_gradient)
        return tuple(x.transpose(1, 2).flatten(0, 1) for x in found) if whole else found

    def ours(name: str, backend: str, pairs: int, why: str = "") -> Variant:
        def run() -> tuple[Tensor, ...]:
            out = ops.tree_attention(flat[0], flat[1], flat[2], plan, backend=backend)
            return torch.autograd.grad(out, flat, gradient)

        return variant(name, run, heads, pairs, why)

    too_long = f"it would hold [{heads.query}, {tokens}, {tokens}]" if tokens > REFERENCE_TOKENS else ""
    name = "SDPA" if whole else f"padded SDPA, [{len(leaves)}, {longest}]"
    found = [
        ours("dwrl_fast", "auto", needed),
        # The gradients of padded copies are not the gradients of the tokens.
        variant(name, padded, heads, len(leaves) * longest * (longest + 1) // 2, comparable=whole),
        ours("definition", "reference", tokens**2, too_long),
    ]
    if DEVICE.type == "cuda":
        found.insert(0, Variant("float64", lambda: exact(plan, flat, gradient), reference=True))
        found += gpu_variants(plan, heads, dtype, flat, gradient)
    return found


def gpu_variants(plan: Plan, heads: Heads, dtype: torch.dtype, flat: list[Tensor], gradient: Tensor) -> list[Variant]:
    """PyTorch's flash attention on equal work and on the paths of the tree, and FlexAttention."""
    even, needed = equal_work(plan), attended(plan)
    note = f"{len(even.stop)} sequences of {int(even.stop[0])}"
    ordinary = partial(varlen.attention, varlen.segments(even, DEVICE), *drawn(int(even.stop[-1]), heads, dtype))
    by_path = partial(varlen.attention, varlen.segments(plan, DEVICE), flat, gradient)
    return [
        variant(EQUAL, ordinary, heads, attended(even), note=note, comparable=False),
        variant(f"{EQUAL}, not deterministic", partial(ordinary, deterministic=False), heads, attended(even),
                comparable=False),
        variant("flash attention by path", by_path, heads, needed),
        variant("FlexAttention", partial(varlen.flex_attention, plan, flat, gradient), heads, needed),
    ]  # fmt: skip


def exact(plan: Plan, flat: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """dq, dk, dv in float64, each sequence alone; a token's output gradient belongs to the first sequence that contains
    it.
    """
    group, done = flat[0].shape[1] // flat[1].shape[1], 0
    total = [torch.zeros_like(x, dtype=torch.float64) for x in flat]
    for path in sequences(plan):
        rows = path[path >= done].to(gradient.device)  # depth first: tokens seen before have smaller numbers
        done, path = int(path[-1]) + 1, path.to(gradient.device)
        for head in range(flat[1].shape[1]):
            places: list[Any] = [(rows, slice(head * group, (head + 1) * group)), (path, head), (path, head)]
            q, k, v = (x.detach()[at].double().requires_grad_() for x, at in zip(flat, places, strict=True))
            logits = torch.einsum("thd,sd->hts", q, k) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(path > rows[:, None], -torch.inf).softmax(-1)
            out = torch.einsum("hts,sd->thd", weights, v)
            parts = torch.autograd.grad(out, (q, k, v), gradient[places[0]].double())
            for sums, at, part in zip(total, places, parts, strict=True):
                sums[at] += part
    return tuple(x.float() for x in total)


def case(name: str, plan: Plan, dtype: torch.dtype = torch.float32, quick: bool = True, heads: Heads = SMALL) -> Case:
    """The case of this plan."""
    of = f"{heads.query} heads" if heads.query == heads.key else f"{heads.query} and {heads.key} heads"
    return Case(
        f"{name}, U {int(plan.stop[-1])}, {of} of {heads.channels}, {str(dtype)[6:]}",
        lambda: variants(plan, heads, dtype),
        quick,
        floor=EQUAL if DEVICE.type == "cuda" else "",
    )


def cases() -> list[Case]:
    """All that are measured on the device at hand."""
    if DEVICE.type == "cuda":
        plans = [("one sequence", sequences_of(8192)), ("sequences of 1024", sequences_of(1024, 16))]
        plans += [(f"{d}, thoughts of {m}", minibatch(d, m)) for d in ("hh", "rmb") for m in (40, 200)]
        return [case(name, plan, torch.bfloat16, heads=QWEN7B) for name, plan in plans]
    return [
        case("one sequence", sequences_of(2048)),
        case("one sequence", sequences_of(2048), torch.bfloat16),
        case("2 trees", ragged_trees(2)),
        case("32 trees", ragged_trees(32)),
        case("32 trees", ragged_trees(32), torch.bfloat16, quick=False),
    ]


def summary(rows: list[Row], console: Console) -> None:
    """What was asked of a GPU, beside what was measured."""
    for name in dict.fromkeys(row.case for row in rows):
        rates = {row.variant: row.flop_rate for row in rows if row.case == name and row.flop_rate}
        ours, floor = rates.get("dwrl_fast"), rates.get(EQUAL)
        if ours and floor:
            rate = f"{ours / 1e12:.0f} TFLOP/s, {ours / floor:.3f} of the {floor / 1e12:.0f} of equal work"
            console.print(f"{name}\n  {rate}, asked at least {LEAST_RATE}")


if __name__ == "__main__":
    main("operators.tree_attention", __doc__, lambda args: cases(), summary)
