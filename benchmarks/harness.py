"""Measuring and writing down: the machine, interleaved times, peak memory, long-form CSV."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

QUANTILES = (20, 50, 80)
Event = Mapping[str, Any]
T = TypeVar("T")


# ---- the machine


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What a figure depends on, in words; the columns that every row of a CSV ends with."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "device": device.type,
        "gpu": gpu,
        "cpu": cpu_model(),
        "cores": str(_cores()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "reflora": _version("reflora"),
        "commit": commit(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def header(env: Mapping[str, str]) -> str:
    """Two lines for the top of a table."""
    machine = f"{env['gpu']}, " if env["gpu"] else ""
    machine += f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads"
    versions = ", ".join(f"{key} {env[key]}" for key in ("python", "torch", "triton", "reflora", "commit", "dtype"))
    return f"{machine}\n{versions}"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout that this file lies in, with `-dirty` for uncommitted changes to all but its results.

    Outside git what REFLORA_COMMIT says, or "none".
    """
    outside = os.environ.get("REFLORA_COMMIT") or "none"
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    except FileNotFoundError:
        return outside
    return head + "-dirty" * bool(changed) if head else outside


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- statistics


@dataclass(frozen=True)
class Summary:
    """Quantiles of one measurement, in its own unit, and the 95 % interval of its median, from six samples on."""

    p20: float
    p50: float
    p80: float
    quartiles: tuple[float, float]
    interval: tuple[float, float] | None
    count: int


def summarize(samples: Sequence[float]) -> Summary:
    """Quantiles by linear interpolation; of the median a 95 % interval. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("expected at least one sample, got none; the run was shorter than its warm-up.")
    values = torch.tensor(samples, dtype=torch.float64)
    points = torch.tensor([0.2, 0.25, 0.5, 0.75, 0.8], dtype=torch.float64)
    p20, p25, p50, p75, p80 = torch.quantile(values, points).tolist()
    return Summary(p20, p50, p80, (p25, p75), _median_interval(sorted(samples)), len(samples))


def _median_interval(ordered: Sequence[float]) -> tuple[float, float] | None:
    """Order statistics that hold the true median with 95 % or more, whatever the distribution; None for too few.

    The number of samples below the median is binomial with p = 1/2.
    """
    count, outside, rank = len(ordered), 0.0, 0
    while rank < (count - 1) // 2:
        outside += 2 * math.comb(count, rank) * 0.5**count
        if outside > 0.05:
            break
        rank += 1
    return (ordered[rank - 1], ordered[count - rank]) if rank else None


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> Summary:
    """Quantiles of `samples[i] / base[i]`: both taken in round i, so that a slow spell of the machine cancels."""
    return summarize([sample / reference for sample, reference in zip(samples, base, strict=True)])


# ---- options that every program has


def pick_device(parser: argparse.ArgumentParser, text: str | None) -> torch.device:
    """The device of --device, or where none is given a GPU if there is one. Leaves through `parser.error`."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:1, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: expected a device that torch can use, got {device}; this torch sees no GPU")
    return device


def make_folder(parser: argparse.ArgumentParser, folder: Path, given: Path) -> None:
    """Now, not when there are results to lose. Leaves through `parser.error`, which names what was `given`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a place that can be written, got {given}: {error.strerror}")


# ---- time


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """`seconds` between entry and exit, the device idle at both ends; `host`: those before the wait for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = self.host = 0.0

    def __enter__(self) -> Stopwatch:
        synchronize(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.host = time.perf_counter() - self._start
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._start


class StreamTimer:
    """Seconds of stream time between start and stop without draining the device (CUDA events); wall time on a CPU.

    `read` waits for the device and returns every interval since the last `read`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []

    def start(self) -> None:
        if self.device.type == "cuda":
            self._begin = self._event()
        else:
            self._begin_wall = time.perf_counter()

    def stop(self) -> None:
        if self.device.type == "cuda":
            self._spans.append((self._begin, self._event()))
        else:
            self._seconds.append(time.perf_counter() - self._begin_wall)

    def overtaken(self) -> bool:
        """Whether the device has come to the last start by now, so that what the host still does may count."""
        return self.device.type != "cuda" or self._begin.query()

    def read(self) -> list[float]:
        synchronize(self.device)
        seconds = self._seconds + [begin.elapsed_time(end) / 1e3 for begin, end in self._spans]
        self._spans, self._seconds = [], []
        return seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def interleave(
    cases: Mapping[str, Callable[[int], None]], rounds: int, label: str, seconds: float = float("inf")
) -> None:
    """Call every case once a round, `case(round)`, starting with another case each round; no new round after `seconds`.

    A case that must not count (a warm-up, a failure) says so itself: this only keeps the order fair and the bar moving.
    """
    names = list(cases)
    end = time.monotonic() + seconds
    for index in progress(range(rounds), label):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            cases[name](index)
        if time.monotonic() > end:
            break


def progress(items: Iterable[T], label: str) -> Iterable[T]:
    """A bar on a terminal, a line now and then elsewhere, on stderr."""
    return tqdm(items, desc=label, **_bar_options())


def bar(total: int, label: str) -> tqdm[Any]:
    """The same for work that counts by itself, gone when it is closed: a part of a longer one."""
    return tqdm(total=total, desc=label, leave=False, **_bar_options())


def _bar_options() -> dict[str, Any]:
    return {"file": sys.stderr, **({} if sys.stderr.isatty() else {"mininterval": 15.0, "ncols": 80})}


# ---- traces


def trace(work: Callable[[], object], *activities: torch.profiler.ProfilerActivity, **options: Any) -> list[Event]:
    """What torch.profiler sees of `work`, as the events of a Chrome trace."""
    with torch.profiler.profile(activities=list(activities), **options) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


# ---- output


@dataclass(frozen=True)
class Measurement:
    """One row of a CSV: what was measured, on which method of which case, in which unit."""

    benchmark: str
    case: str
    method: str
    metric: str
    unit: str
    summary: Summary


def write_csv(path: Path, rows: Sequence[Measurement], env: Mapping[str, str]) -> None:
    """One measurement a row: what, unit, quantiles, the 95 % interval of the median, samples, then the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ("benchmark", "case", "method", "metric", "unit")
        writer.writerow([*names, *(f"p{q}" for q in QUANTILES), "low95", "high95", "samples", *env])
        for row in rows:
            s = row.summary
            what = [row.benchmark, row.case, row.method, row.metric, row.unit]
            numbers = [f"{value:.6g}" for value in (s.p20, s.p50, s.p80)]
            numbers += [f"{value:.6g}" for value in s.interval] if s.interval else ["", ""]
            writer.writerow([*what, *numbers, s.count, *env.values()])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    lines = []
    for cells in (columns, ["-" * width for width in widths], *rows):
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
