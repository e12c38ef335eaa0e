"""The table of an adapter as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import picture
from ..adapters import shown
from ..checks import fail
from ..constants import KAPPA_MAX
from .layers import Layer


def draw(layers: Sequence[Layer], path: Path) -> Path:
    """Draw condition numbers, balance and effective rank over the layers. Returns the picture's path.

    Raises ImportError without matplotlib, ValueError without layers, and OSError.
    """
    path = picture.picture_path(path)
    if not layers:
        fail(f"--png {shown(path)}", "layers with finite factors", "none", "There is nothing to draw.")
    figure, (top, middle, bottom) = picture.pyplot().subplots(3, 1, sharex=True, figsize=(9, 6.5), layout="constrained")
    place = range(len(layers))
    top.semilogy(place, [one.condition_A for one in layers], ".", label="A", color="tab:blue")
    top.semilogy(place, [one.condition_B for one in layers], ".", label="B", color="tab:orange")
    top.axhline(KAPPA_MAX["float64"], color="grey", lw=0.8, ls="--", label="degenerate past this")
    top.set(ylabel="condition number")
    top.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    middle.semilogy(place, [one.balance for one in layers], ".", color="tab:green")
    low, high = middle.get_ylim()
    middle.set_ylim(min(low, 1e-2), max(high, 2.0))
    middle.set(ylabel=r"$\|AA^\top - B^\top B\|\,/\,\|AA^\top\|$")
    bottom.bar(place, [one.rank for one in layers], color="0.85", width=1.0, label="r")
    bottom.bar(place, [one.effective_rank for one in layers], color="tab:blue", width=0.7, label="effective rank of BA")
    bottom.set(xlabel="layer", ylabel="rank", xlim=(-0.7, len(layers) - 0.3))
    bottom.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    picture.save(figure, path)
    return path
