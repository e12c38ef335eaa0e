"""Figures of the benchmarks, drawn for a page of a paper: matplotlib, colours that hold in grey print, 300 dpi."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import drawing
from .harness import Measurement

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print
COLOURS = {
    "LoRA": "#8c8c8c",
    "RefLoRA": "#0072B2",
    "RefLoRA, carried Grams": "#009E73",
    "RefLoRA-S": "#56B4E9",
    "published RefLoRA": "#D55E00",
    "published RefLoRA-S": "#E69F00",
    "PEFT Riemannian": "#CC79A7",
    "LoRA-Pro": "#B59F00",
    "LoRA-RITE": "#7A4FA3",
    "PrecLoRA": "#882255",
    "NoRA+": "#999933",
    "BaLoRA": "#44AA99",
    "LoRA-Muon": "#000000",
    "RefLoRA, unit determinant": "#004466",
    "BaLoRA, our kernels": "#117733",
    "LoRA-Muon, our kernels": "#661100",
    "LoRA-Pro, full": "#DDCC77",
    "LoRA+": "#AA4499",
    "DoRA": "#CC6677",
    "InvariantAdamW": "#F0027F",
    "InvariantAdamW, scaled": "#386CB0",
    "InvariantAdamW, scaled, momentum": "#BF5B17",
    "InvariantAdamW, identity": "#7FC97F",
    "InvariantAdamW, carried Grams": "#B15928",
    "RiemannianAdamW": "#6A3D9A",
}
MARKERS = dict(zip(COLOURS, "|osD^v<>P*Xph1248dHsx+3oD"))

# ---- steps: a row of dots a case


def step(path: Path, rows: Sequence[Measurement], env: Mapping[str, str]) -> bool:
    """Ratio to fused AdamW on a logarithmic axis, and the share of the copy bandwidth that was reached."""
    pyplot = drawing.pyplot()
    kind = _kind(rows)
    titles = {f"{kind} to LoRA": f"step time, fused AdamW = 1 ({kind})", "of copy bandwidth": "share of copy bandwidth"}
    panels = [(metric, title) for metric, title in titles.items() if any(row.metric == metric for row in rows)]
    if pyplot is None or not panels:
        return False
    with pyplot.rc_context(drawing.STYLE):
        cases = list(dict.fromkeys(row.case for row in rows))
        methods = [label for label in COLOURS if any(row.method == label for row in rows)]
        size = (3.6 * len(panels) + 0.6, 0.24 * len(methods) * len(cases) * 0.5 + 1.1)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for axis, (metric, title) in zip(axes[0], panels):
            _dots(axis, [row for row in rows if row.metric == metric], cases, methods)
            axis.set_xlabel(title)
        ratio, *share = axes[0]
        ratio.set_xscale("log")
        low, high = ratio.get_xlim()
        ratio.set_xlim(low, high * (high / low) ** 0.12)  # room for the last number
        drawing.plain_ticks(ratio.xaxis, *ratio.get_xlim())
        for axis in share:
            axis.set_xlim(0, max(1.0, axis.get_xlim()[1]))
        drawing.finish(figure, [ratio], env, len(methods))
        drawing.save(pyplot, figure, path)
    return True


def _dots(axis: Any, rows: Sequence[Measurement], cases: Sequence[str], methods: Sequence[str]) -> None:
    pitch = 0.8 / max(len(methods), 2)
    for index, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        y = [cases.index(row.case) + pitch * (index - (len(methods) - 1) / 2) for row in own]
        x = [row.summary.p50 for row in own]
        error = [[row.summary.p50 - row.summary.p20 for row in own], [row.summary.p80 - row.summary.p50 for row in own]]
        axis.errorbar(x, y, xerr=error, label=method, **_mark(method), linestyle="none", elinewidth=0.8, zorder=3)
        for row, height in zip(own, y):
            place = {"xytext": (4, 0), "textcoords": "offset points", "ha": "left", "va": "center_baseline"}
            axis.annotate(_number(row.summary.p50), (row.summary.p80, height), **place, fontsize=5.5, color="#333333")
    for line in range(1, len(cases)):
        axis.axhline(line - 0.5, color="#bbbbbb", linewidth=0.5)
    axis.set_yticks(range(len(cases)), [case.replace(" (", "\n(", 1) for case in cases])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.grid(axis="x", which="major", **drawing.GRID)


# ---- scaling: lines


def scaling(
    path: Path, panels: Mapping[str, Sequence[tuple[int, Sequence[Measurement]]]], base: Any, env: Mapping[str, str]
) -> bool:
    """Ratio to fused AdamW against each size; base: what has the others as attributes.

    Methods far above the rest get a row of their own, so that the rest can be told apart.
    """
    pyplot = drawing.pyplot()
    kind = _kind([row for panel in panels.values() for _, rows in panel for row in rows])
    lines: dict[tuple[str, str], list[tuple[int, Measurement]]] = {}
    for name, panel in panels.items():
        for x, rows in panel:
            for row in (row for row in rows if row.metric == f"{kind} to LoRA"):
                lines.setdefault((row.method, name), []).append((x, row))
    groups = _levels({key: [row.summary.p50 for _, row in points] for key, points in lines.items()})
    if pyplot is None or not groups:
        return False
    with pyplot.rc_context(drawing.STYLE):
        figure, axes = pyplot.subplots(
            len(groups), len(panels), figsize=(2.4 * len(panels), 2.5 if len(groups) == 1 else 3.4), squeeze=False,
            sharex="col", sharey="row", height_ratios=[1, 2][-len(groups) :],
        )  # fmt: skip
        for row_of_axes, methods in zip(axes, groups):
            for axis, (name, panel) in zip(row_of_axes, panels.items()):
                for method in methods:
                    _line(axis, method, lines.get((method, name), []))
                axis.set_xscale("log", base=2)
                axis.set_xticks([x for x, _ in panel], [str(x) for x, _ in panel])
                axis.minorticks_off()
                axis.grid(axis="both", which="major", **drawing.GRID)
            row_of_axes[0].set_yscale("log")
            low, high = row_of_axes[0].get_ylim()
            row_of_axes[0].set_ylim(low, max(high, 1.5 * low))
            drawing.plain_ticks(row_of_axes[0].yaxis, *row_of_axes[0].get_ylim())
        for top, bottom, name in zip(axes[0], axes[-1], panels):
            bottom.set_xlabel(name)
            others = (f"{key} {getattr(base, key)}" for key in panels if key != name)
            top.set_title(", ".join(others), fontsize=7, color="#555555")
        axes[-1][0].set_ylabel(f"step time over\nfused AdamW's ({kind})")
        drawing.finish(
            figure, [axis for row_of_axes in axes[::-1] for axis in row_of_axes[:1]], env, sum(map(len, groups))
        )
        drawing.save(pyplot, figure, path)
    return True


def _levels(values: Mapping[tuple[str, str], Sequence[float]]) -> list[list[str]]:
    """Methods in one row of panels, or in two, the higher first, where at least twofold lies between all of them."""
    methods = [label for label in COLOURS if any(label == method for method, _ in values)]
    low, high = (
        {m: pick(v for (n, _), own in values.items() if n == m for v in own) for m in methods} for pick in (min, max)
    )
    for split in sorted(low.values()):
        below, above = [m for m in methods if low[m] < split], [m for m in methods if low[m] >= split]
        if below and split > 2 * max(high[m] for m in below):
            return [above, below]
    return [methods] if methods else []


def _line(axis: Any, method: str, points: Sequence[tuple[int, Measurement]]) -> None:
    x = [value for value, _ in points]
    summaries = [row.summary for _, row in points]
    if method == "LoRA":
        axis.axhline(1.0, color=COLOURS[method], linewidth=1.0, label=method, zorder=2)
        return
    axis.plot(x, [s.p50 for s in summaries], label=method, linewidth=1.0, zorder=3, **_mark(method))
    axis.fill_between(x, [s.p20 for s in summaries], [s.p80 for s in summaries], color=COLOURS[method], alpha=0.2, lw=0)


# ---- what they share


def _mark(method: str) -> dict[str, Any]:
    return {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 3.5}


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _kind(rows: Sequence[Measurement]) -> str:
    """Time on the device where it was measured, else wall time."""
    return "gpu" if any(row.metric == "gpu to LoRA" for row in rows) else "wall"
