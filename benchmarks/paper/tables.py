"""Tables with the paper's figures below one's own."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import harness, methods

Run = Mapping[str, Any]


def settings(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs that may stand in one table, by what they share, in words."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        length = f"{run['steps']} steps" if run.get("epochs") is None else "the paper's epochs"
        what = f"{run['model']}, r={run['rank']}, alpha={run['alpha']}, {length}, batch {run['batch']}"
        found.setdefault(what, []).append(run)
    return found


def cell(scores: Sequence[float], note: str = "") -> str:
    """Mean, standard deviation over the seeds, and a note."""
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.2f}{spread}{note}"


def lines(
    names: Iterable[str],
    columns: Sequence[str],
    own: Mapping[str, Sequence[str]],
    theirs: Mapping[str, Sequence[float | None]],
) -> str:
    """A line of cells for each method that has some, and below it the paper's, whose last figure is its average."""
    made = []
    for name in dict.fromkeys(names):
        if name in own:
            made.append([methods.LABELS[name], *own[name]])
            if name in theirs:
                paper = ["-" if value is None else f"{value:.2f}" for value in theirs[name]]
                made.append(["  the paper's", *paper])
    return harness.table(["method", *columns, "average"], made)
