"""How much memory every method takes beyond LoRA: `python -m benchmarks.memory --help`.

One method after the other, alone, from the same weights and batches: the peak of two training iterations, what the
optimizer keeps after them (its state), and the peak of one more step (its temporaries). Bytes of tensors, not of the
process. Nothing is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from . import bars, harness, methods, options, probes, unused
from .harness import Measurement
from .throughput import memory_rows


def report(names: Sequence[str], rows: Sequence[Measurement]) -> str:
    """The table, in MB; a method that failed is a row of dashes."""
    found = {(row.method, row.metric): row.summary.p50 for row in rows}
    columns = {
        "peak": ("peak of training", ".2f"),
        "above LoRA": ("peak above LoRA", "+.3f"),
        "state": ("optimizer state", ".3f"),
        "above LoRA ": ("state above LoRA", "+.3f"),
        "temporaries": ("temporaries of a step", ".3f"),
    }
    lines = []
    for label in (methods.LABELS[name] for name in names):
        cells = [(found.get((label, metric)), form) for metric, form in columns.values()]
        lines.append([label, *("-" if value is None else format(value, form) for value, form in cells)])
    return harness.table(["method", *columns], lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.parser("memory", (__doc__ or "").split("\n")[0])
    chosen = parser.parse_args(argv)
    options.complete(parser, chosen)
    return chosen


def run(chosen: argparse.Namespace) -> tuple[list[Measurement], str]:
    """Load and measure. Returns the rows of the CSV and the table with its head."""
    prepared = options.prepare(chosen, steps=options.BATCHES, warmup=0)
    rows = memory_rows("memory", prepared.bench.footprints(chosen.methods), prepared.case)
    counter = probes.CUDA_MEMORY if chosen.device.type == "cuda" else probes.CPU_MEMORY
    return rows, f"{prepared.head}\nMB; {counter}\n\n{report(chosen.methods, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    options.announce("memory", chosen, f"{options.BATCHES} steps each")
    began = time.perf_counter()
    try:
        rows, text = run(chosen)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"memory: {error}") from error
    options.finish("memory", chosen, rows, f"{text}\n\n{time.perf_counter() - began:.0f} s", bars.memory)


if __name__ == "__main__":
    unused.leave_out()
    main()
