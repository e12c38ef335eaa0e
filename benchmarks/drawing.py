"""What the figures share: a style for a page of a paper, axes with plain numbers, legends, the machine below."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
GRID = {"color": "#dddddd", "linewidth": 0.5, "zorder": 0}


def pyplot() -> Any:
    """matplotlib.pyplot without a screen; None where it is not installed: a GPU machine may lack it."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=300)
    pyplot.close(figure)


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10, ..., in a short range evenly spaced, in a long one tens."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    steps = [digit * 10.0**power for power in range(-3, 5) for digit in ((1, 2, 5) if high < 1e3 * low else (1,))]
    if sum(low <= value <= high for value in steps) < 3:
        steps = list(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high))
    axis.set_major_locator(FixedLocator([value for value in steps if low <= value <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def finish(figure: Any, axes: Sequence[Any], env: Mapping[str, str], count: int) -> None:
    """One legend of all `axes` above, the machine below."""
    handles, labels = (list(chain(*part)) for part in zip(*(axis.get_legend_handles_labels() for axis in axes)))
    columns = min(count, 3)
    figure.legend(handles, labels, loc="upper center", ncols=columns, frameon=False, handlelength=1.5)
    figure.tight_layout(rect=room(figure, env, -(-count // columns)))


def room(figure: Any, env: Mapping[str, str], lines: int) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of what is left under so many lines of a legend, the machine written below it."""
    width, height = figure.get_size_inches()
    name = machine(env)
    size = min(6.0, 72 * width / (0.57 * len(name)))  # a letter is about 0.57 of its size wide
    figure.text(0.5, 0.04 / height, name, fontsize=size, color="#555555", ha="center", va="bottom")
    return 0, 0.16 / height, 1, 1 - 0.17 * lines / height - 0.05 / height


def machine(env: Mapping[str, str]) -> str:
    name = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    return f"{name} · torch {env['torch']} · reflora {env['reflora']} ({env['commit']})"
