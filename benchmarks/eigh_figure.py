"""The figure of `eigh`: speed-up over torch against the size of a matrix, and errors beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from . import drawing
from .harness import Measurement
from .solvers import LABELS, Case

# the palette of `figures`; one thread more or less is no other answer
COLOURS = {
    "torch": "#8c8c8c",
    "reflora": "#0072B2",
    "reflora, graph": "#009E73",
    "reflora, warm": "#CC79A7",
    "CuPy": "#D55E00",
}
BATCHES = tuple(zip(("#E69F00", "#56B4E9", "#009E73", "#0072B2", "black"), "osD^v"))  # the larger, the darker
LINES = {"residual": "-", "orthogonality": "--"}
Found = Mapping[Case, Sequence[Measurement]]


def draw(path: Path, found: Found, env: Mapping[str, str]) -> bool:
    """A row of panels per type: speed-up of each method, a line per batch, quantiles 20 to 80 around it; last, errors.

    False, and nothing written, where matplotlib is not installed or nothing was compared.
    """
    pyplot = drawing.pyplot()
    kind = "gpu" if any(row.metric == "gpu" for rows in found.values() for row in rows) else "wall"
    lines: dict[tuple[str, str, int], list[tuple[int, Measurement]]] = {}
    for case, rows in found.items():
        for row in (row for row in rows if row.metric == f"{kind} speed-up over torch"):
            lines.setdefault((case.dtype, row.method, case.batch), []).append((case.n, row))
    methods = [label for label in LABELS.values() if any(label == own != "torch" for _, own, _ in lines)]
    if pyplot is None or not methods:
        return False
    dtypes = list(dict.fromkeys(case.dtype for case in found))
    marks = dict(zip(sorted({case.batch for case in found}), cycle(BATCHES)))
    with pyplot.rc_context(drawing.STYLE):
        size = (max(4.4, 1.5 * len(methods) + 2.3), 1.7 * len(dtypes) + 0.9)
        figure, axes = pyplot.subplots(
            len(dtypes), len(methods) + 1, figsize=size, squeeze=False, sharex=True, layout="constrained"
        )
        for dtype, (*panels, errors) in zip(dtypes, axes):
            for method, axis in zip(methods, panels):
                if axis is not panels[0]:
                    axis.sharey(panels[0])
                    axis.tick_params(labelleft=False)
                for batch, mark in marks.items():
                    _band(axis, lines.get((dtype, method, batch), []), f"batch {batch}", *mark)
                axis.axhline(1.0, color="black", linewidth=0.7, zorder=2)
            _errors(errors, {case: rows for case, rows in found.items() if case.dtype == dtype})
            panels[0].set_ylabel(f"{dtype}\nspeed-up over torch ({kind})", fontsize=7)
            errors.set_ylabel("largest error (n eps)", fontsize=7)
            for axis in (panels[0], errors):
                axis.set_yscale("log")
                drawing.plain_ticks(axis.yaxis, *axis.get_ylim())
        _sizes(axes, sorted({case.n for case in found}), [*methods, "errors"])
        left, right = {1: (2, 2), 2: (3, 2), 3: (3, 3)}.get(len(methods), (5, 4))
        height = max(
            _legend(figure, axes[0][0], "upper left", left), _legend(figure, axes[0][-1], "upper right", right)
        )
        _, bottom, _, top = drawing.room(figure, env, height)
        figure.get_layout_engine().set(rect=(0, bottom, 1, top - bottom), wspace=0.04, hspace=0.05)
        drawing.save(pyplot, figure, path)
    return True


def _band(axis: Any, points: Sequence[tuple[int, Measurement]], label: str, color: str, marker: str) -> None:
    x, summaries = [n for n, _ in points], [row.summary for _, row in points]
    style = {"color": color, "marker": marker, "markersize": 3.0, "linewidth": 1.0, "zorder": 3}
    axis.plot(x, [s.p50 for s in summaries], label=label, **style)
    axis.fill_between(x, [s.p20 for s in summaries], [s.p80 for s in summaries], color=color, alpha=0.2, lw=0)


def _errors(axis: Any, found: Found) -> None:
    """By method and size the largest over the batches."""
    for method, color in COLOURS.items():
        for metric, line in LINES.items():
            worst: dict[int, float] = {}
            for case, rows in found.items():
                for row in (row for row in rows if (row.method, row.metric) == (method, metric)):
                    worst[case.n] = max(worst.get(case.n, 0.0), row.summary.p50)
            label = {"label": method} if metric == "residual" and worst else {}
            axis.plot(list(worst), list(worst.values()), line, color=color, linewidth=1.0, zorder=3, **label)
    for metric, line in LINES.items():
        axis.plot([], [], line, color="black", linewidth=1.0, label=metric)


def _sizes(axes: Any, sizes: Sequence[int], titles: Sequence[str]) -> None:
    powers = [n for n in sizes if n & (n - 1) == 0]
    ticks = powers if len(powers) > 1 else sizes
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, ["" if len(ticks) > 5 and i % 2 else str(n) for i, n in enumerate(ticks)])
        axis.minorticks_off()
        axis.grid(axis="both", which="major", **drawing.GRID)
    for top, bottom, title in zip(axes[0], axes[-1], titles):
        top.set_title(title, fontsize=8)
        bottom.set_xlabel("size n")


def _legend(figure: Any, axis: Any, place: str, columns: int) -> int:
    """How many lines it takes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=7, handlelength=1.5)
    return -(-len(labels) // columns)
