"""Every kernel of an optimizer step on a GPU: time, traffic, occupancy and registers, as torch.profiler sees them.

Each step follows a large copy, which evicts the caches and keeps the stream busy until the host is ahead, as in `step`.
"gap" is the time within a step in which no kernel runs. Bytes are those of benchmarks.roofline, not counted ones.
--bare makes the same steps without torch's profiler, for `ncu --clock-control none` to look at.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import harness, methods, probes, roofline, shapes, step
from .harness import Measurement, summarize
from .stepper import DTYPES, Stepper, gradient

NAME = "profile"
METHODS = ("lora", "reflora", "reflora-carried", "reflora-s")
CASES = ("deberta-v3-base:8", "llama-7b:32")
FUSED, GAP = "fused AdamW", "gap"
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Kernel:
    """One kernel of a step; times: seconds in each step, of all its launches together; args: of the longest launch."""

    name: str
    times: list[float] = field(default_factory=list)
    launches: int = 0
    longest: float = 0.0
    args: dict[str, Any] = field(default_factory=dict)


def short(name: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    if "FusedAdam" in name:
        return FUSED
    while (bare := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = bare
    return name.split("::")[-1].strip().removeprefix("void ")


def spans(events: Sequence[harness.Event]) -> list[list[harness.Event]]:
    """What ran on the device, in order, cut at the copies from device to device that stand before each step."""
    entries = [event for event in events if event.get("ph") == "X" and event.get("cat") in _DEVICE]
    found: list[list[harness.Event]] = []
    copying = False
    for event in sorted(entries, key=lambda event: event["ts"]):
        if event["cat"] == "gpu_memcpy" and "DtoD" in event["name"]:
            copying = True
            continue
        if copying:
            found.append([])
        copying = False
        if found:
            found[-1].append(event)
    return found


def kernels(events: Sequence[harness.Event]) -> list[Kernel]:
    """The kernels of the steps in a trace, in the order of their first launch, and the gap between them last."""
    found: dict[str, Kernel] = {}
    gap = Kernel(GAP)
    steps = spans(events)
    for turn, span in enumerate(steps):
        end = span[0]["ts"]
        idle = 0.0
        for event in span:
            idle += max(0.0, event["ts"] - end)
            end = max(end, event["ts"] + event["dur"])
            kernel = found.setdefault(short(event["name"]), Kernel(short(event["name"])))
            kernel.times += [0.0] * (turn + 1 - len(kernel.times))
            kernel.times[turn] += event["dur"] / 1e6
            kernel.launches += 1
            if event["dur"] > kernel.longest:
                kernel.longest, kernel.args = event["dur"], dict(event.get("args", {}))
        gap.times.append(idle / 1e6)
    for kernel in found.values():
        kernel.times += [0.0] * (len(steps) - len(kernel.times))
    return [*found.values(), gap]


def moved(method: str, kernel: str, parameters: int) -> int | None:
    """Bytes that a kernel of a method must move, all float32; None where it is not known."""
    carried = method == "reflora-carried"
    each = {
        FUSED: roofline.ADAMW,
        "gram_kernel": roofline.bytes_a_parameter(carried=carried) - roofline.ADAMW,
        "update_kernel": roofline.ADAMW,
        "foresee_kernel": roofline.FORESEEN,
        "turn_kernel": roofline.ADAMW,
    }.get(kernel)
    return None if each is None else each * parameters


# ---- measuring


def measure(options: argparse.Namespace, name: str, rank: int, copies: probes.Copies) -> list[Measurement]:
    """The kernels of all methods on one case; nothing with --bare."""
    layers = shapes.layers(name)
    case = f"{name} ({len(layers)} pairs) r={rank}"
    rows: list[Measurement] = []
    pairs = shapes.random_pairs(layers, rank, torch.float32, options.device)
    generator = torch.Generator(options.device).manual_seed(0)
    factors = [factor for pair in pairs for factor in pair]
    draw = [gradient(factor, generator) for factor in factors]
    for method in options.methods:
        stepper = Stepper(method, pairs, methods.Setting(lr=1e-4, warmup_steps=0), options.device)
        stepper.set_gradients(draw)
        for turn in range(3):
            stepper.wall(turn)

        def work(stepper: Stepper = stepper) -> None:
            for turn in range(options.steps):
                stepper.gpu(turn, copies)

        if options.bare:
            work()
            continue
        kinds = torch.profiler.ProfilerActivity
        events = harness.trace(work, kinds.CUDA)
        if not spans(events):
            raise SystemExit("profile: torch.profiler saw no kernel; does this machine let CUPTI trace?")
        if stepper.overtaken:
            print(f"{method}: gaps are host time in {stepper.overtaken} of {options.steps} steps, the device was ahead")
        rows += measurements(case, method, kernels(events), shapes.size(layers, rank), copies)
    return rows


def measurements(
    case: str, method: str, found: Sequence[Kernel], parameters: int, copies: probes.Copies
) -> list[Measurement]:
    rows: list[Measurement] = []
    bandwidth = copies.bytes / copies.seconds
    for kernel in found:
        label = f"{methods.LABELS[method]}: {kernel.name}"
        count = len(kernel.times)

        def add(metric: str, unit: str, samples: Sequence[float], label: str = label) -> None:
            rows.append(Measurement(NAME, case, label, metric, unit, summarize(samples)))

        add("time", "us", [1e6 * seconds for seconds in kernel.times])
        bytes_ = moved(method, kernel.name, parameters)
        if bytes_:
            rates = [bytes_ / seconds for seconds in kernel.times if seconds]
            add("bytes to move", "MB", [bytes_ / 1e6])
            add("bandwidth", "GB/s", [rate / 1e9 for rate in rates])
            add("of copy bandwidth", "ratio", [rate / bandwidth for rate in rates])
        if kernel.name != GAP:
            add("launches", "count", [kernel.launches / count])
        for key, metric, unit in (
            ("est. achieved occupancy %", "occupancy", "%"),
            ("registers per thread", "registers", "count"),
            ("shared memory", "shared memory", "bytes"),
        ):
            if key in kernel.args:
                add(metric, unit, [float(kernel.args[key])])
        for key in ("grid", "block"):
            if key in kernel.args:
                x, y, z = kernel.args[key]
                add(key, "count", [float(x * y * z)])
    return rows


_COLUMNS = (
    ("us", "time", "{0.p50:.1f}"),
    ("launches", "launches", "{0.p50:g}"),
    ("MB", "bytes to move", "{0.p50:.1f}"),
    ("GB/s", "bandwidth", "{0.p50:.0f}"),
    ("of copy", "of copy bandwidth", "{0.p50:.2f}"),
    ("occupancy", "occupancy", "{0.p50:.0f}%"),
    ("registers", "registers", "{0.p50:.0f}"),
    ("shared", "shared memory", "{0.p50:.0f}"),
    ("programs", "grid", "{0.p50:.0f}"),
    ("threads", "block", "{0.p50:.0f}"),
)


def report(rows: Sequence[Measurement], copy: float) -> str:
    """A table per case, a row per kernel; copy: bytes/s of a plain copy."""
    lines: list[str] = []
    for case in dict.fromkeys(row.case for row in rows):
        found = {(row.method, row.metric): row.summary for row in rows if row.case == case}
        cells = [
            [name] + [form.format(found[name, m]) if (name, m) in found else "-" for _, m, form in _COLUMNS]
            for name in dict.fromkeys(name for name, _ in found)
        ]
        lines.append(f"\n{case}, copy {copy / 1e9:.4g} GB/s")
        lines.append(harness.table(["kernel", *(title for title, _, _ in _COLUMNS)], cells))
    return "\n".join(lines)


# ---- the program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", metavar="SHAPES:RANK", default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=20, help="steps of each method")
    parser.add_argument("--copy-mib", type=int, default=512, help="size of the tensor whose copy evicts the caches")
    parser.add_argument("--bare", action="store_true", help="no profiler, no results: the steps alone")
    parser.add_argument("--device", help="cuda, cuda:1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the CSV")


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`python -m benchmarks.kernels profile`: needs a GPU."""
    options.device = harness.pick_device(parser, options.device)
    if options.device.type != "cuda":
        parser.error("--device: expected a GPU, whose kernels are to be seen, got cpu; `step` times a step on a CPU")
    for name in ("steps", "copy_mib"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    cases = [step.parse_case(parser, text) for text in options.cases]
    harness.make_folder(parser, options.out, options.out)
    env = harness.environment(options.device, DTYPES["float32"])
    print(harness.header(env), flush=True)
    copies = probes.Copies(options.device, options.copy_mib)
    path = options.out / f"{NAME}_{options.device.type}.csv"
    rows: list[Measurement] = []
    for name, rank in cases:
        found = measure(options, name, rank, copies)
        if found:
            rows += found
            harness.write_csv(path, rows, env)
            print(report(found, copies.bytes / copies.seconds), flush=True)
    if rows:
        print(f"\nwrote {path}")
