"""What an extraction has found, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapters import shown
from ..report import aligned, energy, listed
from .difference import Extracted, Extraction


def table(layers: Sequence[Extracted], width: int = 60) -> str:
    """Aligned columns; long names lose their beginning."""
    heads = ("layer", "shape", "rank", "|dW|", "error", "energy lost")
    rows = [
        (shown(one.name, width), " x ".join(map(str, one.shape)), str(one.rank), f"{one.norm:.3g}", f"{one.error:.1e}")
        + (energy(one.error),)
        for one in layers
    ]
    return aligned(heads, rows)


def outcome(done: Extraction, out: Path) -> list[str]:
    """Lines below the table: what was written and at which error, and what is not in it."""
    return [
        f"wrote {shown(out)}: {len(done.layers)} layers; {done.unchanged} tensors have not changed",
        f"in all: error {done.error:.2e} of ||W' - W||_F, {energy(done.error)} of its energy lost",
        *listed("changed and not in the adapter", done.left_out),
    ]
