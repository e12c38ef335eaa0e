"""What a step must at least move and compute, from shapes alone: `python -m benchmarks.roofline`.

Nothing in here is measured. Float32 factors, gradients and moments; Grams and solve in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from . import shapes

CASES = (("deberta-v3-base", 8), ("llama-7b", 16), ("llama-7b", 32), ("llama-7b", 64), ("llama-7b", 128))
# bytes a parameter: p, g and two moments read, p and two moments written
ADAMW = 28
ONE_READ = 4
# RefLoRA-S makes its update twice, the first time to see what norms it gives: p, g and two moments are read once more
FORESEEN = 4 * ONE_READ
# p, g and one moment read, p and that moment written; in a pass of its own before it the Grams read p and g
INVARIANT = 5 * ONE_READ
# eliminations of the solve: the Cholesky factors of both Grams, with their inverses
ELIMINATIONS = 2
# products of the solve: N and N^-T, two for each of 9 Newton-Schulz steps (in practice 4 to 13), two each for S, S^-1
PRODUCTS = 24
# InvariantAdamW's: factors of both Grams, of H = C C^T and of both second moments; three polar factors, what each is
# made of and turned into, and for a side the way into its frame and out of it
WHITENING_ELIMINATIONS = 5
WHITENING_PRODUCTS = 3 * 18 + 5 + 2 * 5


@dataclass(frozen=True)
class Machine:
    """copy: bytes/s that a copy reaches; float64, float32: operations/s (float64 on the tensor cores)."""

    name: str
    copy: float
    float64: float
    float32: float


H100 = Machine("H100 SXM", 3.0e12, 67e12, 67e12)


def bytes_a_parameter(check: bool = True, carried: bool = False) -> int:
    """What the step moves: the search of g for inf and NaN reads g once more, a Gram that is not carried reads p."""
    return ADAMW + ONE_READ * check + ONE_READ * (not carried)


@dataclass(frozen=True)
class Kernel:
    """One part of a step: bytes in all, operations in float64 and float32 (an FMA is two)."""

    name: str
    bytes: float
    float64: float = 0.0
    float32: float = 0.0

    def times(self, machine: Machine) -> dict[str, float]:
        """Seconds that each resource needs at its best; the longest bounds the kernel."""
        return {
            "bytes": self.bytes / machine.copy,
            "float64": self.float64 / machine.float64,
            "float32": self.float32 / machine.float32,
        }

    def bound(self, machine: Machine) -> str:
        times = self.times(machine)
        return max(times, key=lambda name: times[name])


def kernels(name: str, rank: int, check: bool = True) -> list[Kernel]:
    """Grams (r FMA a parameter), solve (r^3 FMA an elimination or product), update (r FMA a parameter to mix g)."""
    layers = shapes.layers(name)
    parameters, pairs = shapes.size(layers, rank), len(layers)
    square = 8 * rank * rank * pairs
    return [
        Kernel("gram", parameters * ONE_READ * (1 + check), float64=2 * rank * parameters),
        # reads two Grams, writes S and its inverse
        Kernel("solve", 4 * square, float64=2 * rank**3 * (ELIMINATIONS + PRODUCTS) * pairs),
        Kernel("update", parameters * ADAMW, float32=2 * rank * parameters),
    ]


def invariant_kernels(name: str, rank: int, carried: bool = False) -> list[Kernel]:
    """As `kernels`, of InvariantAdamW. carried: the update sums both Grams, and mixes in float64."""
    layers = shapes.layers(name)
    parameters, pairs = shapes.size(layers, rank), len(layers)
    gram = 2 * rank * parameters
    # reads four Grams and two second moments, writes these and two matrices
    solve = Kernel(
        "solve", 8 * 8 * rank * rank * pairs, 2 * rank**3 * (WHITENING_ELIMINATIONS + WHITENING_PRODUCTS) * pairs
    )
    if carried:
        return [solve, Kernel("update", parameters * INVARIANT, float64=3 * gram)]
    update = Kernel("update", parameters * INVARIANT, float32=gram)
    return [Kernel("gram", parameters * 2 * ONE_READ, float64=2 * gram), solve, update]


def rounds(rank: int) -> int:
    """Pivots that the solve takes one after the other, in all layers at once; up to r = 64 both Grams' together."""
    return rank if rank <= 64 else rank * ELIMINATIONS


def markdown(
    machine: Machine = H100, cases: Sequence[tuple[str, int]] = CASES,
    parts: Callable[[str, int], Sequence[Kernel]] = kernels,
) -> str:  # fmt: skip
    """A row per kernel and case, times in microseconds."""
    head = ["case", "kernel", "MB", "GFLOP", "bytes us", "float64 us", "float32 us", "bound by"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rank in cases:
        for kernel in parts(name, rank):
            cells = [f"{name} r={rank}", kernel.name, _short(kernel.bytes / 1e6)]
            cells.append(_short((kernel.float64 + kernel.float32) / 1e9))
            cells += [_short(1e6 * seconds) if seconds else "" for seconds in kernel.times(machine).values()]
            lines.append("| " + " | ".join([*cells, kernel.bound(machine)]) + " |")
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.parse_args(argv)
    print(markdown())
    for check, carried in ((True, False), (False, False), (True, True), (False, True)):
        moved = bytes_a_parameter(check, carried)
        words = f"{'carried' if carried else 'fresh'} Grams, {'with' if check else 'without'} the search of g"
        print(f"{words}: {moved} B per parameter, {moved / ADAMW:.2f} of AdamW's")
    moved = FORESEEN + ADAMW
    print(f"RefLoRA-S: {moved} B per parameter, {moved / ADAMW:.2f} of AdamW's")
    for carried in (False, True):
        words = f"InvariantAdamW, {'carried' if carried else 'fresh'} Grams"
        moved = INVARIANT + 2 * ONE_READ * (not carried)
        print(f"\n{words}: {moved} B per parameter, {moved / ADAMW:.2f} of AdamW's")
        print(markdown(parts=partial(invariant_kernels, carried=carried)))


if __name__ == "__main__":
    main()
