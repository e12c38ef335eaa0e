"""The comparison as bars, a method a line: throughput, time of a step and memory (as the paper's Figure 3b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import drawing
from .harness import Measurement

OURS, REFERENCE, RIVAL = "#0072B2", "#8c8c8c", "#E8B878"  # told apart in grey print too
_REFERENCES = ("LoRA", "BitFit", "full fine-tuning")
_OURS = ("RefLoRA", "InvariantAdamW", "RiemannianAdamW")
# metric, title of the axis, form of a number
_TIMES = (
    ("throughput to LoRA", "iterations/s (LoRA = 1)", "{:.3f}"),
    ("optimizer step", "optimizer step (ms)", "{:.3g}"),
    ("peak above LoRA", "peak memory above LoRA (MB)", "{:+.2f}"),
)
_MEMORY = (
    ("peak above LoRA", "peak above LoRA (MB)", "{:+.2f}"),
    ("optimizer state", "state (MB)", "{:.2f}"),
    ("temporaries of a step", "temporaries of a step (MB)", "{:.2f}"),
)
Panel = tuple[str, str, str]


def throughput(path: Path, rows: Sequence[Measurement], env: Mapping[str, str]) -> bool:
    """False, and nothing written, where matplotlib is not installed; so for every figure."""
    return _draw(path, rows, env, _TIMES)


def memory(path: Path, rows: Sequence[Measurement], env: Mapping[str, str]) -> bool:
    """Peak, state and temporaries."""
    return _draw(path, rows, env, _MEMORY)


def _draw(path: Path, rows: Sequence[Measurement], env: Mapping[str, str], wanted: Sequence[Panel]) -> bool:
    pyplot = drawing.pyplot()
    panels = [panel for panel in wanted if any(row.metric == panel[0] for row in rows)]
    if pyplot is None or not panels:
        return False
    labels = list(dict.fromkeys(row.method for row in rows))
    with pyplot.rc_context(drawing.STYLE):
        size = (2.3 * len(panels) + 1.2, 0.19 * len(labels) + 0.85)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for axis, (metric, title, form) in zip(axes[0], panels):
            _panel(axis, {row.method: row for row in rows if row.metric == metric}, labels, form)
            axis.set_xlabel(title)
        axes[0][0].set_yticks(range(len(labels)), labels)
        axes[0][0].set_ylim(len(labels) - 0.4, -0.6)
        axes[0][0].set_title(rows[0].case, fontsize=7.5, loc="left")
        figure.tight_layout(rect=drawing.room(figure, env, 0), w_pad=1.2)
        drawing.save(pyplot, figure, path)
    return True


def _panel(axis: Any, rows: Mapping[str, Measurement], labels: Sequence[str], form: str) -> None:
    """One bar a method with quantiles 20 to 80 as whiskers; a logarithmic axis where one value dwarfs the median."""
    values = [row.summary.p50 for row in rows.values()]
    low, high = min(0.0, *values), max(0.0, *values)
    wide = max(-low, high) > 10 * max(sorted(map(abs, values))[len(values) // 2], 1e-9)
    for place, label in enumerate(labels):
        if label not in rows:
            axis.annotate("failed", (0, place), (3, 0), textcoords="offset points", va="center", fontsize=6)
            continue
        summary = rows[label].summary
        spread = [[summary.p50 - summary.p20], [summary.p80 - summary.p50]]
        axis.barh(
            place, summary.p50, height=0.72, color=colour(label), edgecolor="black", linewidth=0.4, zorder=2,
            xerr=spread if summary.p80 > summary.p20 else None, error_kw={"elinewidth": 0.6, "capsize": 1.5},
        )  # fmt: skip
        axis.annotate(
            form.format(summary.p50), (max(summary.p80, 0), place), (3, 0), textcoords="offset points",
            va="center", fontsize=6, zorder=4, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6},
        )  # fmt: skip
    if wide:
        axis.set_xscale("symlog", linthresh=1.0, linscale=0.5)
        axis.set_xlim(3 * low, 8 * high)
        decades = [10.0**power for power in range(5)]
        ticks = [-t for t in decades[::-1] if t <= -3 * low] + [0.0] + [t for t in decades if t <= 2 * high]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    else:
        axis.set_xlim(1.1 * low, max(1.25 * high, 1.0))
    axis.axvline(0, color="black", linewidth=0.6, zorder=3)
    if labels[0] in rows and rows[labels[0]].unit == "ratio":
        axis.axvline(1, color="black", linewidth=0.6, linestyle=":", zorder=2.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", **drawing.GRID)


def colour(label: str) -> str:
    if label in _REFERENCES:
        return REFERENCE
    return OURS if label.startswith(_OURS) else RIVAL
