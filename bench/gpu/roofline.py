"""What a GPU has to do for the head and for tree attention, and how fast that can be.

    python -m bench.gpu.roofline [--kernels]

Counted from shapes and from the chunks and calls that the operators really make; nothing is run. Ceilings are assumed
(--flops, --bytes, --flash) or read from a report of bench.gpu (--report). `--kernels` compiles the Triton kernels for
sm_90 and prints what they take. docs/performance.md explains the columns.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import command
from bench.operators.linear_policy_loss import GPU_SHAPES, MOST_FLOORS
from bench.operators.tree_attention import LEAST_RATE, QWEN7B, Heads, Plan, attended, minibatch, sequences_of
from dwrl_fast.ops import paths
from dwrl_fast.ops.products import chunk_rows, even_rows


class Ceilings(NamedTuple):
    """FLOP a second of a large product in bfloat16 and of varlen flash attention; bytes a second of a copy."""

    flops: float
    bytes: float
    flash: float


def head_line(t: int, h: int, v: int, chunk: int, at: Ceilings) -> tuple[str, ...]:
    """T trained rows of a bfloat16 head in chunks of `chunk` rows at most; 0: as many as the operator takes."""
    if not chunk:
        with FakeTensorMode():
            hidden, weight = (torch.empty(n, h, dtype=torch.bfloat16, device="cuda") for n in (t, v))
            chunk = chunk_rows(hidden, weight)
    chunk = even_rows(t, chunk)
    count = -(-t // chunk)
    product = 2.0 * t * h * v / at.flops
    logits, d_hidden = (max(product, (2 * (v * h * count + t * h) + each * t * v) / at.bytes) for each in (4, 2))
    # dWeight's float32 sum, which its product hides in part; the work on rows; rounding dWeight.
    moved = 4 * v * h * (2 * count - 1), (4 + 4 + 2) * t * v, (4 + 2) * v * h
    sums, rows, rounding = (size / at.bytes for size in moved)
    rest = logits + d_hidden + rows + rounding
    ratios = ((rest + d_weight) / (3 * product) for d_weight in (max(product, sums), product + sums))
    return (
        f"{t}, {h}, {v}",
        str(chunk),
        *(f"{1e3 * x:.2f}" for x in (3 * product, logits, d_hidden, product, sums, rows, rounding)),
        " to ".join(f"{ratio:.3f}" for ratio in ratios),
        f"{4.0 * chunk * v / 1e6:,.0f}",
    )


def tree_line(name: str, plan: Plan, heads: Heads, at: Ceilings) -> tuple[str, ...]:
    """Both ways through a tree beside flash attention's own time, and the share of its rate that is left."""
    tokens, pairs = int(plan.stop[-1]), attended(plan)
    layout, group = paths._read(plan), heads.query // heads.key
    row = 2 * heads.query * heads.channels  # bytes of q
    flat = all(len(path) == 1 for path in layout.paths)
    flash, by_depth = heads.flops(pairs) / at.flash, row * layout.by_depth_cost() / at.bytes
    by_path = 0.0 if flat else row * layout.by_path_cost(group) / at.bytes
    taken, spent = ("path", by_path) if not flat and layout.shorter_by_path(group) else ("depth", by_depth)
    times = (f"{1e3 * x:.2f}" for x in (flash, by_path, by_depth))
    return name, f"{tokens:,}", f"{pairs / tokens:.0f}", *times, taken, f"{flash / (flash + spent):.2f}"


def print_head(console: Console, at: Ceilings) -> None:
    """What linear_policy_loss has to do, for the shapes that bench.operators.linear_policy_loss runs on a GPU."""
    wanted = [(round(t * (1 - untrained)), h, v, 0) for t, h, v, untrained in GPU_SHAPES]
    table = command.table(
        "linear_policy_loss in bfloat16, milliseconds",
        ("T, H, V", "chunk", "3 products", "logits", "dHidden", "dWeight", "its sum", "rows", "rounding",
         "times 3 products", "workspace MB"),
        [head_line(*shape, at) for shape in (*wanted, (*wanted[0][:3], 1024), (*wanted[0][:3], 512))],
        left=0,
    )  # fmt: skip
    console.print(table)
    console.print(f"asked: at most {MOST_FLOORS} times the three products; the last two lines are smaller chunks\n")


def print_trees(console: Console, at: Ceilings) -> None:
    """What tree_attention has to do, for one sequence and for minibatches as long as real ones."""
    plans = [("one sequence", sequences_of(8192))]
    plans += [(f"{data}, thoughts of {mean}", minibatch(data, mean)) for data in ("hh", "rmb") for mean in (40, 200)]
    table = command.table(
        "tree_attention, Qwen2.5-7B's heads in bfloat16, milliseconds a layer",
        ("", "tokens", "mean keys", "flash attention", "by path", "by depth", "taken", "share of its rate"),
        [tree_line(name, plan, QWEN7B, at) for name, plan in plans],
        left=0,
    )
    console.print(table)
    console.print(f"asked: at least {LEAST_RATE} of the rate of equal work\n")


def print_kernels(console: Console) -> None:
    """What each Triton kernel takes of a multiprocessor of sm_90."""
    from bench.gpu.compiled import VARIANTS, compiled

    lines = []
    for variant, (kernel, constants, _) in enumerate(VARIANTS):
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
    """The command: print the tables at the ceilings that the command line gives."""
    parser = command.parser("gpu.roofline", __doc__)
    parser.add_argument("--flops", type=float, default=790e12, help="of bfloat16 products, a second (default 790e12)")
    parser.add_argument("--bytes", type=float, default=4.3e12, help="read and written, a second (default 4.3e12)")
    parser.add_argument("--flash", type=float, default=300e12, help="FLOP/s of flash attention (default 300e12)")
    parser.add_argument("--report", type=Path, help="take the first two from the ceilings of this report")
    parser.add_argument("--kernels", action="store_true", help="compile the Triton kernels too")
    args = parser.parse_args()
    at = Ceilings(args.flops, args.bytes, args.flash)
    if args.report:
        found = json.loads(args.report.read_text())["ceilings"]
        at = at._replace(flops=found["bf16_flop_per_second"], bytes=found["bytes_per_second"])
    console = Console(width=140)
    source = f"of {args.report}" if args.report else "assumed"
    console.print(
        f"ceilings, {source}: {at.flops / 1e12:.0f} TFLOP/s, {at.bytes / 1e12:.2f} TB/s; flash attention, assumed: "
        f"{at.flash / 1e12:.0f} TFLOP/s\n"
    )
    print_head(console, at)
    print_trees(console, at)
    if args.kernels:
        print_kernels(console)


if __name__ == "__main__":
    main()
