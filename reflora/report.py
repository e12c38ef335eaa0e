"""What the commands print: aligned tables, and names that stay short."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import TypeVar

from .adapters import Copied, shown

T = TypeVar("T")


def progress(things: Iterable[T], number: int, unit: str) -> Iterable[T]:
    """The same, with a bar on a terminal's stderr where tqdm is installed."""
    if not sys.stderr.isatty():
        return things
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return things
    return tqdm(things, total=number, unit=f" {unit}", leave=False)


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table of columns; those of `left` begin at its left edge, the others end at their right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = (
        "  ".join(cell.ljust(w) if place in left else cell.rjust(w) for place, (cell, w) in enumerate(zip(row, widths)))
        for row in (heads, tuple("-" * w for w in widths), *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def cell(value: float, form: str) -> str:
    return "-" if isnan(value) else format(value, form)


def energy(error: float) -> str:
    """The share of the energy that a relative error of this size is, `error^2`."""
    return f"{100 * error**2:.2g} %" if error > 1e-6 else "0 %"


def some(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(shown(name, 50) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def listed(what: str, names: Mapping[str, Sequence[str]]) -> list[str]:
    """One line per reason, with the first of its layers."""
    return [f"{what} ({reason}): {some(few)}" for reason, few in names.items()]


def beside(copied: Copied) -> list[str]:
    """What lay beside the weights and was left out, or has factors of its own, one line each."""
    lines = []
    if copied.left_out:
        lines.append(f"not copied, from a training run or the old factors: {some(copied.left_out)}")
    if copied.adapters:
        lines.append(f"adapters of their own, copied as they are: {some(copied.adapters)}")
    return lines
