"""How the cost of a step over fused AdamW's grows with rank, number of layers and width, on square layers.

One size varies at a time, the others stay at their base. Timed as in `step`, caches cold. Ranks above 128 go through
torch, whatever the backend.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import figures, harness, step
from .stepper import DTYPES, SLOW, measure

NAME = "scaling"
METHODS = ("lora", "reflora", "reflora-carried", "reflora-s", "published", "lora-pro", "lora-rite")


@dataclass(frozen=True)
class Point:
    """So many square layers of one width at one rank."""

    rank: int
    layers: int
    width: int

    def __str__(self) -> str:
        return f"r={self.rank}, {self.layers} pairs, width {self.width}"


BASE = {"cuda": Point(16, 128, 4096), "cpu": Point(8, 24, 768)}
PANELS = {
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "layers": (8, 16, 32, 64, 128, 256, 512),
    "width": (256, 512, 1024, 2048, 4096, 8192),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    step.add_common(parser)
    for name in ("rank", "layers", "width"):
        parser.add_argument(f"--{name}", nargs="+", type=int, help=f"values of the {name} panel")
    parser.add_argument("--base", nargs=3, type=int, metavar=("RANK", "LAYERS", "WIDTH"), help="what stays fixed")


def base_of(options: argparse.Namespace) -> Point:
    return Point(*options.base) if options.base else BASE[options.device.type]


def points(options: argparse.Namespace) -> dict[str, list[tuple[int, Point]]]:
    """By panel: the values of its axis and what is measured there."""
    base = base_of(options)
    chosen = {name: getattr(options, name) or values for name, values in PANELS.items()}
    return {name: [(x, replace(base, **{name: x})) for x in values] for name, values in chosen.items()}


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`python -m benchmarks.kernels scaling`. A point that two panels share is measured once."""
    step.complete(parser, options, rounds=12, seconds=4.0)
    for name in ("base", "rank", "layers", "width"):
        values = getattr(options, name) or [1]
        if min(values) < 1:
            parser.error(f"--{name}: expected at least 1, got {min(values)}")
    env = harness.environment(options.device, DTYPES[options.dtype])
    print(harness.header(env), flush=True)
    path = options.out / f"{NAME}_{options.device.type}.csv"
    found: dict[Point, list[harness.Measurement]] = {}
    panels = points(options)
    sound = True
    for point in dict.fromkeys(point for panel in panels.values() for _, point in panel):
        slow = point.rank > step.SLOW_RANK and options.device.type == "cuda"
        names: Sequence[str] = options.methods or [name for name in METHODS if not (slow and name in SLOW)]
        done = measure(options, str(point), point.layers * [(point.width, point.width)], point.rank, names)
        found[point] = step.measurements(done, NAME)
        sound &= done.sound
        harness.write_csv(path, [row for rows in found.values() for row in rows], env)
        print(step.report(found[point], done.failures), flush=True)
        del done
    figure = {name: [(x, found[point]) for x, point in panel] for name, panel in panels.items()}
    drawn = figures.scaling(path.with_suffix(".png"), figure, base_of(options), env)
    print(f"\nwrote {path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))
    if not sound:
        raise SystemExit(1)
