"""`python -m reflora`: what is installed, what serves, and whether it works. The rest is of saved adapters."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import doctor, extract, resize
from .adapters import Adapter, shown
from .backends import load
from .columns import REFACTORED
from .constants import BACKENDS
from .extract import Checkpoint
from .functional import refactor_
from .picture import picture_path
from .reference import refactoring

PACKAGES = ("reflora", "torch", "triton", "peft", "transformers", "accelerate")
# relative error of a float32 pair
TOLERANCE = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not fail
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m reflora", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    adapter = "a folder of PEFT or diffusers, or a .safetensors file of kohya, ComfyUI or diffusers"
    examined = commands.add_parser("doctor", help="condition, balance and effective rank of a saved adapter")
    examined.add_argument("adapter", type=Path, help=adapter)
    examined.add_argument(
        "--refactor", type=Path, metavar="OUT", help="write a balanced copy with the same merged weights"
    )
    examined.add_argument("--png", type=Path, metavar="FILE", help="draw the table")
    cut = commands.add_parser("resize", help="cut or raise the rank of a saved adapter, by the exact SVD of B A")
    cut.add_argument("adapter", type=Path, help=adapter)
    cut.add_argument("out", type=Path, help="what to write: a folder for a folder, a file for a file")
    cut.add_argument("--rank", type=int, metavar="N", help="of every layer; with --energy, the highest")
    cut.add_argument("--energy", type=float, metavar="SHARE", help="of ||B A||_F^2 that each layer keeps, such as 0.99")
    cut.add_argument("--png", type=Path, metavar="FILE", help="draw the singular values, ranks and errors")
    drawn = commands.add_parser("extract", help="the adapter nearest to what a fine-tuning has changed")
    drawn.add_argument("base", type=Path, help="a model's folder or safetensors file")
    drawn.add_argument("tuned", type=Path, help="the same after training")
    drawn.add_argument("out", type=Path, help="the adapter's folder, for PEFT")
    drawn.add_argument("--rank", type=int, metavar="N", help="of every layer; with --energy, the highest")
    drawn.add_argument("--energy", type=float, metavar="SHARE", help="of ||W' - W||_F^2 that each layer keeps")
    options = parser.parse_args(argv)
    try:
        if options.command == "doctor":
            examine(options.adapter, options.refactor, options.png)
        elif options.command == "resize":
            cut_ranks(options.adapter, options.out, options.rank, options.energy, options.png)
        elif options.command == "extract":
            draw_out(options.base, options.tuned, options.out, options.rank, options.energy)
        else:
            return show()
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"reflora {options.command}: {error}") from error
    return 0


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


def examine(path: Path, out: Path | None, png: Path | None) -> None:
    drawn = picture_path(png) if png else None
    adapter = Adapter(path)
    layers = doctor.layers_of(adapter)
    print(doctor.table(layers), end="\n\n")
    for line in doctor.summary(layers):
        print(line)
    if said := doctor.advice(layers):
        print(said)
    if out:
        for line in doctor.outcome(doctor.write_balanced(adapter, out), out):
            print(line)
    if drawn:
        print(f"wrote {shown(doctor.draw(doctor.measured(layers), drawn))}")


def cut_ranks(path: Path, out: Path, rank: int | None, energy: float | None, png: Path | None) -> None:
    choice, drawn = resize.Choice(rank, energy), picture_path(png) if png else None
    done = resize.resize(Adapter(path), out, choice)
    print(resize.table(done.layers), end="\n\n")
    for line in resize.outcome(done, out):
        print(line)
    if drawn:
        print(f"wrote {shown(resize.draw(done.layers, drawn))}")


def draw_out(base: Path, tuned: Path, out: Path, rank: int | None, energy: float | None) -> None:
    done = extract.extract(Checkpoint(base), Checkpoint(tuned), out, resize.Choice(rank, energy))
    print(extract.table(done.layers), end="\n\n")
    for line in extract.outcome(done, out):
        print(line)


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
