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
from rich.table import Table
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


class Head(NamedTuple):
    """Seconds, but for chunk (rows) and workspace (bytes)."""

    chunk: int
    products: float  # three, each once and whole
    logits: float
    d_hidden: float
    d_weight: float  # its FLOPs
    sums: float  # the bytes of its float32 sum, which the product hides in part
    rows: float
    rounding: float
    workspace: float

    @property
    def ratios(self) -> tuple[float, float]:
        """To the bare products: with dWeight's sum hidden behind its product as far as it goes, and not at all."""
        rest = self.logits + self.d_hidden + self.rows + self.rounding
        return (
            (rest + max(self.d_weight, self.sums)) / self.products,
            (rest + self.d_weight + self.sums) / self.products,
        )


def head(t: int, h: int, v: int, at: Ceilings, chunk: int = 0) -> Head:
    """T trained rows of a bfloat16 head; `chunk` rows at most, by default as many as the operator takes."""
    if not chunk:
        with FakeTensorMode():
            hidden, weight = (torch.empty(n, h, dtype=torch.bfloat16, device="cuda") for n in (t, v))
            chunk = chunk_rows(hidden, weight)
    chunk = even_rows(t, chunk)
    count = -(-t // chunk)
    product = 2.0 * t * h * v / at.flops

    def least(*moved: float) -> float:
        return max(product, sum(moved) / at.bytes)

    return Head(
        chunk,
        3 * product,
        least(2 * v * h * count, 2 * t * h, 4 * t * v),
        least(2 * v * h * count, 2 * t * h, 2 * t * v),
        product,
        4.0 * v * h * (2 * count - 1) / at.bytes,
        (4 + 4 + 2) * t * v / at.bytes,
        (4 + 2) * v * h / at.bytes,
        4.0 * chunk * v,
    )


class Tree(NamedTuple):
    """tokens; keys: the mean that a query attends to; the rest in seconds."""

    tokens: int
    keys: float
    flash: float
    by_path: float  # beside flash attention's own
    by_depth: float
    takes_path: bool

    @property
    def share(self) -> float:
        """Of flash attention's rate, the way that is taken."""
        return self.flash / (self.flash + (self.by_path if self.takes_path else self.by_depth))


def tree(plan: Plan, heads: Heads, at: Ceilings) -> Tree:
    tokens, pairs = int(plan.stop[-1]), attended(plan)
    layout, group = paths._read(plan), heads.query // heads.key
    row = 2 * heads.query * heads.channels  # bytes of q
    flat = all(len(path) == 1 for path in layout.paths)
    return Tree(
        tokens,
        pairs / tokens,
        heads.flops(pairs) / at.flash,
        0.0 if flat else row * layout.by_path_cost(group) / at.bytes,
        row * layout.by_depth_cost() / at.bytes,
        not flat and layout.shorter_by_path(group),
    )


def print_head(console: Console, at: Ceilings) -> None:
    ms = lambda seconds: f"{seconds * 1e3:.2f}"  # noqa: E731
    table = Table(title="linear_policy_loss in bfloat16, milliseconds", title_justify="left")
    for heading in ("T, H, V", "chunk", "3 products", "logits", "dHidden", "dWeight", "its sum", "rows", "rounding",
                    "times 3 products", "workspace MB"):  # fmt: skip
        table.add_column(heading, justify="right")
    wanted = [(round(t * (1 - untrained)), h, v, 0) for t, h, v, untrained in GPU_SHAPES]
    for t, h, v, chunk in [*wanted, (*wanted[0][:3], 1024), (*wanted[0][:3], 512)]:
        it = head(t, h, v, at, chunk)
        table.add_row(
            f"{t}, {h}, {v}", str(it.chunk),
            *map(ms, (it.products, it.logits, it.d_hidden, it.d_weight, it.sums, it.rows, it.rounding)),
            f"{it.ratios[0]:.3f} to {it.ratios[1]:.3f}", f"{it.workspace / 1e6:,.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"asked: at most {MOST_FLOORS} times the three products; the last two lines are smaller chunks\n")


def print_trees(console: Console, at: Ceilings) -> None:
    table = Table(title="tree_attention, Qwen2.5-7B's heads in bfloat16, milliseconds a layer", title_justify="left")
    for heading in ("", "tokens", "mean keys", "flash attention", "by path", "by depth", "taken", "share of its rate"):
        table.add_column(heading, justify="right")
    plans = [("one sequence", sequences_of(8192))]
    plans += [(f"{data}, thoughts of {mean}", minibatch(data, mean)) for data in ("hh", "rmb") for mean in (40, 200)]
    for name, plan in plans:
        it = tree(plan, QWEN7B, at)
        table.add_row(
            name, f"{it.tokens:,}", f"{it.keys:.0f}", f"{it.flash * 1e3:.2f}", f"{it.by_path * 1e3:.2f}",
            f"{it.by_depth * 1e3:.2f}", "path" if it.takes_path else "depth", f"{it.share:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"asked: at least {LEAST_RATE} of the rate of equal work\n")


def print_kernels(console: Console) -> None:
    from bench.gpu.compiled import VARIANTS, compiled

    table = Table(title="Triton kernels compiled for sm_90, float32 logits, bfloat16 gradient", title_justify="left")
    for heading in ("kernel", "V or H", "registers", "spilled bytes", "shared bytes", "warps held"):
        table.add_column(heading, justify="right")
    for variant, (kernel, constants, _) in enumerate(VARIANTS):
        it = compiled(variant, 90, "fp32", "bf16")
        size = constants.get("V") or constants.get("H") or ""
        spilled = it.spill_stores + it.spill_loads
        name = kernel.__name__ + " with soft-cap" * bool(constants.get("HAS_CAP"))
        table.add_row(name, str(size), str(it.registers), str(spilled), str(it.shared), f"{it.occupancy:.0%}")
    console.print(table)


def main() -> None:
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
