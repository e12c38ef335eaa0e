"""Figures of the benchmarks, drawn for a column of a paper: matplotlib, bars from zero, a value on each."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from .harness import Measurement

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print
COLOURS = {
    "LoRA": "#8c8c8c",
    "RefLoRA": "#0072B2",
    "RefLoRA-S": "#56B4E9",
    "published RefLoRA": "#D55E00",
    "published RefLoRA-S": "#E69F00",
}
# metric, axis title, form of a value, least height of the axis (kilobytes must not look like much)
_PANELS = (
    ("throughput to LoRA", "throughput (LoRA = 1)", "{:.3f}", 0.0),
    ("optimizer step", "optimizer step (ms)", "{:#.3g}", 0.0),
    ("peak memory above LoRA", "memory above LoRA (MB)", "{:+.2f}", 1.0),
)


def overhead(path: Path, rows: Sequence[Measurement], env: Mapping[str, str]) -> bool:
    """Throughput, step time and memory side by side (as the paper's Figure 3b), quantiles 20 to 80 as whiskers.

    False, and nothing written, where matplotlib is not installed: a GPU machine may lack it, and the CSV has it all.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in _PANELS if any(row.metric == panel[0] for row in rows)]
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(2.35 * len(panels), 2.5), squeeze=False)
        for axis, (metric, title, form, least) in zip(axes[0], panels):
            _bars(axis, [row for row in rows if row.metric == metric], form)
            axis.set_ylabel(title)
            axis.set_ylim(top=max(axis.get_ylim()[1], least))
        figure.suptitle(_caption(rows, env), fontsize=6.5, color="#555555", y=0.99)
        figure.tight_layout(w_pad=2.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=300)
        pyplot.close(figure)
    return True


def _bars(axis, rows: Sequence[Measurement], form: str) -> None:  # type: ignore[no-untyped-def]
    labels = [row.method for row in rows]
    values = [row.summary.p50 for row in rows]
    spread = [[row.summary.p50 - row.summary.p20 for row in rows], [row.summary.p80 - row.summary.p50 for row in rows]]
    whiskers = spread if any(map(any, spread)) else None
    bars = axis.bar(
        range(len(rows)), values, width=0.68, color=[COLOURS[label] for label in labels], edgecolor="black",
        linewidth=0.5, yerr=whiskers, error_kw={"elinewidth": 0.7, "capsize": 2, "capthick": 0.7},
    )  # fmt: skip
    tops = [value + (spread[1][i] if whiskers else 0) for i, value in enumerate(values)]
    for bar, value, top in zip(bars, values, tops):
        middle = bar.get_x() + bar.get_width() / 2
        axis.annotate(form.format(value), (middle, top), (0, 2), textcoords="offset points", ha="center", va="bottom")
    axis.set_xticks(range(len(rows)), [label.replace("published ", "published\n") for label in labels])
    axis.tick_params(axis="x", labelrotation=35, length=0)
    for tick in axis.get_xticklabels():
        tick.set(ha="right", rotation_mode="anchor")
    axis.set_ylim(min(0.0, 1.3 * min(values)), 1.18 * max(*tops, 1e-9))


def _caption(rows: Sequence[Measurement], env: Mapping[str, str]) -> str:
    machine = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    return f"{rows[0].case} · {machine} · torch {env['torch']} · reflora {env['reflora']} ({env['commit']})"
