"""Held-out loss of a causal model, all methods over a grid of learning rates: `python -m benchmarks.paper.language`.

A mean over tens of thousands of tokens, where a score on 400 labels is off by a point or two: it shows differences of
0.1 %. Beside it the stable rank of B A, `||B A||_F^2 / ||B A||_2^2`, and the condition number of B, medians over the
layers: what a method makes of its rank. One JSON line a run; a stopped series goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import batches, data, drawing, figures, finetuning, harness, methods, models
from . import arguments, language_tasks, tables, tuning

METHODS = ("lora", "reflora", "reflora-s")
EVAL_BATCH = 64
BROKEN = 1.5
STARTS = {"exact from B = 0": "#D55E00", "100 plain steps": "#E69F00"}  # colours
Run = Mapping[str, Any]


def recipe(options: argparse.Namespace, rows: int, method: str, lr: float, seed: int) -> finetuning.Recipe:
    """The rate rises over at most 20 steps and falls linearly to 0; alpha = r unless it is given."""
    alpha = options.rank if options.alpha is None else options.alpha
    return finetuning.Recipe(
        options.model, method, seed, lr, options.steps, options.batch, options.length, options.rank, alpha,
        lr_warmup=min(20, options.steps // 10), plain_steps=arguments.plain_steps(options, method), rows=rows,
        bfloat16=options.bfloat16, targets=options.targets,
    )  # fmt: skip


def run(options: argparse.Namespace, task: data.Task, key: Run) -> dict[str, Any]:
    """What a line of the file holds besides its key."""
    made = finetuning.recipe_of(key)
    bar = harness.bar(made.steps, f"{tables.name_of(key)}, {made.lr:g}")

    def watch(step: int, trained: finetuning.Trained) -> None:
        bar.update(step - bar.n)

    trained = finetuning.train(made, task, torch.device(options.device), options.backend, watch)
    bar.close()
    loss = held_out_loss(trained, task.eval, made.length)
    finite = trained.finite and math.isfinite(loss)
    found: dict[str, Any] = {"finite": finite, "seconds": round(trained.seconds, 1)}
    if finite:
        found |= {"held_out": round(loss, 5), "score": round(-loss, 5)} | spectra(trained.pairs)
    return found | ({} if finite else {"held_out": None, "score": 0.0})


@torch.no_grad()
def held_out_loss(run: finetuning.Trained, examples: Sequence[data.Example], length: int) -> float:
    """Mean over all tokens, in nats."""
    run.model.eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), EVAL_BATCH):
        batch = batches.encode(run.tokenizer, examples[start : start + EVAL_BATCH], length, False, True)
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += run.model(**{key: value.to(run.device) for key, value in batch.items()}).loss.item() * tokens
        count += tokens
    return total / count


@torch.no_grad()
def spectra(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Medians over the layers of the stable rank of B A and the condition number of B; none for a model without."""
    ranks, conditions = [], []
    for A, B in pairs:
        root_A, root_B = (torch.linalg.qr(X.double()).R for X in (A.mT, B))
        product, of_B = (torch.linalg.svdvals(X) for X in (root_B @ root_A.mT, root_B))
        ranks.append(float(product.square().sum() / product[0].square()))
        conditions.append(float(of_B[0] / of_B[-1]))
    if not ranks:
        return {}
    return {"stable_rank": round(statistics.median(ranks), 3), "condition_B": round(statistics.median(conditions), 2)}


# ---- table and figure


def table(runs: Sequence[Run]) -> str:
    """A line per method and a column per learning rate: held-out loss, mean over seeds; (stable rank of B A; k(B)).

    "*": the best rate of a method; "!": it is at the end of those that were tried.
    """
    rates = sorted({run["lr"] for run in runs})
    lines = []
    for name in _names(runs):
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
    return _means((run, 100 * (run["held_out"] / base[run["lr"], run["seed"]] - 1)) for run in others)


def table_above_lora(runs: Sequence[Run]) -> str:
    """`above_lora` as a table; "" where there is nothing to compare."""
    found = above_lora(runs)
    rates = sorted({lr for of_method in found.values() for lr in of_method})
    lines = [
        [name, *(f"{found[name][lr]:+.2f}" if lr in found[name] else "-" for lr in rates)]
        for name in _names(runs)
        if name in found
    ]
    return harness.table(["above LoRA, %", *(f"{lr:g}" for lr in rates)], lines) if lines else ""


