"""The roofline of a step: where each kernel stands, and what the parts of a step need at their best."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import drawing, roofline

MODEL = "llama-7b"
RANKS = (8, 16, 32, 64, 128)
# of roofline.kernels; blue, orange and grey differ in grey print too
PARTS = {
    "update": ("update (AdamW and the mixing of gradients)", "#8c8c8c", "o"),
    "gram": ("Grams, and the search of gradients", "#0072B2", "s"),
    "solve": ("r x r solve, its operations alone", "#E69F00", "^"),
}


def draw(path: Path, machine: roofline.Machine = roofline.H100, ranks: Sequence[int] = RANKS) -> bool:
    """False, and nothing written, where matplotlib is not installed."""
    pyplot = drawing.pyplot()
    if pyplot is None:
        return False
    with pyplot.rc_context(drawing.STYLE):
        figure, (roof, bars) = pyplot.subplots(1, 2, figsize=(6.8, 2.9))
        _roof(roof, machine, ranks)
        _bars(bars, machine, ranks)
        figure.legend(*bars.get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False, fontsize=7)
        text = f"arithmetic for an {machine.name}, float32 factors of {MODEL}, Grams and solve in float64"
        figure.text(0.5, 0.012, f"{text}; no kernel is measured", fontsize=6, color="#555555", ha="center")
        figure.tight_layout(rect=(0, 0.04, 1, 0.93), w_pad=2)
        drawing.save(pyplot, figure, path)
    return True


def _roof(axis: Any, machine: roofline.Machine, ranks: Sequence[int]) -> None:
    """Attainable TFLOP/s against FLOP a byte; every kernel sits on the roof."""
    low, high = 0.3, 60.0
    edge = machine.float64 / machine.copy
    axis.plot([low, edge, high], [low * machine.copy / 1e12, *2 * [machine.float64 / 1e12]], color="black", linewidth=1)
    for name, (_, color, marker) in PARTS.items():
        for rank in ranks:
            kernel = next(part for part in roofline.kernels(MODEL, rank) if part.name == name)
            operations = kernel.float64 + kernel.float32
            x, y = operations / kernel.bytes, operations / max(kernel.times(machine).values()) / 1e12
            axis.plot(x, y, color=color, marker=marker, markersize=4.5, linestyle="none", zorder=3)
            if name != "solve":
                beside = {"xytext": (-5, 3), "ha": "right"} if name == "update" else {"xytext": (5, -7)}
                axis.annotate(f"{rank}", (x, y), textcoords="offset points", fontsize=5.5, color=color, **beside)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(top=1.8 * machine.float64 / 1e12)
    grey = {"fontsize": 6, "color": "#555555"}
    axis.text(0.95 * high, 1.25 * machine.float64 / 1e12, f"{machine.float64 / 1e12:.0f} TFLOP/s", ha="right", **grey)
    axis.text(0.8, 0.62 * machine.copy / 1e12, f"{machine.copy / 1e12:.1f} TB/s", ha="left", va="top", **grey)
    drawing.plain_ticks(axis.xaxis, low, high)
    drawing.plain_ticks(axis.yaxis, *axis.get_ylim())
    axis.set_xlabel("operations a byte; numbers are ranks")
    axis.set_ylabel("attainable TFLOP/s")
    axis.grid(**drawing.GRID)


def _bars(axis: Any, machine: roofline.Machine, ranks: Sequence[int]) -> None:
    """What the parts need at their best, stacked, over AdamW's 28 bytes a parameter."""
    bottoms = [0.0] * len(ranks)
    for name, (label, color, _) in PARTS.items():
        heights = []
        for rank in ranks:
            parts = {part.name: part for part in roofline.kernels(MODEL, rank)}
            adamw = parts["update"].bytes / machine.copy
            heights.append(max(parts[name].times(machine).values()) / adamw)
        axis.bar(range(len(ranks)), heights, bottom=bottoms, color=color, label=label, width=0.65, zorder=2)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    for place, total in enumerate(bottoms):
        axis.annotate(f"{total:.2f}", (place, total), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axis.axhline(1, color="black", linewidth=0.6, linestyle=":", zorder=3)
    axis.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axis.set_xlabel("rank")
    axis.set_ylabel("least time, AdamW = 1")
    axis.set_ylim(0, 1.15 * max(bottoms))
    axis.grid(axis="y", **drawing.GRID)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline_figure", description=__doc__)
    parser.add_argument("png", type=Path)
    path = parser.parse_args(argv).png
    print(f"wrote {path}" if draw(path) else "no picture: pip install matplotlib")


if __name__ == "__main__":
    main()
