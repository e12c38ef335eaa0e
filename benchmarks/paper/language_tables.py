"""What runs of `language` show, as text: loss by learning rate, relative to LoRA's, and the best by rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import harness, methods
from . import tables

BROKEN = 1.5
Run = Mapping[str, Any]


def table(runs: Sequence[Run]) -> str:
    """A line per method and a column per learning rate: held-out loss, mean over seeds; (stable rank of B A; k(B)).

    "*": the best rate of a method; "!": it is at the end of those that were tried.
    """
    rates = sorted({run["lr"] for run in runs})
    lines = []
    for name in names_of(runs):
        own = [run for run in runs if tables.name_of(run) == name]
        means = {lr: mean(own, lr) for lr in rates if any(run["lr"] == lr for run in own)}
        best = min(means, key=means.__getitem__)
        mark = "!" if best in (min(means), max(means)) else "*"
        lines.append([name, *(_cell(own, lr, mark if lr == best else "") if lr in means else "-" for lr in rates)])
    return harness.table(["method", *(f"{lr:g}" for lr in rates)], lines)


def mean(runs: Sequence[Run], lr: float) -> float:
    """Held-out loss over the seeds of a rate; inf where one has diverged."""
    return statistics.fmean(run["held_out"] if run["finite"] else math.inf for run in runs if run["lr"] == lr)


def _cell(runs: Sequence[Run], lr: float, mark: str) -> str:
    loss = mean(runs, lr)
    if not math.isfinite(loss):
        return "diverged"
    some = [run for run in runs if run["lr"] == lr and "stable_rank" in run]
    if not some:
        return f"{loss:.4f}{mark}"
    rank, condition = (statistics.fmean(run[name] for run in some) for name in ("stable_rank", "condition_B"))
    return f"{loss:.4f}{mark} ({rank:.1f}; {condition:.0f})"


def above_lora(runs: Sequence[Run]) -> dict[str, dict[float, float]]:
    """By method and learning rate: held-out loss above LoRA's of the same rate and seed, in %, mean over the seeds.

    Seeds share their rows and their order, so that what a seed adds to both cancels. Rates at which LoRA has broken, at
    more than `BROKEN` times its best loss, compare nothing.
    """
    lora = [run for run in runs if run["method"] == "lora" and run["finite"]]
    means = {run["lr"]: mean(lora, run["lr"]) for run in lora}
    sound = [lr for lr, loss in means.items() if loss <= BROKEN * min(means.values())]
    base = {(run["lr"], run["seed"]): run["held_out"] for run in lora if run["lr"] in sound}
    others = [run for run in runs if run["finite"] and run["method"] != "lora" and (run["lr"], run["seed"]) in base]
    return by_rate((run, 100 * (run["held_out"] / base[run["lr"], run["seed"]] - 1)) for run in others)


def table_above_lora(runs: Sequence[Run]) -> str:
    """`above_lora` as a table; "" where there is nothing to compare."""
    found = above_lora(runs)
    rates = sorted({lr for of_method in found.values() for lr in of_method})
    lines = [
        [name, *(f"{found[name][lr]:+.2f}" if lr in found[name] else "-" for lr in rates)]
        for name in names_of(runs)
        if name in found
    ]
    return harness.table(["above LoRA, %", *(f"{lr:g}" for lr in rates)], lines) if lines else ""


def best(runs: Sequence[Run]) -> dict[str, tuple[float, float, bool]]:
    """By method: its best learning rate, the held-out loss there, and whether the rate is at the end of those tried.

    Of the first seed alone, which all methods share: another seed moves all of them together.
    """
    found = {}
    seed = min(run["seed"] for run in runs)
    for name in names_of(runs):
        own = [run for run in runs if tables.name_of(run) == name and run["seed"] == seed]
        if not own:
            continue
        means = {lr: mean(own, lr) for lr in sorted({run["lr"] for run in own})}
        rate = min(means, key=means.__getitem__)
        found[name] = rate, means[rate], rate in (min(means), max(means))
    return found


def ranks(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Runs by rank, of those in which LoRA takes part, in the setting of a rank that has most methods."""
    found: dict[int, list[Run]] = {}
    for some in tables.settings(runs).values():
        rank = some[0]["rank"]
        if any(run["method"] == "lora" for run in some) and of_methods(some) > of_methods(found.get(rank, [])):
            found[rank] = some
    return dict(sorted(found.items()))


def starts_of(runs: Sequence[Run]) -> set[int | None]:
    """The starts that RefLoRA was given: numbers of plain steps, None for its own."""
    return {run.get("plain_steps") for run in runs if methods.starts(run["method"])}


def of_methods(runs: Sequence[Run]) -> tuple[int, int]:
    """How many methods, and how many runs."""
    return len({run["method"] for run in runs}), len(runs)


def table_by_rank(runs: Sequence[Run]) -> str:
    """A line per method and a column per rank: held-out loss at its best rate, and that rate; "" for a single rank.

    "!": the rate is at the end of those that were tried.
    """
    own = {rank: best(some) for rank, some in ranks(runs).items()}
    if len(own) < 2:
        return ""
    lines = []
    for name in names_of([run for some in ranks(runs).values() for run in some]):
        cells = []
        for of_rank in own.values():
            rate, loss, edge = of_rank.get(name, (0.0, math.inf, False))
            cells.append(f"{loss:.4f} ({rate:g}{'!' if edge else ''})" if math.isfinite(loss) else "-")
        lines.append([name, *cells])
    return harness.table(["best held-out loss (rate)", *(f"r = {rank}" for rank in own)], lines)


def names_of(runs: Iterable[Run]) -> list[str]:
    """Of methods in their order, each with its own start first."""
    order = list(methods.LABELS)
    starts = {}
    for run in runs:
        plain = run.get("plain_steps")
        starts[tables.name_of(run)] = order.index(run["method"]), -1 if plain is None else plain
    return sorted(starts, key=starts.__getitem__)


def by_rate(values: Iterable[tuple[Run, float]]) -> dict[str, dict[float, float]]:
    """By method and learning rate, over the seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for run, value in values:
        found.setdefault(tables.name_of(run), {}).setdefault(run["lr"], []).append(value)
    return {name: {lr: statistics.fmean(some) for lr, some in sorted(rates.items())} for name, rates in found.items()}
