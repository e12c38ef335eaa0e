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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import harness, roofline, shapes

ROOT = Path(__file__).parents[1]
# by name, the class and its options
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "RefLoRA": ("RefLoRAAdamW", {"warmup_steps": 0}),
    "RefLoRA, no search": ("RefLoRAAdamW", {"warmup_steps": 0, "check_grads": False}),
    "RefLoRA, carried Grams": ("RefLoRAAdamW", {"warmup_steps": 0, "carry_grams": True}),
    "RefLoRA-S": ("RefLoRAAdamW", {"warmup_steps": 0, "scalar": True}),
    "InvariantAdamW": ("InvariantAdamW", {}),
    "InvariantAdamW, carried Grams": ("InvariantAdamW", {"carry_grams": True}),
    "InvariantAdamW, scaled": ("InvariantAdamW", {"metric": "scaled"}),
    "InvariantAdamW, identity": ("InvariantAdamW", {"metric": "identity"}),
}
# seconds from the end of a kernel to the first load of the next one, in a CUDA graph; the same for AdamW's
LAUNCH = 1.5e-6


@dataclass(frozen=True)
class Chip:
    """clock: cycles/s. most_of_memory: bytes/s that one multiprocessor can read.

    load: cycles of a read from memory; near: of one from where the program has been before, at the worst in L2.

    A multiprocessor's warp instructions a cycle: in all, float64, m8n8k4 products of float64, and passes of shared
    memory. Its registers, bytes of shared memory and warps.
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
    near: int = 270
    most_of_memory: float = 60e9

    def places(self, warps: int, registers: int, shared: int) -> int:
        """Programs to a multiprocessor. Registers come in eights, and each program has 1 KiB of shared memory more."""
        by_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        return max(1, min(by_registers, self.shared // (shared + 1024), self.warps // warps, 32))


H100 = Chip(roofline.H100, 132, 1.7e9)


@dataclass
class Program:
    """What one program of a launch costs: cycles of its chain, cycles of a multiprocessor's busiest unit, bytes."""

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
        chains, busy = (np.array([getattr(p, name) for p in self.programs]) for name in ("chain", "busy"))
        cycles = np.array([p.bytes for p in self.programs]) * chip.clock  # over bytes/s
        waiting = list(range(len(self.programs)))[::-1]
        # by place: the program in it, -1 for none, and what is left of it
        places = min(self.resident, -(-len(self.programs) // chip.multiprocessors))
        inside, left = np.full((chip.multiprocessors, places), -1), np.zeros((chip.multiprocessors, places))
        now = 0.0
        while True:
            for place in np.argwhere(inside.T < 0)[:, ::-1]:
                if waiting:
                    inside[tuple(place)], left[tuple(place)] = waiting.pop(), 1.0
            active = inside >= 0
            if not active.any():
                return now / chip.clock
            sharing = active.sum(1, keepdims=True)
            memory = np.maximum(active.sum() / chip.machine.copy, sharing / chip.most_of_memory) * cycles[inside]
            took = np.maximum.reduce([chains[inside], sharing * busy[inside], memory])
            passed = (left * took)[active].min()
            now += passed
            left = np.where(active, left - passed / took, 0.0)
            inside[active & (left < 1e-9)] = -1


def adamw_seconds(name: str, rank: int, chip: Chip = H100) -> float:
    """torch's fused AdamW: its bytes at the speed of a copy."""
    return roofline.ADAMW * shapes.size(shapes.layers(name), rank) / chip.machine.copy + LAUNCH


# ---- what the emulator counts


class Recorder:
    """The launches of a step of one layer, by kernel; a callback of tools/ptxsim."""

    def __init__(self, chip: Chip):
        self.chip = chip
        self.found: dict[str, Launch] = {}

    def __call__(self, name: str, module: Any, metadata: Any) -> None:
        from ptxsim.module import classes

        place = {kind: i for i, kind in enumerate(classes())}
        counts = np.array(module.block_counts(), dtype=float)
        # of the launch as a whole: a program has its share by its number of such instructions
        whole = {"global": 0.0, "shared": 0.0, "mma": 0.0}
        for _line, kind, opcode, times, _lanes, got, least, *_ in module.stats(True):
            if kind in whole:
                whole[kind] += {"global": 32 * least, "shared": got, "mma": times * (4 if "k16" in opcode else 1)}[kind]
        own = {kind: counts[:, place[kind]] / max(1, counts[:, place[kind]].sum()) * whole[kind] for kind in whole}
        busy = np.maximum.reduce([
            counts.sum(1) / self.chip.issue, counts[:, place["fp64"]] / self.chip.float64,
            own["mma"] / self.chip.products, own["shared"] / self.chip.passes,
        ])  # fmt: skip
        chains = [chain for chain, _ in module.times()]
        resident = self.chip.places(metadata.num_warps, registers_of(module.ptx), metadata.shared)
        programs = [Program(*costs) for costs in zip(chains, busy.tolist(), own["global"].tolist())]
        self.found[name] = Launch(name, resident, programs)


def registers_of(ptx: str) -> int:
    """Registers of a thread, by ptxas."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return int(re.findall(r"Used (\d+) registers", done.stderr)[-1])


def launches(name: str, rank: int, method: str, chip: Chip = H100) -> list[Launch]:
    """Of a step of a model, in order: one layer of each shape is run, and stands for all of that shape."""
    from ptxsim import driver

    import reflora

    driver.install(90, counters=1, race=0, timing=chip.load, near=chip.near)
    layers = shapes.layers(name)
    cls, own = METHODS[method]
    by_shape: dict[tuple[int, int], dict[str, Launch]] = {}
    for shape in dict.fromkeys(layers):
        pairs = shapes.random_pairs([shape], rank)
        optimizer = getattr(reflora, cls)(pairs, lr=1e-3, backend="triton", **own)
        for _ in range(3):  # RefLoRA-S refactors before the first as well; Grams of the second are the first carried
            recorder = Recorder(chip)
            driver.CALLBACKS[:] = [recorder]
            for factor in pairs[0]:
                factor.grad = 1e-3 * torch.randn_like(factor)
            optimizer.step()
        by_shape[shape] = recorder.found
    driver.CALLBACKS.clear()
    whole: dict[str, Launch] = {}
    for shape in sorted(layers, key=lambda shape: -sum(shape)):  # as reflora.kernels.step.launch orders rows
        for kernel, launch in by_shape[shape].items():
            whole.setdefault(kernel, Launch(kernel, launch.resident)).programs += launch.programs
    return list(whole.values())


# ---- the program


def row(name: str, rank: int, method: str) -> list[str]:
    """Times in microseconds."""
    found, adamw = launches(name, rank, method), adamw_seconds(name, rank)
    times = [launch.seconds() for launch in found]
    step = sum(times) + LAUNCH * len(times)
    cells = [f"{name} r={rank}", method, " + ".join(f"{1e6 * seconds:.1f}" for seconds in times)]
    cells.append(", ".join(str(launch.resident) for launch in found))
    return [*cells, f"{1e6 * step:.0f}", f"{1e6 * adamw:.0f}", f"{step / adamw:.2f}"]


HEAD = ["case", "method", "launches", "programs together", "step", "fused AdamW", "ratio"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="SHAPES:RANK", help=f"shapes: {', '.join(shapes.NAMES)}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--out", type=Path, help="folder for prediction_h100.md")
    options = parser.parse_args(argv)
    cases = [(name, int(rank)) for name, rank in (text.split(":") for text in options.cases or ())]
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(ROOT / "tools" / "ptxsim"))
    from ptxsim import reflora_hook

    reflora_hook.serve_reflora()
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    print("\n".join(lines), flush=True)
    for name, rank in cases or roofline.CASES:
        for method in options.methods:
            lines.append(f"| {' | '.join(row(name, rank, method))} |")
            print(lines[-1], flush=True)
    if options.out:
        env = harness.environment(torch.device("cpu"), torch.float32)
        head = f"Predicted for an {H100.machine.name}, times in us; nothing here is measured on a GPU.\n"
        head += f"Triton {env['triton']}, reflora {env['reflora']}, commit {env['commit']}.\n\n"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "prediction_h100.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
