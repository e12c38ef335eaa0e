"""Held-out loss of a causal model, all methods over a grid of learning rates: `python -m benchmarks.paper.language`.

A mean over tens of thousands of tokens, where a score on 400 labels is off by a point or two: it shows differences of
0.1 %. Beside it the stable rank of B A, `||B A||_F^2 / ||B A||_2^2`, and the condition number of B, medians over the
layers: what a method makes of its rank. One JSON line a run; a stopped series goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import batches, data, finetuning, harness, models, unused
from . import arguments, language_figures, language_tables, language_tasks, tables, tuning

METHODS = ("lora", "reflora", "reflora-s")
EVAL_BATCH = 64
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
        print("\n\n".join(filter(None, (language_tables.table(runs), language_tables.table_above_lora(runs)))))
    if by_rank := language_tables.table_by_rank([run for run in every if run["model"] == options.model]):
        print(f"\n{by_rank}")
    draw(options.out, every, options.model)


def draw(out: Path, runs: Sequence[Run], model: str) -> None:
    """The figures beside the file, whatever was asked: of RefLoRA's starts, and of all methods by rank."""
    of_methods = [run for run in runs if run["method"] in METHODS]
    compared = [some for some in tables.settings(of_methods).values() if len(language_tables.starts_of(some)) > 1]
    starts = [run for some in compared for run in some] or of_methods
    own = [run for run in runs if run["model"] == model]
    pictures = out.with_suffix(".png"), out.with_name(f"{out.stem}_ranks.png")
    for picture, draws, some in zip(pictures, (language_figures.draw, language_figures.draw_ranks), (starts, own)):
        if some and draws(picture, some, some[-1]["machine"]):
            print(f"\nwrote {picture}")


def series(options: argparse.Namespace, record: finetuning.Record) -> list[dict[str, Any]]:
    print(harness.header(record.env), flush=True)
    task = language_tasks.load(options.task, Path(options.data) if options.data else None)
    task = data.Task(task.name, data.drawn(task.train, options.train_rows), task.eval[: options.eval_rows], 1, "causal")
    seen = {"eval_rows": len(task.eval), "data": data.digest(task.train, task.eval), **models.identity(options.model)}

    def key(name: str, method: str, lr: float, seed: int) -> dict[str, Any]:
        return {**finetuning.key(name, recipe(options, len(task.train), method, lr, seed)), **seen}

    names = [options.task], options.methods, options.lrs, options.seeds
    return tuning.grid(record, key, names, lambda one: run(options, task, one), options.tune_first_seed)


if __name__ == "__main__":
    unused.leave_out()
    main()
