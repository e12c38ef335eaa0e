"""Tables with the paper's figures below one's own."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import harness, methods

Run = Mapping[str, Any]


RESULTS = (
    "scores", "score", "finite", "loss", "losses", "seconds", "machine", "folder", "held_out", "stable_rank",
    "condition_B",
)  # fmt: skip
NAMES = ("task", "method", "seed", "lr", "plain_steps")


def name_of(run: Run) -> str:
    """The method, and how it starts where that is not its own way."""
    plain = run.get("plain_steps") if methods.starts(run["method"]) else None
    start = "" if plain is None else ", exact from B = 0" if plain == 0 else f", {plain} plain steps"
    return methods.LABELS[run["method"]] + start


def by_name(runs: Iterable[Run], names: Iterable[str]) -> tuple[list[Run], dict[str, str]]:
    """The runs with `name_of` for a method, and the method of each name, in the order of `names`."""
    found = list(runs)
    homes = {name_of(run): run["method"] for name in dict.fromkeys(names) for run in found if run["method"] == name}
    return [{**run, "method": name_of(run)} for run in found], homes


def settings(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs that may stand in one table, by what they share, in words; of runs that are the same the first.

    A task whose runs differ in what the words do not say (rows, length) has its others in a table of their own.
    """
    found: dict[str, list[Run]] = {}
    others: dict[tuple[str, str], list[str]] = {}
    seen: set[tuple[str, str]] = set()
    for run in runs:
        length = f"{run['steps']} steps" if run.get("epochs") is None else "the paper's epochs"
        what = f"{run['model']}, r={run['rank']}, alpha={run['alpha']}, {length}, batch {run['batch']}"
        setting = {name: value for name, value in run.items() if name not in (*RESULTS, *NAMES)}
        known = others.setdefault((what, run["task"]), [])
        rest = json.dumps(setting, sort_keys=True)
        if rest not in known:
            known.append(rest)
        number = known.index(rest)
        what += f", other rows or options ({number + 1})" if number else ""
        same = (what, json.dumps([run.get(name) for name in NAMES]))
        if same not in seen:
            seen.add(same)
            found.setdefault(what, []).append(run)
    return found


def cell(scores: Sequence[float], note: str = "") -> str:
    """Mean, standard deviation over the seeds, and a note."""
    if not all(map(math.isfinite, scores)):
        return f"diverged{note}"
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
            made.append([name, *own[name]])
            if name in theirs:
                paper = ["-" if value is None else f"{value:.2f}" for value in theirs[name]]
                made.append(["  the paper's", *paper])
    return harness.table(["method", *columns, "average"], made)
