"""`python -m reflora`: what is installed, what serves, and whether it works. `python -m reflora doctor FOLDER`."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import doctor
from .backends import load
from .columns import REFACTORED
from .constants import BACKENDS
from .functional import refactor_
from .reference import refactoring

PACKAGES = ("reflora", "torch", "triton", "peft", "transformers", "accelerate")
# relative error of a float32 pair
TOLERANCE = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not fail
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m reflora", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    examined = commands.add_parser("doctor", help="condition, balance and effective rank of a saved PEFT adapter")
    examined.add_argument("folder", type=Path, help="written by PeftModel.save_pretrained")
    examined.add_argument(
        "--refactor", type=Path, metavar="OUT", help="write a balanced copy with the same merged weights"
    )
    examined.add_argument("--png", type=Path, metavar="FILE", help="draw the table")
    options = parser.parse_args(argv)
    if options.command == "doctor":
        return examine(options.folder, options.refactor, options.png)
    return show()


def show() -> int:
    """Print what is installed and which backend serves which device. Returns 1 if one gives wrong results, else 0."""
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    failed = 0
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in map(torch.device, devices):
        print(f"\n{device}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else _instruction_set()}")
        for name in BACKENDS:
            reason = load(name).unavailable(device)
            if reason:
                print(f"  {name:7} -  {reason}")
                continue
            error, took = self_test(name, device)
            failed += not error < TOLERANCE
            verdict = "ok" if error < TOLERANCE else "WRONG"
            print(f"  {name:7} {verdict}  24 layers in {1e3 * took:.1f} ms, error {error:.1e}")
    return int(failed > 0)


def self_test(backend: str, device: torch.device) -> tuple[float, float]:
    """Worst error of a balanced float32 pair against the float64 reference, and the seconds per call."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(24):
        r = (4, 8, 16)[index % 3]
        A, B = (torch.randn(shape, generator=generator) for shape in ((r, 96), (64, r)))
        pairs.append((A.to(device), 0.01 * B.to(device)))
    before = [(A.double().cpu(), B.double().cpu()) for A, B in pairs]
    refactor_([(A.clone(), B.clone()) for A, B in pairs], backend=backend)  # compiles whatever needs it
    began = time.perf_counter()
    report = refactor_(pairs, backend=backend)
    if not bool((report.status == REFACTORED).all()):
        return float("inf"), 0.0
    took = time.perf_counter() - began
    errors = []
    for (A, B), (old_A, old_B) in zip(pairs, before):
        S = refactoring(old_A, old_B).S
        wanted_A, wanted_B = old_A.mT @ S @ old_A, old_B @ torch.linalg.inv(S) @ old_B.mT
        A, B = A.double().cpu(), B.double().cpu()
        errors += [float((A.mT @ A - wanted_A).norm() / wanted_A.norm())]
        errors += [float((B @ B.mT - wanted_B).norm() / wanted_B.norm())]
    return max(errors), took


def examine(folder: Path, out: Path | None, png: Path | None) -> int:
    try:
        picture = doctor.picture_path(png) if png else None
        adapter = doctor.Adapter(folder)
        layers = adapter.layers()
        print(doctor.table(layers), end="\n\n")
        for line in doctor.summary(layers):
            print(line)
        if said := doctor.advice(layers):
            print(said)
        if out:
            for line in doctor.outcome(adapter.write_balanced(out), out):
                print(line)
        if picture:
            print(f"wrote {doctor.shown(doctor.draw(doctor.measured(layers), picture))}")
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"reflora doctor: {error}") from error
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(none)"


def _instruction_set() -> str:
    try:
        from . import _C
    except ImportError:
        return "no C++ core"
    return str(_C.instruction_set())


if __name__ == "__main__":
    raise SystemExit(main())
