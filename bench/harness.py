"""Times variants of one operator, interleaved, so that other load on the machine affects all of them equally.

A script provides cases. A case provides variants, each with a function to time or the reason why it cannot run here.
Every variant runs once unmeasured, once for its peak memory, once under the profiler for its matrix products, and then
`--repeats` times alternately with the others, each time from an idle device to an idle device. On a GPU it runs once
more for its kernels. Its result is compared with that of the first variant, or of a reference variant; a peer that
computes something else is marked. Prints a table; `--json` and `--plot` write files.
"""

import argparse
import ctypes
import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from bench import command
from bench.machine import ceilings, machine


@dataclass(frozen=True)
class Variant:
    """One way to compute the case. If it cannot run here, `run` is None and `why` is the reason."""

    name: str
    run: Callable[[], object] | None
    why: str = ""
    quick: bool = True
    comparable: bool = True  # whether it returns the same as the first variant
    reference: bool = False  # the others are compared with its result; it is not timed
    flops: float = 0.0  # required FLOPs of one run, if known
    times: float = 1.0  # the number of the case's units `per` in one run
    note: str = ""  # its settings, if they were chosen here
    counters: Mapping[str, float] = field(default_factory=dict)  # its own counters, shown next to the measured ones


@dataclass(frozen=True)
class Case:
    """One set of inputs on which variants are compared."""

    name: str
    variants: Callable[[], list[Variant]]  # created when the case runs, so that one case at a time is in memory
    quick: bool = True
    unit: float = 1.0  # multiplications of the product of one row, H V, so that counters count rows
    per: str = ""  # the unit that seconds are divided by; a whole run if empty
    floor: str = ""  # the variant that is the unit of the others' times
    loose: float | None = None  # relative difference explained by rounding, if it does not follow from the dtype


@dataclass
class Row:
    """The measurements of one variant of one case, as `--json` writes them."""

    case: str
    variant: str
    seconds_median: float | None
    seconds_iqr: float | None
    peak_bytes: int | None
    beyond_bytes: int | None = None  # the peak without the results of `run`, because gradients are not overhead
    difference: float | None = None  # relative difference from the first variant, of the worst tensor
    counters: dict[str, float] = field(default_factory=dict)
    skipped: str = ""
    disagrees: bool = False
    unit: str = "seconds"  # of seconds_median and seconds_iqr
    note: str = ""
    flop_rate: float | None = None  # FLOP per second
    floors: float | None = None  # the time divided by that of the case's floor
    kernels: list[tuple[str, int, float]] = field(default_factory=list)  # on a GPU: name, calls, seconds per run


