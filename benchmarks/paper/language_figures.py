"""Figures of `language`: loss and stable rank against the learning rate, and the field by rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import drawing, figures, methods
from . import tables
from .language_tables import Run, above_lora, best, by_rate, mean, names_of, ranks

STARTS = {"exact from B = 0": "#D55E00", "100 plain steps": "#E69F00"}  # colours
RANGE = -4, 7  # % above LoRA's
DETAIL = 64  # the rank whose losses are drawn against the learning rate


def draw(path: Path, runs: Sequence[Run], env: Mapping[str, str]) -> bool:
    """PNG: loss, what it is above LoRA's, and stable rank against the rate; a row of panels a setting.

    False without matplotlib.
    """
    pyplot = drawing.pyplot()
    if pyplot is None:
        return False
    settings = sorted(tables.settings(runs).values(), key=lambda some: (some[0]["model"], some[0]["rank"]))
    names = names_of(runs)
    with pyplot.rc_context(drawing.STYLE):
        size = (7.2, 1.9 * len(settings) + 0.6)
        figure, axes = pyplot.subplots(len(settings), 3, figsize=size, squeeze=False)
        for row, some in zip(axes, settings):
            title = f"{some[0]['model']}, r = {some[0]['rank']}"
            best = min((run["held_out"] for run in some if run["finite"]), default=1.0)
            losses, ranks = (
                by_rate((run, run[what]) for run in some if run["finite"] and what in run)
                for what in ("held_out", "stable_rank")
            )
            _panel(row[0], losses, names, f"held-out loss\n{title}", (best * 0.99, best * 1.2))
            _panel(row[1], above_lora(some), names, "above LoRA's, %", (-0.6, 1.2))
            _panel(row[2], ranks, names, "stable rank of B A")
        for axis in axes[-1]:
            axis.set_xlabel("learning rate, thousandths")
        drawing.finish(figure, [axes[0][0]], env, len(names))
        drawing.save(pyplot, figure, path)
    return True


def draw_ranks(path: Path, runs: Sequence[Run], env: Mapping[str, str]) -> bool:
    """PNG: every method's best loss relative to LoRA's by rank, and at one rank its loss off its own best rate.

    False without matplotlib, or for a single rank.
    """
    pyplot = drawing.pyplot()
    some = ranks(runs)
    if pyplot is None or len(some) < 2:
        return False
    found = {rank: best(own) for rank, own in some.items()}
    lora = methods.LABELS["lora"]
    everyone = names_of([run for own in some.values() for run in own])
    names = [name for name in everyone if sum(name in own for own in found.values()) >= len(found) - 1]
    with pyplot.rc_context(drawing.STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 3.9))
        for name in names:
            style = _style(name)
            points = {
                rank: 100 * (own[name][1] / own[lora][1] - 1)
                for rank, own in found.items()
                if name in own and math.isfinite(own[name][1])
            }
            axes[0].plot(list(points), list(points.values()), label=name, **style)
            detail = DETAIL if DETAIL in some else max(some)
            if name in found[detail]:
                rate = found[detail][name][0]
                own = [run for run in some[detail] if tables.name_of(run) == name]
                losses = {lr / rate: mean(own, lr) for lr in sorted({run["lr"] for run in own})}
                axes[1].plot(list(losses), list(losses.values()), **style)
        lowest = min(loss for _, loss, _ in found[detail].values())
        axes[0].set(xscale="log", xlabel="rank", ylabel="best held-out loss above LoRA's, %", ylim=RANGE)
        axes[0].set_xticks(list(some), [str(rank) for rank in some])
        axes[1].set(
            xscale="log", xlabel="learning rate over the method's best", xlim=(0.08, 4),
            ylabel=f"held-out loss, r = {detail}", ylim=(lowest * 0.99, lowest * 1.15),
        )  # fmt: skip
        drawing.plain_ticks(axes[1].xaxis, 0.08, 4)
        for axis in axes:
            axis.minorticks_off()
            axis.grid(**drawing.GRID)
        drawing.finish(figure, [axes[0]], env, len(names))
        drawing.save(pyplot, figure, path)
    return True


def _style(name: str) -> dict[str, Any]:
    method, _, start = name.partition(", ")
    known = name if name in figures.COLOURS else method
    colour = figures.COLOURS.get(name) or STARTS.get(start) or figures.COLOURS.get(method, "#555555")
    return {"color": colour, "marker": figures.MARKERS.get(known, "o"), "ms": 4, "lw": 1.1}


def _panel(
    axis: Any, curves: Mapping[str, Mapping[float, float]], names: Sequence[str], title: str,
    limits: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """The curves that there are, with an entry in the legend for each of the names."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for number, name in enumerate(names):
        curve = curves.get(name, {})
        method, _, start = name.partition(", ")
        colour = STARTS.get(start) or figures.COLOURS.get(method, "#555555")
        dashes = "--" if method == methods.LABELS["reflora-s"] else "-"
        marker = "os^Dv<>P"[number % 8]
        axis.plot(list(curve), list(curve.values()), dashes, color=colour, marker=marker, ms=3, lw=1.1, label=name)
    rates = sorted({lr for curve in curves.values() for lr in curve})
    axis.set(xscale="log", ylabel=title)
    if limits:
        axis.set_ylim(*limits)
    axis.xaxis.set_major_locator(FixedLocator(rates))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{1000 * rate:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(**drawing.GRID)
