"""The table of an adapter as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..checks import fail
from ..constants import KAPPA_MAX
from .adapter import Layer
from .folder import below_a_file
from .rules import shown


def picture_path(path: Path) -> Path:
    """`path`, with .png if it has no suffix; raises ValueError where no picture can be written."""
    what, remedy = f"--png {shown(path)}", "Pass another FILE, such as adapter.png."
    if path.suffix.lower() not in ("", ".png"):
        fail(what, "a name that ends in .png", shown(path.suffix), remedy)
    named = path if path.suffix or not path.name else path.with_name(f"{path.name}.png")
    for place in (path, named):
        if os.path.exists(place) and not os.path.isfile(place):
            got = "a folder that is there" if os.path.isdir(place) else "a pipe or device that is there"
            fail(what, "a file to write", got, remedy)
    if below_a_file(named):
        fail(what, "a file to write", "a file on the way to it", remedy)
    return named


def draw(layers: Sequence[Layer], path: Path) -> Path:
    """Draw condition numbers, balance and effective rank over the layers. Returns the picture's path.

    Raises ImportError without matplotlib, ValueError without layers, and OSError.
    """
    path = picture_path(path)
    if not layers:
        fail(f"--png {shown(path)}", "layers with finite factors", "none", "There is nothing to draw.")
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a picture needs matplotlib: pip install matplotlib") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 6.5), layout="constrained")
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"--png {shown(path)}", "a file to write", error.strerror or error, "Pass another FILE.", OSError)
    finally:
        pyplot.close(figure)
    return path