HEADINGS = ("variant", "ms", "± iqr", "peak MiB", "beyond gradients", "products", "rows", "MiB moved")
MEASURED = ("products", "rows", "bytes")  # the counters of every row; variants may add their own
ELEMENT_BYTES = {"double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2}
LOOSE = {torch.bfloat16: 0.1}  # relative differences explained by rounding; 0.01 for other dtypes


def matrix_products(run: Callable[[], object], unit: float = 1.0) -> dict[str, float]:
    """The number of matrix products in `run`, their multiplications in units of `unit`, and the bytes that they read
    and write.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run()
    found = {"products": 0, "rows": 0.0, "bytes": 0.0}
    assert trace.profiler is not None
    for event in trace.profiler.kineto_results.events():
        first = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name())
        if first is not None and len(event.shapes()) >= first + 2:
            a, b = event.shapes()[first : first + 2]
            size = ELEMENT_BYTES[event.dtypes()[first]]  # also of the result, except bfloat16 into float32 on CUDA
            batch = a[0] if len(a) == 3 else 1
            m, k, n = a[-2], a[-1], b[-1]
            found["products"] += 1
            found["rows"] += batch * m * k * n / unit
            found["bytes"] += size * batch * (m * k + k * n + m * n)
    return found


def device_kernels(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """The GPU kernels and copies during `run`: name, calls and total seconds, longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    events = (e for e in trace.key_averages() if e.self_device_time_total)
    found = [(e.key, e.count, e.self_device_time_total / 1e6) for e in events]
    return sorted(found, key=lambda each: -each[2])


def peak_memory(run: Callable[[], object]) -> int | None:
    """Peak bytes of `run` above the level before it; None if the system does not report them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory cached by the allocator would hide the need of this run
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    except (OSError, AttributeError):
        return None
    before = proc_bytes("/proc/self/status", "VmRSS")
    run()
    return max(0, proc_bytes("/proc/self/status", "VmHWM") - before)


def proc_bytes(path: str, key: str) -> int:
    """The value of `key` in a /proc file, converted from kB to bytes."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measure(
    case: Case, repeats: int, seconds: float, quick: bool, only: Collection[str] | None = None
) -> Iterator[Row]:
    """A row for each variant, or for those named in `only`.

    Stops repeating when the case has taken `seconds`, but not before three rounds.
    """
    rows: list[Row] = []
    able: list[tuple[Variant, Callable[[], object], Row, list[float]]] = []  # with the seconds of each repetition
    expected: list[torch.Tensor] = []
    gc.collect()  # free the previous case
    for variant in (v for v in case.variants() if only is None or v.name in only):
        left_out = "it takes longer than --quick may" if quick and not variant.quick else ""
        row = Row(case.name, variant.name, None, None, None, note=variant.note)
        row.skipped = left_out or ("" if variant.run else variant.why)
        row.unit = f"seconds per {case.per}" if case.per else "seconds"
        rows.append(row)
        if variant.run is None or left_out:
            continue
        try:
            returned = tensors(variant.run())
            expected = expected or returned
            if variant.reference:
                rows.pop()
                continue
            size = sum(x.nbytes for x in returned)
            if variant.comparable:
                row.difference, row.disagrees = furthest(returned, expected, case.loose)
            del returned
            row.peak_bytes = peak_memory(variant.run)
            row.beyond_bytes = None if row.peak_bytes is None else max(0, row.peak_bytes - size)
            row.counters = matrix_products(variant.run, case.unit) | dict(variant.counters)
            if torch.cuda.is_available():
                row.kernels = device_kernels(variant.run)
        except Exception as error:  # a failing peer is a row of the table and does not end the benchmark
            row.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
            continue
        able.append((variant, variant.run, row, []))
    # The previous variant affects caches and free memory, so the order of variants is random.
    order = random.Random(0)
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for _, run, _, taken in order.sample(able, len(able)):
            taken.append(timed(run))
    for variant, _, row, taken in able:
        each = [seconds / variant.times for seconds in taken]
        row.seconds_median = statistics.median(each)
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        row.seconds_iqr = high - low
        row.flop_rate = variant.flops / statistics.median(taken) if variant.flops else None
    least = next((row.seconds_median for row in rows if row.variant == case.floor), None)
    for row in rows:
        row.floors = row.seconds_median / least if least and row.seconds_median else None
    yield from rows


def tensors(returned: object) -> list[torch.Tensor]:
    """The tensors among what a variant returned."""
    some = returned if isinstance(returned, tuple | list) else (returned,)
    return [x for x in some if isinstance(x, torch.Tensor)]


def furthest(found: list[torch.Tensor], like: list[torch.Tensor], loose: float | None = None) -> tuple[float, bool]:
    """The largest relative difference, in the 2-norm, and whether any is too large for rounding."""
    if [x.shape for x in found] != [x.shape for x in like]:
        return math.inf, True
    each = [((x.double() - y.double()).norm() / y.double().norm()).item() for x, y in zip(found, like, strict=True)]
    limits = [LOOSE.get(x.dtype, 0.01) if loose is None else loose for x in found]
    return max(each), not all(d <= limit for d, limit in zip(each, limits, strict=True))  # so is a NaN


