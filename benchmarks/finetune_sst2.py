"""Does it train as well as LoRA? MiniLM on SST-2, several seeds: `python -m benchmarks.finetune_sst2 --data FOLDER`.

Every run adds one JSON line to the results file and is not repeated if its line is there, so a stopped series goes on
where it was. All methods of a seed share the initial weights, batches, dropout masks and learning-rate
schedule: constant, or with --schedule linear falling to zero over the run; neither has a learning-rate warm-up.
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

from . import data, finetuning, harness, methods

METHODS = ("lora", "reflora", "reflora-s")
LOSS_WINDOW = 20


def train(options: argparse.Namespace, task: data.Task, name: str, seed: int) -> dict[str, Any]:
    """One run; what its JSON line holds beside the key."""
    device = torch.device(options.device)
    recipe = finetuning.Recipe(
        "minilm", name, seed, options.lr, options.steps, options.batch, options.length, options.rank, options.rank,
        plain_steps=options.warmup, schedule=options.schedule,
    )  # fmt: skip
    watched: dict[str, dict[str, float]] = {}

    def watch(step: int, run: finetuning.Trained) -> None:
        if step in options.watch:
            watched[str(step)] = inspect(run.optimizer, run.pairs)

    run = finetuning.train(recipe, task, device, options.backend, watch)
    found = finetuning.outputs(run, task.eval, options.length, device).argmax(-1).tolist()
    return {
        "accuracy": statistics.fmean(guess == example.label for guess, example in zip(found, task.eval)),
        "loss": statistics.fmean(run.losses[-LOSS_WINDOW:]),
        "finite": run.finite,
        "seconds": round(run.seconds, 1),
        "backend": ", ".join(sorted(set(getattr(run.optimizer, "backends", {}).values()))),
        "watched": watched,
        "losses": [round(loss, 4) for loss in run.losses],
    }


def inspect(optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Worst layer now: condition numbers of A and B; and, of the RefLoRA variants, what the last step reported."""
    seen = {
        "worst_k_A": max(condition(A) for A, _ in pairs),
        "worst_k_B": max(condition(B) for _, B in pairs),
    }
    if hasattr(optimizer, "diagnostics"):
        report = optimizer.diagnostics()
        seen |= {
            "reported_condition_A": float(report.condition_A.max()),
            "reported_condition_B": float(report.condition_B.max()),
            "worst_balance": report.worst_balance,
            "refactored": report.refactored,
            "degenerate": report.degenerate,
            "skipped": report.skipped,
        }
    # json has no inf and NaN
    return {name: value if math.isfinite(value) else str(value) for name, value in seen.items()}  # type: ignore[misc]


def condition(factor: Tensor) -> float:
    """Largest over smallest singular value, in float64; inf for a factor of lower rank."""
    values = torch.linalg.svdvals(factor.detach().double().cpu())
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf


def key(options: argparse.Namespace, task: data.Task, name: str, seed: int) -> dict[str, Any]:
    """What makes two runs the same run."""
    names = ("steps", "batch", "length", "lr", "schedule", "rank", "warmup", "device")
    return {"task": task.name, "method": name, "seed": seed, **{field: getattr(options, field) for field in names}}


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy and spread a method, its distance to LoRA in points, and the worst condition at the end."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    base = groups.get("lora")
    lines = []
    for name in (name for name in methods.LABELS if name in groups):
        group = groups[name]
        scores = [100 * run["accuracy"] for run in group]
        mean = statistics.fmean(scores)
        to_lora = f"{mean - 100 * statistics.fmean(run['accuracy'] for run in base):+.2f}" if base else "-"
        last = [run["watched"][max(run["watched"], key=int)] for run in group if run["watched"]]
        worst = max((float(entry["worst_k_B"]) for entry in last), default=math.nan)
        lines.append([
            methods.LABELS[name], str(len(group)), f"{mean:.2f}", f"{min(scores):.2f}-{max(scores):.2f}", to_lora,
            f"{statistics.fmean(run['loss'] for run in group):.4f}", f"{worst:.3g}",
            "yes" if all(run["finite"] for run in group) else "NO",
            f"{statistics.fmean(run['seconds'] for run in group):.0f}",
        ])  # fmt: skip
    columns = ["method", "seeds", "dev acc %", "range", "to LoRA", "train loss", "worst k(B)", "finite", "s a run"]
    return harness.table(columns, lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune_sst2", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="GLUE folder with train and dev .jsonl[.gz], or a file")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=methods.BARE)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="most tokens a sentence")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=("constant", "linear"), default="constant")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=20, help="plain steps of the RefLoRA variants")
    parser.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--watch", nargs="+", type=int, help="steps at which the worst layer's condition is noted")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sst2_cpu.jsonl"))
    options = parser.parse_args(argv)
    default = {1, options.warmup + 1, options.warmup + 2, 50, 100, 200, options.steps}
    options.watch = sorted(set(options.watch or default))
    reason = methods.unserved(options.backend, torch.device(options.device)) or methods.missing(options.methods)
    if reason:
        parser.error(reason)
    for name in ("steps", "batch", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        task = data.load(options.data)
    except (OSError, ValueError) as error:
        raise SystemExit(f"finetune_sst2: {error}") from error
    record = finetuning.Record(options.out, harness.environment(torch.device(options.device), torch.float32))
    print(harness.header(record.env), flush=True)
    wanted = [key(options, task, name, seed) for seed in options.seeds for name in options.methods]

    def make(wish: Mapping[str, Any]) -> dict[str, Any]:
        return train(options, task, wish["method"], wish["seed"])

    print(report(finetuning.series(record, wanted, make, "runs")))


if __name__ == "__main__":
    main()
