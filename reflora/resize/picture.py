"""The spectra of an adapter, and how much of them a resize has kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import picture
from ..adapters import shown
from ..checks import fail
from .cut import Cut

# below the largest singular value or norm by this much, all is rounding
FLOOR = 1e-9


def draw(layers: Sequence[Cut], path: Path) -> Path:
    """Draw the singular values of every layer, and its rank and error. Returns the picture's path.

    Raises ImportError without matplotlib, ValueError where B A is 0 in all layers, and OSError.
    """
    path = picture.picture_path(path)
    seen = [one for one in layers if one.norm > 0]
    if not seen:
        fail(f"--png {shown(path)}", "a layer whose B A is not 0", "none", "There is nothing to draw.")
    pyplot = picture.pyplot()
    figure = pyplot.figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplot_mosaic([["spectra", "rank"], ["spectra", "error"]], width_ratios=[1, 1.2])
    spectra, rank, error = axes["spectra"], axes["rank"], axes["error"]
    colours = pyplot.get_cmap("viridis")([place / max(len(seen) - 1, 1) for place in range(len(seen))])
    for one, colour in zip(seen, colours):
        values = (one.s / one.s[0]).clamp(min=FLOOR).tolist()
        number = min(one.rank, len(values))
        spectra.semilogy(range(1, len(values) + 1), values, color=colour, lw=0.7, alpha=0.35)
        spectra.plot([number], [values[number - 1]], "o", color=colour, ms=3)
    longest = max(len(one.s) for one in seen)
    spectra.set(xlabel="singular value of BA", ylabel="over the largest", xlim=(0.5, longest + 0.5))
    spectra.set_title("dots: the last one kept; dark to light: first to last layer", fontsize=8)
    place = range(len(seen))
    rank.bar(place, [one.old_rank for one in seen], color="0.85", width=1.0, label="old")
    rank.bar(place, [one.rank for one in seen], color="tab:blue", width=1.0, alpha=0.8, label="new")
    rank.set(ylabel="rank", xlim=(-0.7, len(seen) - 0.3))
    rank.tick_params(labelbottom=False)
    rank.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    errors = [max(one.error, FLOOR) for one in seen]
    error.plot(place, errors, ".", color="tab:red", ms=4)
    if max(errors) > 30 * min(errors):
        error.set_yscale("log")
    else:
        error.set_ylim(0, 1.1 * max(errors))
    error.set(xlabel="layer", ylabel=r"$\|BA - B'A'\|\,/\,\|BA\|$", xlim=(-0.7, len(seen) - 0.3))
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    picture.save(figure, path)
    return path