def timed(run: Callable[[], object]) -> float:
    """Seconds of `run`, including the work of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(rows: Collection[Row], console: Console) -> None:
    """Print a table for each case."""
    for case in dict.fromkeys(row.case for row in rows):
        some = [row for row in rows if row.case == case]
        own = dict.fromkeys(key for row in some for key in row.counters if key not in MEASURED)
        lines = [_cells(row, own) for row in some]
        optional = (heading for heading in ("TFLOP/s", "floors") if any(line.get(heading) for line in lines))
        headings = (*HEADINGS, *own, *optional, "differs by")
        cells = ([line.get(heading, "") for heading in headings] for line in lines)
        console.print(command.table(f"{case}: milli{some[0].unit}", headings, cells))


def _cells(row: Row, own: Iterable[str]) -> dict[str, str]:
    """By heading."""
    if row.seconds_median is None or row.seconds_iqr is None:
        return {"variant": row.variant, "ms": f"[dim]skipped: {row.skipped}[/]"}
    peak, beyond = ("?" if x is None else f"{x / 2**20:.0f}" for x in (row.peak_bytes, row.beyond_bytes))
    difference = "" if row.difference is None else f"{row.difference:.0e}"
    return {
        "variant": f"{row.variant}\n[dim]{row.note}[/]" if row.note else row.variant,
        "ms": f"{row.seconds_median * 1e3:.2f}",
        "± iqr": f"{row.seconds_iqr * 1e3:.2f}",
        "peak MiB": peak,
        "beyond gradients": beyond,
        "products": f"{row.counters['products']:.6g}",
        "rows": f"{row.counters['rows']:.6g}",
        "MiB moved": f"{row.counters['bytes'] / 2**20:.0f}",
        **{key: f"{row.counters[key]:,.0f}" for key in own if key in row.counters},
        "TFLOP/s": f"{row.flop_rate / 1e12:.2f}" if row.flop_rate else "",
        "floors": f"{row.floors:.3f}" if row.floors else "",
        "differs by": f"[bold red]DISAGREES {difference}[/]" if row.disagrees else difference,
    }


def show_kernels(rows: Collection[Row], console: Console, most: int = 12) -> None:
    """Print the longest GPU kernels of the first variant of each case."""
    for case in dict.fromkeys(row.case for row in rows if row.kernels):
        row = next(row for row in rows if row.case == case and row.kernels)
        total = sum(seconds for *_, seconds in row.kernels)
        lines = [
            (name[:110], str(calls), f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}")
            for name, calls, seconds in row.kernels[:most]
        ]
        title = f"{case}, {row.variant}: {1e3 * total:.2f} ms on the GPU, {len(row.kernels)} kernels"
        console.print(command.table(title, ("kernel", "calls", "ms", "share"), lines))


def plot(rows: list[Row], path: Path) -> None:
    """Plot a PNG with one row of panels per case: time on the left, memory on the right."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(11, 1 + 2.4 * len(cases)), layout="tight")
    axes = figure.subplots(len(cases), 2, squeeze=False)
    for line, case in zip(axes, cases, strict=True):
        some = [r for r in rows if r.case == case and r.seconds_median is not None][::-1]
        names = [r.variant for r in some]
        line[0].barh(
            names, [1e3 * (r.seconds_median or 0) for r in some], xerr=[500 * (r.seconds_iqr or 0) for r in some]
        )
        line[1].barh(names, [(r.peak_bytes or 0) / 2**20 for r in some], color="tab:orange")
        line[0].set(title=case, xlabel=f"milli{some[0].unit if some else 'seconds'} (median, IQR)")
        line[1].set(xlabel="peak MiB beyond the inputs", yticklabels=[])
    figure.savefig(path, dpi=120)


def main(
    name: str,
    about: str | None,
    cases: Callable[[argparse.Namespace], list[Case]],
    summary: Callable[[list[Row], Console], None] = lambda rows, console: None,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """The command `python -m bench.<name>`: measure the selected `cases`. `summary` prints figures over all cases.

    about: the docstring of its module. options: adds its own options, which `cases` reads.
    """
    parser = command.parser(name, about)
    options(parser)
    parser.add_argument("--json", type=Path, help="write machine, versions, commit and rows to this file")
    parser.add_argument("--plot", type=Path, help="write a PNG of time and memory to this file")
    parser.add_argument("--quick", action="store_true", help="only what ends within a minute on two cores")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="only these variants, by their whole names")
    parser.add_argument("--repeats", type=int, default=15, help="rounds over the variants (default 15)")
    parser.add_argument("--seconds", type=float, default=240, help="no further round after this long in a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repeats, seconds = (3, 4.0) if args.quick else (args.repeats, args.seconds)
    console = Console(width=180)
    rows: list[Row] = []
    for case in (c for c in cases(args) if args.case in c.name and (c.quick or not args.quick)):
        found = list(measure(case, repeats, seconds, args.quick, args.only))
        show(found, console)
        show_kernels(found, console)
        rows += found
    summary(rows, console)
    if args.json:
        report = {"benchmark": name.rpartition(".")[2], "machine": machine(), "rows": [asdict(r) for r in rows]}
        if torch.cuda.is_available():
            report["ceilings"] = ceilings()
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        plot(rows, args.plot)
