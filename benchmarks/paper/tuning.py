"""Learning rates chosen fairly: every method over the same grid, with the same seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import finetuning

Run = Mapping[str, Any]
Key = dict[str, Any]


def best(runs: Sequence[Run]) -> dict[tuple[str, str], tuple[float, list[float]]]:
    """By (method, task): the learning rate with the best mean score, and the scores of all its seeds.

    Rates are compared on the seeds that all of them have, so that a series that was stopped halfway misleads nobody;
    where they have none in common, those with the most seeds. A run that diverged is -inf.
    """
    chosen = {}
    for key, by_rate in by_method(runs).items():
        common = set.intersection(*(set(scores) for scores in by_rate.values()))
        if not common:
            most = max(map(len, by_rate.values()))
            by_rate = {lr: scores for lr, scores in by_rate.items() if len(scores) == most}
        lr = max(by_rate, key=lambda lr: statistics.fmean(by_rate[lr][seed] for seed in common or by_rate[lr]))
        chosen[key] = lr, [by_rate[lr][seed] for seed in sorted(by_rate[lr])]
    return chosen


def by_method(runs: Sequence[Run]) -> dict[tuple[str, str], dict[float, dict[int, float]]]:
    """Scores by (method, task), learning rate and seed."""
    groups: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for one in runs:
        score = one["score"] if one.get("finite", True) else -math.inf
        groups.setdefault((one["method"], one["task"]), {}).setdefault(one["lr"], {})[one["seed"]] = score
    return groups


def unequal(runs: Sequence[Run]) -> set[tuple[str, str]]:
    """Every (method, task) that has fewer learning rates, or fewer seeds at its best, than another method has."""
    rates = {key: len(by_rate) for key, by_rate in by_method(runs).items()}
    seeds = {key: len(scores) for key, (_, scores) in best(runs).items()}
    short = set()
    for method, task in rates:
        for counts in (rates, seeds):
            if counts[method, task] < max(count for (_, other), count in counts.items() if other == task):
                short.add((method, task))
    return short


def grid(
    record: finetuning.Record,
    make_key: Callable[[str, str, float, int], Key],
    names: tuple[Sequence[str], Sequence[str], Sequence[float], Sequence[int]],
    make: Callable[[Run], Mapping[str, Any]],
    first_seed_only: bool,
) -> list[dict[str, Any]]:
    """The runs of a grid, those made that the record lacks.

    names: tasks, methods, learning rates and seeds; make_key: of one of each. first_seed_only: the first seed alone
    has all rates, the others the best one of each method and task.
    """
    tasks, methods, rates, seeds = (list(dict.fromkeys(some)) for some in names)
    tuned = seeds[:1] if first_seed_only else seeds
    whole = itertools.product(tuned, tasks, rates, methods)
    keys = [make_key(task, method, lr, seed) for seed, task, lr, method in whole]
    done = finetuning.series(record, keys, make, "runs")
    if first_seed_only:
        chosen = best(done)
        rest = itertools.product(seeds[1:], tasks, methods)
        more = [make_key(task, method, chosen[method, task][0], seed) for seed, task, method in rest]
        done += finetuning.series(record, more, make, "other seeds")
    return done
