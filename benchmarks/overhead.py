"""The picture of the README: what a step costs over that of fused AdamW, a bar a method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import drawing
from .bars import colour
from .harness import Measurement

BASE = "LoRA"


def draw(path: Path, rows: Sequence[Measurement], env: Mapping[str, str]) -> bool:
    """A panel a case of cold caches, on a logarithmic axis that starts at 1: AdamW itself is no bar at all."""
    pyplot = drawing.pyplot()
    metric = "gpu to LoRA" if any(row.metric == "gpu to LoRA" for row in rows) else "wall to LoRA"
    rows = [row for row in rows if row.metric == metric and row.method != BASE and not row.case.endswith(" warm")]
    if pyplot is None or not rows:
        return False
    cases = list(dict.fromkeys(row.case for row in rows))
    labels = list(dict.fromkeys(row.method for row in sorted(rows, key=lambda row: row.summary.p50)))
    high = max(row.summary.p80 for row in rows)
    with pyplot.rc_context(drawing.STYLE):
        lines, columns = math.ceil(len(cases) / 3), min(len(cases), 3)
        size = (3.1 * columns + 1.3, (0.24 * len(labels) + 0.95) * lines)
        figure, axes = pyplot.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
        for axis in axes.flat[len(cases) :]:
            axis.set_visible(False)
        for axis, case in zip(axes.flat, cases):
            _panel(axis, {row.method: row for row in rows if row.case == case}, labels, high)
            axis.set_title(case.removesuffix(" cold"), fontsize=8, loc="left")
            axis.set_xlabel("optimizer.step() over fused AdamW's")
        axes[0][0].set_yticks(range(len(labels)), labels)
        axes[0][0].set_ylim(len(labels) - 0.4, -0.6)
        figure.tight_layout(rect=drawing.room(figure, env, 0), w_pad=1.5)
        drawing.save(pyplot, figure, path)
    return True


def _panel(axis: Any, rows: dict[str, Measurement], labels: Sequence[str], high: float) -> None:
    axis.set_xscale("log")
    axis.set_xlim(1.0, 1.6 * high)
    for place, label in enumerate(labels):
        if label not in rows:
            continue
        summary = rows[label].summary
        axis.barh(
            place, max(summary.p50, 1.0) - 1.0, left=1.0, height=0.72, zorder=2, linewidth=0.4, edgecolor="black",
            color=colour(label),
        )  # fmt: skip
        form = "{:.2f}x" if summary.p50 < 10 else "{:.0f}x"
        place_of_text = (max(summary.p50, 1.0), place)
        axis.annotate(
            form.format(summary.p50), place_of_text, (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    drawing.plain_ticks(axis.xaxis, 1.0, 1.6 * high)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", **drawing.GRID)
