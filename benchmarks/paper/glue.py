"""Table 2: GLUE with every method tuned over the same learning rates: `python -m benchmarks.paper.glue --data FOLDER`.

One JSON line a run; a run whose line is in the file is not made again, so that a stopped series goes on where it was.
The table has for each method and task the mean over seeds at the learning rate with the best mean, its spread, and the
paper's figure. Scores are of the dev set after the last step; the learning rate is chosen on the same set, as in the
paper, which flatters all methods alike.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import data, finetuning, harness, methods
from . import glue_tasks
from .glue_tasks import TASKS

METHODS = ("lora", "reflora", "reflora-s", "preclora", "lora-rite", "lora-pro", "dora")
LOSS_WINDOW = 20


def recipe(options: argparse.Namespace, name: str, rows: int, method: str, lr: float, seed: int) -> finetuning.Recipe:
    """Table 6's, with the options' size; --steps in place of the epochs scales the warm-up of the rate along."""
    task = TASKS[name]
    epochs = task.epochs * (rows // options.batch)
    steps = options.steps or epochs
    lr_warmup = min(task.lr_warmup, steps // 10) if options.steps else task.lr_warmup
    length = min(task.length, options.length) if options.length else task.length
    return finetuning.Recipe(
        options.model, method, seed, lr, steps, options.batch, length, options.rank, options.alpha,
        task.weight_decay, lr_warmup, options.plain_steps, dropout=task.dropout, rows=rows, bfloat16=options.bfloat16,
    )  # fmt: skip


def load(options: argparse.Namespace, name: str) -> data.Task:
    """The task with at most the asked number of rows, drawn once and for all: some GLUE files are in an order.

    Raises OSError or ValueError for data that is not there or not enough.
    """
    task = TASKS[name].load(options.data)
    task = replace(task, train=_drawn(task.train, options.train_rows), eval=_drawn(task.eval, options.eval_rows))
    if len(task.train) < options.batch:
        raise ValueError(f"--batch: expected at most the {len(task.train)} rows of {name}, got {options.batch}.")
    return task


def _drawn(examples: list[data.Example], count: int | None) -> list[data.Example]:
    if count is None or count >= len(examples):
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return [examples[index] for index in order[:count].tolist()]


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
        "score": round(statistics.fmean(scores.values()), 4),
        "finite": finite,
        "loss": loss if math.isfinite(loss) else None,
        "seconds": round(trained.seconds, 1),
    }


# ---- the table


def best(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[float, list[float]]]:
    """By (method, task): the learning rate with the best mean score, and the scores of its seeds.

    Rates are compared on the seeds that all of them have, so that a series that was stopped halfway misleads nobody.
    """
    groups: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for one in runs:
        groups.setdefault((one["method"], one["task"]), {}).setdefault(one["lr"], {})[one["seed"]] = one["score"]
    chosen = {}
    for key, by_rate in groups.items():
        common = set.intersection(*(set(scores) for scores in by_rate.values()))
        fair = {lr: [scores[seed] for seed in sorted(common)] for lr, scores in by_rate.items()}
        if common:
            chosen[key] = max(fair.items(), key=lambda entry: statistics.fmean(entry[1]))
    return chosen


def table(runs: Sequence[Mapping[str, Any]], names: Sequence[str], tasks: Sequence[str]) -> str:
    """Mean and standard deviation over seeds, the learning rate, and the paper's figure, a method a line."""
    chosen = best(runs)
    lines = []
    for method in names:
        cells, means = [], []
        for task in tasks:
            if (method, task) not in chosen:
                cells.append("-")
                continue
            lr, scores = chosen[method, task]
            means.append(statistics.fmean(scores))
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{means[-1]:.2f}{spread} ({lr:g})")
        paper = [glue_tasks.PAPER.get(method, {}).get(task) for task in tasks]
        average = f"{statistics.fmean(means):.2f}" if len(means) == len(tasks) else "-"
        known = [value for value in paper if value is not None]
        theirs = f"{statistics.fmean(known):.2f}" if len(known) == len(tasks) else "-"
        lines.append([methods.LABELS[method], *cells, average, theirs])
    return harness.table(["method", *tasks, "average", "paper's average"], lines)


# ---- the program


def parser(program: str, summary: str, chosen: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every program on GLUE has; `chosen`: its methods where none are given."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.paper.{program}", description=summary)
    made.add_argument("--data", type=Path, required=True, help="a folder with one folder a task: train and dev .jsonl")
    made.add_argument("--model", default="minilm", help="minilm, deberta-v3-base, a hub id or a folder")
    made.add_argument("--methods", nargs="+", default=list(chosen), choices=list(methods.METHODS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--steps", type=int, help="in place of the epochs of the paper's Table 6")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--length", type=int, help="most tokens, where it is less than Table 6's")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=int, default=8)
    made.add_argument("--plain-steps", type=int, default=0, help="AdamW steps before RefLoRA starts")
    made.add_argument("--train-rows", type=int, help="only so many training examples")
    made.add_argument("--eval-rows", type=int, help="only so many dev examples")
    made.add_argument("--bfloat16", action="store_true", help="forward and backward under bfloat16 autocast")
    made.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path, help="the file of runs")
    return made


def check(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave with one clear line where a common option is bad."""
    device = harness.pick_device(made, options.device)
    reason = methods.unserved(options.backend, device) or methods.missing(options.methods)
    if reason:
        made.error(reason)
    for name in ("steps", "batch", "rank", "alpha", "length", "train_rows", "eval_rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            made.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.plain_steps < 0:
        made.error(f"--plain-steps: expected at least 0, got {options.plain_steps}")
    if options.out.is_dir():
        made.error(f"--out: expected a file of JSON lines, got the folder {options.out}")
    harness.make_folder(made, options.out.parent, options.out)


def check_rates(made: argparse.ArgumentParser, option: str, given: Sequence[float]) -> None:
    for lr in given:
        if not 0 < lr < math.inf:
            made.error(f"{option}: expected positive numbers, got {lr}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("glue", (__doc__ or "").split("\n")[0], METHODS)
    made.add_argument("--tasks", nargs="+", default=["cola", "sst2", "mrpc", "stsb", "rte"], choices=list(TASKS))
    made.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2])
    made.add_argument("--table", action="store_true", help="make no run, print the table of those there are")
    made.set_defaults(out=Path("benchmarks/results/paper/glue.jsonl"))
    options = made.parse_args(argv)
    check(made, options)
    check_rates(made, "--lrs", options.lrs)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        tasks = {name: load(options, name) for name in options.tasks}
    except (OSError, ValueError) as error:
        raise SystemExit(f"glue: {error}") from error
    record = finetuning.Record(options.out, harness.environment(torch.device(options.device), torch.float32))
    once = [list(dict.fromkeys(given)) for given in (options.seeds, options.tasks, options.lrs, options.methods)]
    keys = [
        {
            **finetuning.key(task, recipe(options, task, len(tasks[task].train), method, lr, seed)),
            "eval_rows": len(tasks[task].eval),
        }
        for seed, task, lr, method in itertools.product(*once)
    ]
    print(harness.header(record.env), flush=True)
    try:
        if options.table:
            done = [found for found in record.find(keys) if found]
        else:
            done = finetuning.series(record, keys, lambda key: run(options, tasks, key), "runs")
    except (OSError, ImportError) as error:
        raise SystemExit(f"glue: {error}") from error
    print(f"{options.model}, r={options.rank}; {len(done)} of {len(keys)} runs in {options.out}")
    print(table(done, once[3], once[1]))


if __name__ == "__main__":
    main()
