"""Figure 3a: training loss against steps, all methods on MRPC: `python -m benchmarks.paper.convergence --data FOLDER`.

The same runs as in `glue`, with every step's loss kept; --tuned takes each method's learning rate from a file of that
program. One JSON line a run, a stopped series goes on where it was. The figure has the mean over seeds of a running
mean of the loss, and the range of the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import data, drawing, figures, finetuning, harness, methods, unused
from . import arguments, glue, glue_tasks, tables, tuning
from .glue_tasks import TASKS

METHODS = ("lora", "reflora", "reflora-s", "lora-pro", "lora-rite", "dora")
WINDOW = 20  # steps of the running mean


def rates(options: argparse.Namespace) -> dict[str, float]:
    """The learning rate of each method: the best one in the file --tuned for this task and model, else --lr.

    Raises ValueError where the file has none for a method.
    """
    if options.tuned is None:
        return dict.fromkeys(options.methods, options.lr)
    if not options.tuned.is_file():
        raise ValueError(f"--tuned: no file {options.tuned}.")
    every = finetuning.Record(options.tuned, {}).runs()
    same = {name: getattr(options, name) for name in ("task", "model", "rank", "alpha", "batch")}
    if options.steps:
        same["steps"] = options.steps
    starts = [run for run in every if run.get("plain_steps") == arguments.plain_steps(options, run["method"])]
    runs = [run for run in starts if same.items() <= run.items() and "score" in run]
    chosen = {method: lr for (method, _), (lr, _) in tuning.best(runs).items()}
    absent = [method for method in options.methods if method not in chosen]
    if absent:
        what = ", ".join(f"{name} {value}" for name, value in same.items())
        raise ValueError(f"--tuned: expected runs of {what} for every method, got none for {', '.join(absent)}.")
    return chosen


def smoothed(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means over the last `window` values, fewer at the start."""
    return [statistics.fmean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]


def draw(path: Path, runs: Sequence[Mapping[str, Any]], env: Mapping[str, str]) -> bool:
    """PNG and SVG; False, and nothing written, where matplotlib is not installed."""
    pyplot = drawing.pyplot()
    if pyplot is None:
        return False
    with pyplot.rc_context(drawing.STYLE):
        figure, axis = pyplot.subplots(figsize=(4.2, 3.0))
        names = dict.fromkeys(map(tables.name_of, runs))
        for name in names:
            own = [run for run in runs if tables.name_of(run) == name]
            curves = torch.tensor([smoothed(run["losses"]) for run in own], dtype=torch.float64)
            colour = figures.COLOURS.get(methods.LABELS[own[0]["method"]], "#555555")
            steps = range(1, curves.shape[1] + 1)
            axis.plot(steps, curves.mean(0), color=colour, lw=1.2, label=f"{name} ({own[0]['lr']:g})")
            axis.fill_between(steps, curves.amin(0), curves.amax(0), color=colour, alpha=0.15, lw=0)
        axis.set(xlabel="step", ylabel=f"training loss (mean of {WINDOW} steps)")
        axis.set_title(
            f"{runs[0]['model']} on {runs[0]['task']}, r = {runs[0]['rank']}; learning rates in brackets",
            fontsize=7.5,
            loc="left",
        )
        axis.grid(**drawing.GRID)
        figure.legend(loc="upper center", frameon=False, fontsize=6.5, ncols=2)
        figure.tight_layout(rect=drawing.room(figure, env, -(-len(names) // 2)))
        for suffix in (".png", ".svg"):
            drawing.save(pyplot, figure, path.with_suffix(suffix))
    return True


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser("convergence", (__doc__ or "").split("\n")[0], METHODS)
    parser.add_argument("--task", default="mrpc", choices=list(TASKS))
    parser.add_argument("--lr", type=float, default=1e-3, help="of every method")
    parser.add_argument("--tuned", type=Path, help="a file of `glue`: each method's best learning rate on this task")
    parser.set_defaults(out=Path("benchmarks/results/paper/convergence.jsonl"), data=glue_tasks.HUB)
    options = parser.parse_args(argv)
    arguments.check(parser, options)
    arguments.check_rates(parser, "--lr", [options.lr])
    arguments.check_file(parser, options.out)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    record = finetuning.Record(options.out, arguments.environment(options))
    print(harness.header(record.env), flush=True)
    try:
        task = glue.load(options, options.task)
        chosen = rates(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"convergence: {error}") from error
    digest = data.digest(task.train)

    def key(seed: int, method: str) -> dict[str, Any]:
        recipe = glue.recipe(options, options.task, len(task.train), method, chosen[method], seed)
        return {**finetuning.key(options.task, recipe), "data": digest}

    keys = list(itertools.starmap(key, itertools.product(options.seeds, options.methods)))

    def make(key: Mapping[str, Any]) -> dict[str, Any]:
        run = finetuning.train(finetuning.recipe_of(key), task, torch.device(options.device), options.backend)
        return {"losses": [round(loss, 5) for loss in run.losses], "seconds": round(run.seconds, 1)}

    try:
        runs = finetuning.series(record, keys, make, "runs")
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"convergence: {error}") from error
    drawn = draw(options.out, runs, runs[0]["machine"])
    print(f"wrote {options.out}" + (" and its figure, PNG and SVG" if drawn else "; no figure without matplotlib"))


if __name__ == "__main__":
    unused.leave_out()
    main()
