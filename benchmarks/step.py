"""The cost of an optimizer step on true shapes, without a model.

Every method has pairs of its own with the same values. As in training, each step gets fresh gradient tensors after
`zero_grad(set_to_none=True)`; making them does not count. Two kinds of round. "cold": the methods take turns, and a
large copy before each step evicts the caches, as the forward and backward passes of training do. "warm": the rounds
of one method on end, so that small factors stay in the caches. On a GPU a cold round times two steps of each method:
"wall", the device idle before and after, so that host time counts in full; and "gpu", events in a stream that copies
keep busy until the host is ahead, so that host time does not count. "host" is when the call of "wall" returned;
"overtaken", how often the device came to a "gpu" step before the host was through, so that host time may count.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import figures, harness, methods, overhead, probes, shapes
from .harness import Measurement, summarize
from .stepper import COPY, DTYPES, SLOW, Run, Stepper, measure

NAME = "step"
METHODS = (
    "lora", "reflora", "reflora-carried", "reflora-s", "invariant", "invariant-carried", "riemannian-fused",
    "published", "riemannian",
)  # fmt: skip
CPU_METHODS = (*METHODS, "invariant-rite", "invariant-identity", "invariant-muon", "lora-pro", "lora-rite")
# above it torch's svd, and before 2.12 its eigh, take up to 0.1 s a matrix on CUDA (pytorch issue 175585)
SLOW_RANK = 32
GPU_CASES = ("deberta-v3-base:8", "llama-7b:16", "llama-7b:32", "llama-7b:64", "llama-7b:128", "llama3-8b:32")
CPU_CASES = ("deberta-v3-base:8", "deberta-v3-base:32")
TO_LORA = "{} to LoRA"


# ---- results


def measurements(run: Run, benchmark: str, paired: bool = True) -> list[Measurement]:
    """Rows of a run: times, ratios to LoRA's fused AdamW (round by round if `paired`, else to its median), the rest."""
    rows: list[Measurement] = []

    def add(method: str, metric: str, unit: str, samples: Sequence[float]) -> None:
        if samples:
            rows.append(Measurement(benchmark, run.case, method, metric, unit, summarize(samples)))

    sound = [stepper for stepper in run.steppers if not stepper.failure and stepper.times["wall"]]
    base = next((stepper for stepper in sound if stepper.name == "lora"), None)
    bandwidth = {t: run.copies.bytes / s for t, s in run.copies.times.items()} if run.copies else {}
    add(COPY, "bandwidth", "GB/s", [value / 1e9 for value in bandwidth.values()])
    for stepper in sound:
        label = methods.LABELS[stepper.name]
        for kind, times in stepper.times.items():
            add(label, kind, "ms", [1e3 * seconds for seconds in times.values()])
            if base and kind != "host":
                add(label, TO_LORA.format(kind), "ratio", _ratios(times, base.times[kind], paired))
        moved = probes.step_bytes(stepper.optimizer, stepper.parameters)
        add(label, "bytes to move", "MB", [moved / 1e6])
        times = stepper.times["gpu"] or stepper.times["wall"]
        shares = [moved / seconds / bandwidth[turn] for turn, seconds in times.items() if turn in bandwidth]
        add(label, "of copy bandwidth", "ratio", shares)
        if stepper.times["gpu"]:
            add(label, "overtaken", "ratio", [stepper.overtaken / len(stepper.times["gpu"])])
    for method, metric, unit, value in _probe(run, sound, base):
        add(method, metric, unit, [value])
    return rows


def _ratios(times: dict[int, float], base: dict[int, float], paired: bool) -> list[float]:
    if not base:
        return []
    middle = summarize(list(base.values())).p50
    return [seconds / (base[turn] if paired else middle) for turn, seconds in times.items() if turn in base]


def _probe(run: Run, sound: Sequence[Stepper], base: Stepper | None) -> list[tuple[str, str, str, float]]:
    """Launches and memory of one more step of each method, untimed."""
    found: list[tuple[str, str, str, float]] = []
    peaks: dict[str, int] = {}
    for stepper in sound:
        label = methods.LABELS[stepper.name]
        if stepper.device.type != "cuda" or stepper.kept is None:
            continue
        stepper.set_gradients(run.draw)
        peaks[stepper.name] = stepper.kept + probes.memory(stepper.optimizer.step, stepper.device).peak
        stepper.set_gradients(run.draw)
        launches = probes.launches(stepper.optimizer.step, stepper.device)
        if launches:
            found.append((label, "kernel launches", "count", launches.kernels))
            found.append((label, "copies to the host", "count", launches.to_host))
            found.append((label, "other copies and fills", "count", launches.others))
        if base and base.kept is not None and base.name in peaks:
            found.append((label, "memory kept above LoRA", "MB", (stepper.kept - base.kept) / 1e6))
            found.append((label, "step peak above LoRA", "MB", (peaks[stepper.name] - peaks[base.name]) / 1e6))
    return found


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("gpu ms", "gpu", "{0.p50:.3f}"),
    ("quartiles", "gpu", "{0.quartiles[0]:.3f}-{0.quartiles[1]:.3f}"),
    ("to LoRA", "gpu to LoRA", "{0.p50:.2f}"),
    ("wall ms", "wall", "{0.p50:.3f}"),
    ("quartiles", "wall", "{0.quartiles[0]:.3f}-{0.quartiles[1]:.3f}"),
    ("to LoRA", "wall to LoRA", "{0.p50:.2f}"),
    ("host ms", "host", "{0.p50:.3f}"),
    ("MB", "bytes to move", "{0.p50:.1f}"),
    ("of copy", "of copy bandwidth", "{0.p50:.2f}"),
    ("launches", "kernel launches", "{0.p50:.0f}"),
    ("to host", "copies to the host", "{0.p50:.0f}"),
    ("kept +MB", "memory kept above LoRA", "{0.p50:+.1f}"),
    ("peak +MB", "step peak above LoRA", "{0.p50:+.1f}"),
    ("overtaken", "overtaken", "{0.p50:.0%}"),
)


