"""What importing reflora adds to a program that has torch: `python -m benchmarks.import_time`.

Each figure is the median over fresh processes, in which torch has been imported before the clock starts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

import torch

from . import harness

STATEMENTS = (
    "import reflora",
    "from reflora import RefLoRAAdamW, find_pairs, create_reflora_optimizer",
    "from reflora import refactor_, precondition_, linalg, reference, LoRAPair",
    "import reflora; reflora.refactor_([(torch.ones(2, 4), torch.ones(4, 2))])",
)
PROGRAM = "import time, torch; t = time.perf_counter(); {}; print(1e3 * (time.perf_counter() - t))"


def milliseconds(statement: str, runs: int) -> list[float]:
    command = [sys.executable, "-c", PROGRAM.format(statement)]
    return [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(runs)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time", description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args(argv)
    print(harness.header(harness.environment(torch.device("cpu"), torch.float32)))
    rows = []
    for statement in STATEMENTS:
        times = milliseconds(statement, options.runs)
        rows.append([statement, f"{median(times):.1f}", f"{min(times):.1f}", f"{max(times):.1f}"])
    print(harness.table(["statement, torch imported before", "ms", "least", "most"], rows))


if __name__ == "__main__":
    main()
