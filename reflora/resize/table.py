"""What a resize has done, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapters import shown
from ..report import aligned, beside, energy, listed
from .cut import Cut, Resized


def table(layers: Sequence[Cut], width: int = 60) -> str:
    """Aligned columns; long names lose their beginning."""
    heads = ("layer", "r", "new r", "|BA|", "error", "energy lost")
    rows = [
        (
            shown(one.name, width),
            str(one.old_rank),
            str(one.rank),
            f"{one.norm:.3g}",
            f"{one.error:.1e}",
            energy(one.error),
        )
        for one in layers
    ]
    return aligned(heads, rows)


def outcome(done: Resized, out: Path) -> list[str]:
    """Lines below the table: what was written and at which error, and what was kept."""
    ranks = sorted({one.rank for one in done.layers})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lines = [
        f"wrote {shown(out)}: {len(done.layers)} layers of {rank}, {_millions(done.old_numbers)} -> "
        f"{_millions(done.numbers)} numbers",
        f"in all: error {done.error:.2e} of ||s B A||_F, {energy(done.error)} of its energy lost",
    ]
    return lines + listed("copied as they are", done.kept) + beside(done.copied)


def _millions(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number >= 1e6 else str(number)
