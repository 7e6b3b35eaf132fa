"""The required work of a GPU for the head and for tree attention, and lower bounds of its time.

    python -m bench.gpu.roofline [--kernels]

Work is counted from shapes and from the actual chunks of the operators; nothing is run. Peak rates are assumed
(--flops, --bytes, --attention) or read from a report of bench.gpu (--report). `--kernels` compiles the Triton kernels
for sm_90 and prints their resources. docs/performance.md explains the columns.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from dwrl_fast.kernels import attention
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import command
from bench.operators.linear_policy_loss import GPU_SHAPES, MOST_FLOORS, MOST_PEAK
from bench.operators.tree_attention import QWEN7B, Heads, Plan, attended, minibatch, sequences_of
from dwrl_fast.ops import tiles
from dwrl_fast.ops.products import CHUNKS, chunk_rows, piece_rows


class Ceilings(NamedTuple):
    """FLOP a second of a large product in bfloat16 and of attention's; bytes a second of a copy."""

    flops: float
    bytes: float
    attention: float


def head_line(t: int, h: int, v: int, chunks: int, at: Ceilings) -> tuple[str, ...]:
    """The line for T trained rows of a bfloat16 head, in blocks of `chunks` chunks."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, h, dtype=torch.bfloat16, device="cuda") for n in (t, v))
        chunk = chunk_rows(hidden, weight)
    block = piece_rows(t, chunks * chunk, "cuda")
    chunk = piece_rows(block, chunk, "cuda")
    products, blocks = -(-t // chunk), -(-t // block)
    product = 2.0 * t * h * v / at.flops
    logits = max(product, (2 * (v * h * products + t * h) + 4 * t * v) / at.bytes)
    d_hidden = max(product, (2 * (v * h * blocks + t * h) + 2 * t * v) / at.bytes)
    # The float32 sum of dWeight, partly hidden by its product; the row functions; the rounding of dWeight.
    moved = 4 * v * h * (2 * blocks - 1), (4 + 4 + 2) * t * v, (4 + 2) * v * h
    sums, rows, rounding = (size / at.bytes for size in moved)
    rest = logits + d_hidden + rows + rounding
    ratios = ((rest + d_weight) / (3 * product) for d_weight in (max(product, sums), product + sums))
    workspace, inputs = 4 * chunk * v + 2 * block * v, 2 * (t + v) * h
    return (
        f"{t}, {h}, {v}",
        f"{block}, {chunk}",
        *(f"{1e3 * x:.2f}" for x in (3 * product, logits, d_hidden, product, sums, rows, rounding)),
        " to ".join(f"{ratio:.3f}" for ratio in ratios),
        f"{(inputs + workspace + 4 * v * h + 2 * t * h) / 2**30:.2f}",
    )


def walked(plan: Plan, heads: Heads) -> tuple[float, float, float]:
    """Computed pairs of query and key (including masked ones), divided by the needed pairs, for the three attention
    kernels: forward, dK and dV, dQ.
    """
    blocks = attention.sizes(torch.bfloat16, heads.channels)
    forest, cpu, needed = tiles.forest(plan, int(plan.stop[-1])), torch.device("cpu"), attended(plan)

    def lists(of: attention.Blocks) -> float:
        entries = forest.queries(of.queries, None, cpu).bounds.diff()
        return float((-(-entries // of.keys) * of.keys).sum() * of.queries) / needed

    runs = forest.keys(blocks.to_keys.keys, heads.key, cpu).runs
    steps = -(-(runs[:, 2] - runs[:, 1]) // blocks.to_keys.queries)
    to_keys = float(steps.sum() * blocks.to_keys.queries * blocks.to_keys.keys) / needed
    return lists(blocks.forward), to_keys, lists(blocks.to_queries)


def tree_line(name: str, plan: Plan, heads: Heads, at: Ceilings) -> tuple[str, ...]:
    """The line for a tree: products computed by the kernels in addition to the seven needed, and their time."""
    tokens, pairs = int(plan.stop[-1]), attended(plan)
    each = walked(plan, heads)
    products = sum(count * share for count, share in zip((2, 4, 3), each, strict=True))
    took = products / 7 * heads.flops(pairs) / at.attention
    shares = (f"{share:.2f}" for share in (*each, products / 7))
    return name, f"{tokens:,}", f"{pairs / tokens:.0f}", *shares, f"{1e3 * took:.2f}"


def print_head(console: Console, at: Ceilings) -> None:
    """Print the work of linear_policy_loss, for the GPU shapes of bench.operators.linear_policy_loss."""
    wanted = [(round(t * (1 - untrained)), h, v, CHUNKS) for t, h, v, untrained in GPU_SHAPES]
    table = command.table(
        "linear_policy_loss in bfloat16, milliseconds",
        ("T, H, V", "block, chunk", "3 products", "logits", "dHidden", "dWeight", "its sum", "rows", "rounding",
         "times 3 products", "peak GiB"),
        [head_line(*shape, at) for shape in (*wanted, *((*wanted[0][:3], chunks) for chunks in (1, 2, 8)))],
        left=0,
    )  # fmt: skip
    console.print(table)
    console.print(
        f"asked of the first line: at most {MOST_FLOORS} times the three products, and {MOST_PEAK / 2**30:.1f} GiB "
        "with the inputs; the last three lines are blocks of other sizes\n"
    )


def print_trees(console: Console, at: Ceilings) -> None:
    """Print the work of tree_attention, for one sequence and for minibatches with real lengths."""
    plans = [("one sequence", sequences_of(8192))]
    plans += [(f"{data}, thoughts of {mean}", minibatch(data, mean)) for data in ("hh", "rmb") for mean in (40, 200)]
    table = command.table(
        "tree_attention, Qwen2.5-7B's heads in bfloat16, milliseconds a layer",
        ("", "tokens", "mean keys", "forward", "to keys", "to queries", "all", "at the assumed rate"),
        [tree_line(name, plan, QWEN7B, at) for name, plan in plans],
        left=0,
    )
    console.print(table)
    console.print(
        "pairs of a query and a key that each kernel computes, of those needed; all: FLOP, of seven products\n"
    )


def print_kernels(console: Console) -> None:
    """Print the resources of each Triton kernel on a multiprocessor of sm_90."""
    from bench.gpu.compiled import VARIANTS, compiled

    lines = []
    for variant, (kernel, constants, *_) in enumerate(VARIANTS):
        it = compiled(variant, 90, "fp32", "bf16")
        size = constants.get("V") or constants.get("H") or ""
        name = kernel.__name__ + " with soft-cap" * bool(constants.get("HAS_CAP"))
        counts = (size, it.registers, it.spill_stores + it.spill_loads, it.shared)
        lines.append((name, *map(str, counts), f"{it.occupancy:.0%}"))
    table = command.table(
        "Triton kernels compiled for sm_90, float32 logits, bfloat16 gradient",
        ("kernel", "V or H", "registers", "spilled bytes", "shared bytes", "warps held"),
        lines,
        left=0,
    )
    console.print(table)


def main() -> None:
    """The command: print the tables for the given peak rates."""
    parser = command.parser("gpu.roofline", __doc__)
    parser.add_argument("--flops", type=float, default=790e12, help="of bfloat16 products, a second (default 790e12)")
    parser.add_argument("--bytes", type=float, default=4.3e12, help="read and written, a second (default 4.3e12)")
    parser.add_argument("--attention", type=float, default=300e12, help="FLOP/s of its products (default 300e12)")
    parser.add_argument("--report", type=Path, help="take the first two from the ceilings of this report")
    parser.add_argument("--kernels", action="store_true", help="compile the Triton kernels too")
    args = parser.parse_args()
    at = Ceilings(args.flops, args.bytes, args.attention)
    if args.report:
        found = json.loads(args.report.read_text())["ceilings"]
        at = at._replace(flops=found["bf16_flop_per_second"], bytes=found["bytes_per_second"])
    console = Console(width=140)
    source = f"of {args.report}" if args.report else "assumed"
    console.print(
        f"ceilings, {source}: {at.flops / 1e12:.0f} TFLOP/s, {at.bytes / 1e12:.2f} TB/s; attention, assumed: "
        f"{at.attention / 1e12:.0f} TFLOP/s\n"
    )
    print_head(console, at)
    print_trees(console, at)
    if args.kernels:
        print_kernels(console)


if __name__ == "__main__":
    main()
