"""Time of a step on an H100, predicted from compiled code: `make predict`. Nothing in here is measured.

Every kernel of a step runs in tools/ptxsim, on one layer of each shape of a model. That counts for each program what
it issues, moves and waits for; ptxas says how many registers a thread has, and so how many programs share a
multiprocessor. At each moment a program goes on as fast as the slowest of these lets it: its chain of dependences; its
share of what the multiprocessor issues, adds in float64, multiplies on the tensor cores and passes through shared
memory; its share of the memory's bandwidth. Programs start in order, as places become free. fused AdamW is bound by
its bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import roofline, shapes

ROOT = Path(__file__).parents[1]
CASES = (("deberta-v3-base", 8), ("llama-7b", 16), ("llama-7b", 32), ("llama-7b", 64), ("llama-7b", 128))
METHODS = {"RefLoRA": {}, "RefLoRA-S": {"scalar": True}}
# seconds from the end of a kernel to the first load of the next one, in a CUDA graph; the same for AdamW's
LAUNCH = 1.5e-6


@dataclass(frozen=True)
class Chip:
    """clock: cycles/s. A multiprocessor's warp instructions a cycle: in all, float64, m8n8k4 products of float64 (512
    operations), passes of shared memory. registers and shared memory (bytes) of a multiprocessor. load: cycles.
    most_of_memory: bytes/s that one multiprocessor can read.
    """

    machine: roofline.Machine
    multiprocessors: int
    clock: float
    issue: float = 4.0
    float64: float = 2.0
    products: float = 0.5
    passes: float = 1.0
    registers: int = 65536
    shared: int = 232448
    warps: int = 64
    load: int = 600
    most_of_memory: float = 60e9


H100 = Chip(roofline.H100, 132, 1.7e9)


@dataclass
class Program:
    """What one program of a launch costs, in cycles of a multiprocessor that it has to itself, and bytes."""

    chain: float
    busy: float
    bytes: float


@dataclass
class Launch:
    """A kernel over a model: its programs in the order of their numbers, and how many share a multiprocessor."""

    name: str
    resident: int
    programs: list[Program] = field(default_factory=list)

    def seconds(self, chip: Chip = H100) -> float:
        """Until the last program ends, from the first one's start."""
        chains, busy, moved = (
            np.array([getattr(p, name) for p in self.programs]) for name in ("chain", "busy", "bytes")
        )
        waiting = list(range(len(self.programs)))[::-1]
        # by place: the program in it, -1 for none, and what is left of it
        places = min(self.resident, -(-len(self.programs) // chip.multiprocessors))
        inside = np.full((chip.multiprocessors, places), -1)
        left = np.zeros(inside.shape)
        now = 0.0
        while True:
            for place in np.argwhere(inside.T < 0)[:, ::-1]:
                if waiting:
                    inside[tuple(place)], left[tuple(place)] = waiting.pop(), 1.0
            active = inside >= 0
            if not active.any():
                return now / chip.clock
            sharing = active.sum(1, keepdims=True)
            memory = moved[inside] * active.sum() * chip.clock / chip.machine.copy
            alone = moved[inside] * chip.clock / chip.most_of_memory
            took = np.maximum.reduce([chains[inside], sharing * busy[inside], memory, sharing * alone])
            passed = (left * took)[active].min()
            now += passed
            left = np.where(active, left - passed / took, 0.0)
            inside[active & (left < 1e-9)] = -1


def places(chip: Chip, warps: int, registers: int, shared: int) -> int:
    """Programs to a multiprocessor: registers come in eights a thread, each program has 1 KiB of shared memory more."""
    by_registers = chip.registers // (-(-registers // 8) * 8 * 32 * warps)
    return max(1, min(by_registers, chip.shared // (shared + 1024), chip.warps // warps, 32))


def adamw_seconds(name: str, rank: int, chip: Chip = H100) -> float:
    """torch's fused AdamW: its bytes at the speed of a copy."""
    return roofline.ADAMW * shapes.size(shapes.layers(name), rank) / chip.machine.copy + LAUNCH


# ---- what the emulator counts


class Recorder:
    """The launches of a step of one layer, kernel by kernel."""

    def __init__(self, chip: Chip):
        self.chip = chip
        self.found: dict[str, Launch] = {}

    def __call__(self, name: str, module: Any, metadata: Any) -> None:
        from ptxsim import module as emulator

        places_of = {c: i for i, c in enumerate(emulator.classes())}
        stats = module.stats(True)
        moved, passed, products = Counter(), 0.0, Counter()
        for _line, kind, opcode, times, _lanes, got, least, _size, _loc, _text in stats:
            moved[kind] += 32 * least if kind == "global" else 0
            passed += got if kind == "shared" else 0
            products[kind] += times * (4 if "k16" in opcode else 1) if kind == "mma" else 0
        counts = module.block_counts()
        whole = [max(1, sum(block[places_of[kind]] for block in counts)) for kind in ("global", "shared", "mma")]
        programs = []
        for block, (chain, _) in zip(counts, module.times()):
            # what is known of the launch as a whole is shared out by how many such instructions a program has
            part = [block[places_of[kind]] / all_ for kind, all_ in zip(("global", "shared", "mma"), whole)]
            chip = self.chip
            busy = max(
                sum(block) / chip.issue, block[places_of["fp64"]] / chip.float64, part[1] * passed / chip.passes,
                part[2] * products["mma"] / chip.products,
            )  # fmt: skip
            programs.append(Program(chain, busy, part[0] * moved["global"]))
        limit = re.search(r"\.maxnreg (\d+)", module.ptx)
        registers = min(registers_of(module.ptx, self.chip), int(limit[1]) if limit else 255)
        self.found[name] = Launch(name, places(self.chip, metadata.num_warps, registers, metadata.shared), programs)


def registers_of(ptx: str, chip: Chip) -> int:
    """Registers a thread, by ptxas."""
    import subprocess
    import tempfile

    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return int(re.findall(r"Used (\d+) registers", done.stderr)[-1])


def count(name: str, rank: int, options: dict[str, Any], chip: Chip = H100) -> list[Launch]:
    """The launches of a step of a model, in order: one layer of each shape is run, and stands for all of that shape."""
    from ptxsim import driver

    import reflora

    driver.install(90, counters=1, race=0, timing=chip.load)
    layers = shapes.layers(name)
    by_shape: dict[tuple[int, int], dict[str, Launch]] = {}
    for shape in dict.fromkeys(layers):
        pairs = shapes.random_pairs([shape], rank)
        optimizer = reflora.RefLoRAAdamW(pairs, lr=1e-3, warmup_steps=0, backend="triton", **options)
        for _ in range(2):  # RefLoRA-S refactors before the first as well
            recorder = Recorder(chip)
            driver.CALLBACKS[:] = [recorder]
            for factor in pairs[0]:
                factor.grad = 1e-3 * torch.randn_like(factor)
            optimizer.step()
        by_shape[shape] = recorder.found
    driver.CALLBACKS.clear()
    whole: dict[str, Launch] = {}
    for shape in sorted(layers, key=lambda shape: -sum(shape)):  # as reflora.kernels.launch orders rows
        for kernel, launch in by_shape[shape].items():
            whole.setdefault(kernel, Launch(kernel, launch.resident)).programs += launch.programs
    return list(whole.values())


def markdown(cases: Sequence[tuple[str, int]] = CASES) -> str:
    """A row a case and method, times in microseconds; predicted."""
    head = [
        "case",
        "method",
        "first launch",
        "second launch",
        "programs a multiprocessor",
        "step",
        "fused AdamW",
        "ratio",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rank in cases:
        adamw = adamw_seconds(name, rank)
        for method, options in METHODS.items():
            launches = count(name, rank, options)
            step = sum(launch.seconds() + LAUNCH for launch in launches)
            cells = [f"{name} r={rank}", method, *(f"{1e6 * launch.seconds():.1f}" for launch in launches)]
            cells.append(", ".join(str(launch.resident) for launch in launches))
            cells += [f"{1e6 * step:.0f}", f"{1e6 * adamw:.0f}", f"{step / adamw:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="SHAPES:RANK", help=f"shapes: {', '.join(shapes.NAMES)}")
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(ROOT / "tools" / "ptxsim"))
    from ptxsim import reflora_hook

    reflora_hook.serve_reflora()
    cases = CASES
    if options.cases:
        cases = tuple((name, int(rank)) for name, rank in (text.split(":") for text in options.cases))
    print(f"Predicted for an {H100.machine.name}, times in us; nothing here is measured.\n\n{markdown(cases)}")


if __name__ == "__main__":
    main()
