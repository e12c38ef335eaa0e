"""What the factors of a saved PEFT adapter are like, layer by layer, and a balanced copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path

from .adapter import Adapter, Layer, Written
from .folder import WEIGHTS
from .picture import draw, picture_path
from .rules import CONFIG, shown

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Layer", "Written", "advice", "draw", "measured", "outcome", "picture_path"]
__all__ += ["shown", "summary", "table"]

# a median stable rank up to this, over layers of at least this rank, is a collapse: tuned trainings have 1.5 to 10
COLLAPSED, COLLAPSED_OF = 1.1, 4


def table(layers: Sequence[Layer], width: int = 48) -> str:
    """Aligned columns; long names lose their beginning."""
    heads = ("layer", "r", "stable rank", "eff. rank", "cond. A", "cond. B", "balance", "|B|/|A|", "|BA|", "")
    rows = [
        (
            shown(one.name, width), str(one.rank or "-"), _cell(one.stable_rank, ".1f"),
            _cell(one.effective_rank, ".1f"), _cell(one.condition_A, ".1e"), _cell(one.condition_B, ".1e"),
            _cell(one.balance, ".1e"), _cell(one.scale, ".2g"), _cell(one.norm, ".2g"), one.status,
        ) for one in layers
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = [
        "  ".join(
            cell.ljust(w) if place in (0, 9) else cell.rjust(w) for place, (cell, w) in enumerate(zip(row, widths))
        )
        for row in (heads, tuple("-" * w for w in widths), *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: float, form: str) -> str:
    return "-" if isnan(value) else format(value, form)


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
    if written.left_out:
        lines.append(f"not copied, from a training run or the old factors: {_some(written.left_out)}")
    if written.adapters:
        lines.append(f"adapters of their own, copied as they are: {_some(written.adapters)}")
    return lines


def listed(what: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """One line per reason, with the first of its layers."""
    return [f"{what} ({reason}): {_some(some)}" for reason, some in names.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(shown(name, 50) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