def draw(path: Path, runs: Sequence[Run], env: Mapping[str, str]) -> bool:
    """PNG: loss, what it is above LoRA's, and stable rank against the rate; a row of panels a setting.

    False without matplotlib.
    """
    pyplot = drawing.pyplot()
    if pyplot is None:
        return False
    settings = sorted(tables.settings(runs).values(), key=lambda some: (some[0]["model"], some[0]["rank"]))
    names = _names(runs)
    with pyplot.rc_context(drawing.STYLE):
        size = (7.2, 1.9 * len(settings) + 0.6)
        figure, axes = pyplot.subplots(len(settings), 3, figsize=size, squeeze=False)
        for row, some in zip(axes, settings):
            title = f"{some[0]['model']}, r = {some[0]['rank']}"
            best = min((run["held_out"] for run in some if run["finite"]), default=1.0)
            losses, ranks = (
                _means((run, run[what]) for run in some if run["finite"] and what in run)
                for what in ("held_out", "stable_rank")
            )
            _panel(row[0], losses, names, f"held-out loss\n{title}", (best * 0.99, best * 1.2))
            _panel(row[1], above_lora(some), names, "above LoRA's, %", (-0.6, 1.2))
            _panel(row[2], ranks, names, "stable rank of B A")
        for axis in axes[-1]:
            axis.set_xlabel("learning rate, thousandths")
        drawing.finish(figure, [axes[0][0]], env, len(names))
        drawing.save(pyplot, figure, path)
    return True


def _names(runs: Iterable[Run]) -> list[str]:
    """Of methods in their order, each with its own start first."""
    order = list(methods.LABELS)
    starts = {}
    for run in runs:
        plain = run.get("plain_steps")
        starts[tables.name_of(run)] = order.index(run["method"]), -1 if plain is None else plain
    return sorted(starts, key=starts.__getitem__)


def _means(values: Iterable[tuple[Run, float]]) -> dict[str, dict[float, float]]:
    """By method and learning rate, over the seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for run, value in values:
        found.setdefault(tables.name_of(run), {}).setdefault(run["lr"], []).append(value)
    return {name: {lr: statistics.fmean(some) for lr, some in sorted(rates.items())} for name, rates in found.items()}


def _panel(
    axis: Any, curves: Mapping[str, Mapping[float, float]], names: Sequence[str], title: str,
    limits: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """The curves that there are, with an entry in the legend for each of the names."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for number, name in enumerate(names):
        curve = curves.get(name, {})
        method, _, start = name.partition(", ")
        colour = STARTS.get(start) or figures.COLOURS.get(method, "#555555")
        dashes = "--" if method == methods.LABELS["reflora-s"] else "-"
        marker = "os^Dv<>P"[number % 8]
        axis.plot(list(curve), list(curve.values()), dashes, color=colour, marker=marker, ms=3, lw=1.1, label=name)
    rates = sorted({lr for curve in curves.values() for lr in curve})
    axis.set(xscale="log", ylabel=title)
    if limits:
        axis.set_ylim(*limits)
    axis.xaxis.set_major_locator(FixedLocator(rates))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{1000 * rate:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(**drawing.GRID)


# ---- the program


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = arguments.parser("language", (__doc__ or "").split("\n")[0], METHODS)
    made.add_argument("--task", default="commonsense", choices=language_tasks.TASKS)
    made.add_argument("--targets", default="", help="layers that LoRA is put on, with commas between (default: all)")
    arguments.add_grid(made, (1e-3, 3e-3, 6e-3, 1e-2, 2e-2))
    made.set_defaults(
        model="proxy", seeds=[0], steps=400, batch=8, length=64, rank=16, alpha=None,
        out=Path("benchmarks/results/paper/language.jsonl"),
    )  # fmt: skip
    return arguments.parse_grid(made, argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    record = finetuning.Record(options.out, arguments.environment(options))
    if not options.table:
        try:
            series(options, record)
        except (OSError, ValueError, ImportError) as error:
            raise SystemExit(f"language: {error}") from error
    every = [one for one in record.runs() if one.get("task") == options.task]
    asked = [one for one in every if one["method"] in options.methods]
    for what, runs in tables.settings(asked).items():
        print(f"\n{what}: {len(runs)} runs, the last on {harness.header(runs[-1]['machine'])}")
        print("\n\n".join(filter(None, (table(runs), table_above_lora(runs)))))
    picture = options.out.with_suffix(".png")
    if every and draw(picture, every, every[-1]["machine"]):  # whatever was asked: a file has one figure
        print(f"\nwrote {picture}")


def series(options: argparse.Namespace, record: finetuning.Record) -> list[dict[str, Any]]:
    task = language_tasks.load(options.task, Path(options.data) if options.data else None)
    task = data.Task(task.name, data.drawn(task.train, options.train_rows), task.eval[: options.eval_rows], 1, "causal")
    seen = {"eval_rows": len(task.eval), "data": data.digest(task.train, task.eval), **models.identity(options.model)}

    def key(name: str, method: str, lr: float, seed: int) -> dict[str, Any]:
        return {**finetuning.key(name, recipe(options, len(task.train), method, lr, seed)), **seen}

    print(harness.header(record.env), flush=True)
    names = [options.task], options.methods, options.lrs, options.seeds
    return tuning.grid(record, key, names, lambda one: run(options, task, one), options.tune_first_seed)


if __name__ == "__main__":
    main()
