"""Measures streaming: seconds to the first batch, rows per second, seconds to resume, and peak memory.

    python -m bench.data.stream [--rows 10000000] [--kind gzip] [--in_memory]

It writes a file of random pairs, and reads it once through the shuffle buffer, as in training but without the
tokenizer. `--in_memory` reads it without streaming, for comparison. The memory is the peak of the process, minus the
peak before it opened the file.
"""

import argparse
import gzip
import json
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench import command
from dwrl_fast.data import Reader, open_rows, read_preferences
from dwrl_fast.feed import Feed, Shuffled, Source, Streamed


def write_rows(path: Path, rows: int, characters: int) -> None:
    """Write pairs whose texts are slices of one random text, because generating new texts would take long."""
    text = "".join(random.Random(0).choices("etaoin shrdlu", k=characters + 5000))
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as file:
        for i in range(rows):
            start = i % 4999
            prompt, chosen, rejected = (text[start + k : start + k + characters] for k in range(3))
            file.write(json.dumps({"prompt": f"{i} {prompt}", "chosen": chosen, "rejected": rejected}) + "\n")


def peak_mib() -> float:
    """The peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stream(path: Path, buffer: int) -> Streamed:
    """Stream `path` through a shuffle buffer of `buffer` rows. Every row is usable."""
    rows = Reader(open_rows(path), consecutive=True)
    return Streamed(rows, lambda row: ("", Counter()), buffer_size=buffer, seed=0)


def make_feed(source: Source, batch: int, steps: int) -> Feed:
    """A feed of one pass over `source`, as in training, in batches of `batch` rows."""
    return Feed([source], [1.0], batch_size=batch, epochs=1, max_steps=steps)


def main() -> None:
    """The command: write the file, then measure how it is read."""
    parser = command.parser("data.stream", __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--characters", type=int, default=100, help="of each of a row's three texts")
    parser.add_argument("--kind", choices=("plain", "gzip"), default="plain")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--buffer", type=int, default=10_000)
    parser.add_argument("--in_memory", action="store_true")
    parser.add_argument("--folder", help="where the file is written, and removed; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / ("rows.jsonl.gz" if options.kind == "gzip" else "rows.jsonl")
        write_rows(path, options.rows, options.characters)
        print(f"{options.rows:,} rows, {path.stat().st_size / 2**20:,.0f} MiB, {options.kind}")
        measure(path, options)


def measure(path: Path, options: argparse.Namespace) -> None:
    """Print how fast `path` is read, how much memory this takes, and how long it takes to resume half-way."""
    steps, before, started, cpu = options.rows // options.batch, peak_mib(), time.perf_counter(), time.process_time()
    source: Source = (
        Shuffled(str(path), read_preferences(path).rows, 0) if options.in_memory else stream(path, options.buffer)
    )
    feed = make_feed(source, options.batch, steps)
    feed.next()
    first = time.perf_counter() - started
    for _ in range(1, steps // 2):
        feed.next()
    state = json.dumps(feed.state())
    for _ in range(steps // 2, steps):
        feed.next()
    seconds, cpu, rows = time.perf_counter() - started, time.process_time() - cpu, steps * options.batch
    print(f"first batch   {first:8.2f} s")
    print(f"whole pass    {seconds:8.2f} s   {rows / seconds:,.0f} rows/s, {rows / cpu:,.0f} a second of CPU time")
    print(f"peak memory   {peak_mib() - before:8.0f} MiB more than before")
    if options.in_memory:
        return
    started = time.perf_counter()
    again = make_feed(stream(path, options.buffer), options.batch, steps)
    again.restore(json.loads(state))
    again.next()
    seconds = time.perf_counter() - started
    print(f"resumed       {seconds:8.2f} s   half-way; its state has {len(state) / 1024:,.0f} KiB")


if __name__ == "__main__":
    main()
