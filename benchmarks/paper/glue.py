"""Table 2: GLUE with every method tuned over the same learning rates: `python -m benchmarks.paper.glue --data FOLDER`.

One JSON line a run; a run whose line is in the file is not made again, so that a stopped series goes on where it was.
The table has for each method and task the mean over seeds at the learning rate with the best mean, its spread, and
below it the paper's figure. Scores are of the dev set after the last step; the learning rate is chosen on the same set,
as in the paper, which flatters all methods alike.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import data, finetuning, harness, unused
from . import arguments, glue_tasks, tables, tuning
from .glue_tasks import TASKS

METHODS = ("lora", "reflora", "reflora-s", "preclora", "lora-rite", "lora-pro", "dora")
LOSS_WINDOW = 20


def recipe(options: argparse.Namespace, name: str, rows: int, method: str, lr: float, seed: int) -> finetuning.Recipe:
    """Table 6's, with the options' size; the rate warms up over no more than a tenth of the steps."""
    task = TASKS[name]
    epochs = task.epochs * (rows // options.batch)
    steps = options.steps or epochs
    # Table 6's counts belong to its sizes of data
    lr_warmup = min(task.lr_warmup, steps // 10)
    length = min(task.length, options.length) if options.length else task.length
    return finetuning.Recipe(
        options.model, method, seed, lr, steps, options.batch, length, options.rank, options.alpha,
        task.weight_decay, lr_warmup, arguments.plain_steps(options, method), dropout=task.dropout, rows=rows,
        bfloat16=options.bfloat16,
    )  # fmt: skip


def load(options: argparse.Namespace, name: str) -> data.Task:
    """The task with at most the asked number of rows, drawn once and for all: some GLUE files are in an order.

    Raises OSError or ValueError for data that is not there or not enough.
    """
    task = TASKS[name].load(options.data)
    task = replace(
        task, train=data.drawn(task.train, options.train_rows), eval=data.drawn(task.eval, options.eval_rows)
    )
    if len(task.train) < options.batch:
        raise ValueError(f"--batch: expected at most the {len(task.train)} rows of {name}, got {options.batch}.")
    return task


def run(options: argparse.Namespace, tasks: Mapping[str, data.Task], key: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of the file holds besides its key."""
    name, device = key["task"], torch.device(options.device)
    made = finetuning.recipe_of(key)
    trained = finetuning.train(made, tasks[name], device, options.backend)
    logits = finetuning.outputs(trained, tasks[name].eval, made.length, device)
    finite = trained.finite and bool(logits.isfinite().all())
    labels = [float(example.label) for example in tasks[name].eval]
    scores = TASKS[name].scores(logits, labels) if finite else dict.fromkeys(TASKS[name].metrics, 0.0)
    loss = statistics.fmean(trained.losses[-LOSS_WINDOW:])
    return {
        "scores": {metric: round(value, 4) for metric, value in scores.items()},
        "score": round(TASKS[name].score(scores), 4),
        "finite": finite,
        "loss": loss if math.isfinite(loss) else None,
        "seconds": round(trained.seconds, 1),
    }


# ---- the table


def table(runs: Sequence[Mapping[str, Any]], names: Sequence[str], tasks: Sequence[str]) -> str:
    """Mean and standard deviation over seeds at the best learning rate, which is beside them; below it the paper's.

    "*": fewer learning rates or seeds than another method has there.
    """
    runs, homes = tables.by_name(runs, names)
    chosen, short = tuning.best(runs), tuning.unequal(runs)
    own, theirs = {}, {}
    for method, home in homes.items():
        found = {task: chosen[method, task] for task in tasks if (method, task) in chosen}
        means = [statistics.fmean(scores) for _, scores in found.values()]
        if found:
            cells = [
                tables.cell(found[task][1], f" ({found[task][0]:g})" + "*" * ((method, task) in short))
                if task in found
                else "-"
                for task in tasks
            ]
            own[method] = [*cells, f"{statistics.fmean(means):.2f}" if len(means) == len(tasks) else "-"]
        if home in glue_tasks.PAPER:
            paper = [glue_tasks.PAPER[home][task] for task in tasks]
            whole = set(tasks) == set(glue_tasks.COLUMNS)
            theirs[method] = [*paper, glue_tasks.AVERAGES[home] if whole else statistics.fmean(paper)]
    return tables.lines(homes, tasks, own, theirs)


# ---- the program


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = arguments.parser("glue", (__doc__ or "").split("\n")[0], METHODS)
    made.add_argument("--tasks", nargs="+", default=["cola", "sst2", "mrpc", "stsb", "rte"], choices=list(TASKS))
    arguments.add_grid(made, (3e-4, 1e-3, 3e-3, 1e-2))
    made.set_defaults(out=Path("benchmarks/results/paper/glue.jsonl"), data=glue_tasks.HUB)
    return arguments.parse_grid(made, argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    record = finetuning.Record(options.out, arguments.environment(options))
    asked = [
        run
        for run in record.runs()
        if run.get("task") in options.tasks and run["method"] in options.methods and "score" in run
    ]
    if not options.table:
        try:
            asked = series(options, record)
        except (OSError, ValueError, ImportError) as error:
            raise SystemExit(f"glue: {error}") from error
    for what, runs in tables.settings(asked).items():
        print(f"\n{what}: {len(runs)} runs, the last on {harness.header(runs[-1]['machine'])}")
        print(table(runs, *(list(dict.fromkeys(some)) for some in (options.methods, options.tasks))))


def series(options: argparse.Namespace, record: finetuning.Record) -> list[dict[str, Any]]:
    print(harness.header(record.env), flush=True)
    tasks = {name: load(options, name) for name in options.tasks}
    digests = {name: data.digest(task.train, task.eval) for name, task in tasks.items()}

    def key(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
        made = recipe(options, task, len(tasks[task].train), method, lr, seed)
        epochs = {} if options.steps else {"epochs": TASKS[task].epochs}
        return {**finetuning.key(task, made), **epochs, "eval_rows": len(tasks[task].eval), "data": digests[task]}

    names = options.tasks, options.methods, options.lrs, options.seeds
    return tuning.grid(record, key, names, lambda one: run(options, tasks, one), options.tune_first_seed)


if __name__ == "__main__":
    unused.leave_out()
    main()