def report(rows: Sequence[Measurement], failures: Sequence[str] = ()) -> str:
    """A table per case, a row per method, with the columns that were measured."""
    lines: list[str] = []
    for case in dict.fromkeys(row.case for row in rows):
        found = {(row.method, row.metric): row.summary for row in rows if row.case == case}
        columns = [column for column in _COLUMNS if any(metric == column[1] for _, metric in found)]
        names = list(dict.fromkeys(method for method, _ in found if method != COPY))
        cells = [
            [name] + [form.format(found[name, m]) if (name, m) in found else "-" for _, m, form in columns]
            for name in names
        ]
        copy = found.get((COPY, "bandwidth"))
        lines.append(f"\n{case}" + (f", copy {copy.p50:.4g} GB/s" if copy else ""))
        lines.append(harness.table(["method", *(title for title, _, _ in columns)], cells))
    return "\n".join([*lines, *failures])


# ---- the program


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every program that times steps."""
    parser.add_argument("--methods", nargs="+", choices=methods.BARE, help="default: all but the very slow")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of factors and gradients")
    parser.add_argument("--rounds", type=int, help="counted rounds")
    parser.add_argument("--warm", type=int, default=4, help="rounds before them, at least 2")
    parser.add_argument("--seconds", type=float, help="most seconds of counted rounds a case")
    parser.add_argument("--copy-mib", type=int, help="size of the tensor whose copy evicts the caches")
    parser.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the CSV and the PNG")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--cases", nargs="+", metavar="SHAPES:RANK", help=f"shapes: {', '.join(shapes.NAMES)}")
    parser.add_argument("--caches", nargs="+", choices=["cold", "warm"], help="default: cold, on a CPU both")


def complete(parser: argparse.ArgumentParser, options: argparse.Namespace, rounds: int, seconds: float) -> None:
    """Check the common options and set those that depend on the device. Leaves through `parser.error`."""
    options.device = harness.pick_device(parser, options.device)
    gpu = options.device.type == "cuda"
    if gpu and options.device.index is not None:
        torch.cuda.set_device(options.device)
    options.rounds = rounds if options.rounds is None else options.rounds
    options.seconds = seconds if options.seconds is None else options.seconds
    options.copy_mib = (512 if gpu else 128) if options.copy_mib is None else options.copy_mib
    reason = methods.unserved(options.backend, options.device) or methods.missing(options.methods or ())
    if reason:
        parser.error(reason)
    for name, least in (("rounds", 1), ("warm", 2), ("copy_mib", 1)):
        if getattr(options, name) < least:
            got = getattr(options, name)
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {got}")
    if not options.seconds > 0:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    harness.make_folder(parser, options.out, options.out)


def parse_case(parser: argparse.ArgumentParser, text: str) -> tuple[str, int]:
    shape, _, rank = text.partition(":")
    if shape not in shapes.NAMES or not rank.isdecimal() or int(rank) < 1:
        parser.error(f"--cases: expected SHAPES:RANK with shapes of {', '.join(shapes.NAMES)}, got {text!r}")
    return shape, int(rank)


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`python -m benchmarks.kernels step`: writes after every case, so that one cut short leaves what it has."""
    complete(parser, options, rounds=50, seconds=30.0)
    cpu = options.device.type == "cpu"
    cases = [parse_case(parser, text) for text in options.cases or (CPU_CASES if cpu else GPU_CASES)]
    env = harness.environment(options.device, DTYPES[options.dtype])
    print(harness.header(env), flush=True)
    rows: list[Measurement] = []
    sound = True
    path = options.out / f"{NAME}_{options.device.type}.csv"
    for shape, rank in cases:
        layers = shapes.layers(shape)
        slow = shape.startswith("llama") if cpu else rank > SLOW_RANK
        usual = CPU_METHODS if cpu else METHODS
        names = options.methods or methods.available([name for name in usual if not (slow and name in SLOW)])
        for caches in options.caches or (("cold", "warm") if cpu else ("cold",)):
            done = measure(options, f"{shape} ({len(layers)} pairs) r={rank} {caches}", layers, rank, names, caches)
            found = measurements(done, NAME, caches == "cold")
            rows += found
            sound &= done.sound
            harness.write_csv(path, rows, env)
            print(report(found, done.failures), flush=True)
            del done
    drawn = figures.step(path.with_suffix(".png"), rows, env)
    drawn |= overhead.draw(options.out / f"overhead_{options.device.type}.png", rows, env)
    print(f"\nwrote {path}" + (f", {path.stem}.png and overhead_{options.device.type}.png" if drawn else ""))
    if not sound:
        raise SystemExit(1)
