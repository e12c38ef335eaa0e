"""What the factors of a saved adapter are like, layer by layer, and a balanced copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path

from ..adapters import shown
from ..report import aligned, beside, cell, listed
from .balanced import Written, write_balanced
from .layers import Layer, layers_of
from .picture import draw

__all__ = ["Layer", "Written", "advice", "draw", "layers_of", "measured", "outcome", "summary", "table"]
__all__ += ["write_balanced"]

# a median stable rank up to this, over layers of at least this rank, is a collapse: tuned trainings have 1.5 to 10
COLLAPSED, COLLAPSED_OF = 1.1, 4


def table(layers: Sequence[Layer], width: int = 48) -> str:
    """Aligned columns; long names lose their beginning."""
    heads = ("layer", "r", "stable rank", "eff. rank", "cond. A", "cond. B", "balance", "|B|/|A|", "|BA|", "")
    rows = [
        (
            shown(one.name, width), str(one.rank or "-"), cell(one.stable_rank, ".1f"),
            cell(one.effective_rank, ".1f"), cell(one.condition_A, ".1e"), cell(one.condition_B, ".1e"),
            cell(one.balance, ".1e"), cell(one.scale, ".2g"), cell(one.norm, ".2g"), one.status,
        ) for one in layers
    ]  # fmt: skip
    return aligned(heads, rows, left=(0, len(heads) - 1))


def measured(layers: Sequence[Layer]) -> list[Layer]:
    """The layers whose factors could be read and are finite."""
    return [one for one in layers if one.rank and not isnan(one.norm)]


def summary(layers: Sequence[Layer]) -> list[str]:
    """Lines below the table: how many layers, the worst ones, and which could not be read."""
    good = measured(layers)
    said = f"{len(layers)} layers"
    if good:
        worst = max(good, key=lambda one: max(one.condition_A, one.condition_B))
        said += f"; the worst conditioned is {shown(worst.name)}"
    unread: dict[str, list[str]] = {}
    for one in layers:
        if not one.rank:
            unread.setdefault(one.status, []).append(one.name)
    return [said, *listed("not read", unread)]


def outcome(written: Written, out: Path) -> list[str]:
    """What a balanced copy has kept and left out, one line each."""
    lines = [
        f"wrote {shown(out)}: {written.balanced} layers balanced, B A moved by at most {written.moved:.1e} of its norm",
        *listed("copied as they are", written.kept),
    ]
    return lines + beside(written.copied)


def advice(layers: Sequence[Layer]) -> str:
    """What the stable ranks say about the training; "" if nothing."""
    ranks = [one.stable_rank for one in layers if one.stable_rank > 0 and one.rank >= COLLAPSED_OF]
    median = sorted(ranks)[len(ranks) // 2] if ranks else float("inf")
    if median > COLLAPSED:
        return ""
    return (
        f"stable rank {median:.2f} in the median: nearly all of B A is one direction. The learning rate was low or the "
        "training short; with RefLoRA, warmup_steps=0 does this from B = 0 under Adam, and the default does not."
    )
