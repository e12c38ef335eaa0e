"""How much RefLoRA costs in training a real model on real text: `python -m benchmarks.throughput --help`.

Every method starts from the same weights and sees the same batches and dropout masks; they take turns in one process,
so that a slow spell of the machine meets all of them. Iterations before the end of the warm-up are not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import batches, data, figures, harness, methods, models
from .harness import Measurement, Summary, summarize
from .training import Bench, Runner, train

MB = 1e6
LOSS_WINDOW = 10  # the loss after N steps is the mean of the last ten: single batches are noisy


def measurements(runners: Sequence[Runner], memory: dict[str, tuple[int, int] | None], case: str) -> list[Measurement]:
    """The rows of the CSV. Ratios are to LoRA where LoRA was run, round by round."""
    base = next((runner for runner in runners if runner.name == "lora" and not runner.failure), None)
    rows = []

    def add(method: str, metric: str, unit: str, summary: Summary) -> None:
        rows.append(Measurement("throughput", case, methods.LABELS[method], metric, unit, summary))

    for runner in runners:
        if runner.failure or not runner.iteration:
            continue
        name = runner.name
        add(name, "iteration", "ms", summarize([1e3 * t for t in runner.iteration]))
        add(name, "iterations per second", "1/s", summarize([1 / t for t in runner.iteration]))
        add(name, "optimizer step", "ms", summarize([1e3 * t for t in runner.step]))
        add(name, "loss", "nats", summarize([loss.item() for loss in runner.losses[-LOSS_WINDOW:]]))
        if base:
            add(name, "throughput to LoRA", "ratio", harness.paired_ratio(base.iteration, runner.iteration))
            add(name, "optimizer step to LoRA", "ratio", harness.paired_ratio(runner.step, base.step))
        peaks, base_peaks = memory.get(name), memory.get("lora")
        if peaks:
            add(name, "peak memory of training", "MB", summarize([peaks[0] / MB]))
            add(name, "peak memory of a step", "MB", summarize([peaks[1] / MB]))
        if peaks and base_peaks:
            add(name, "peak memory above LoRA", "MB", summarize([(peaks[0] - base_peaks[0]) / MB]))
    return rows


def report(runners: Sequence[Runner], rows: Sequence[Measurement]) -> str:
    """The table; a method that failed says where."""
    columns = ["method", "it/s", "to LoRA", "(quartiles)", "step ms", "to LoRA", "memory +MB", "step peak MB", "loss"]
    found = {(row.method, row.metric): row.summary for row in rows}

    def cell(label: str, metric: str, form: str) -> str:
        summary = found.get((label, metric))
        return format(summary.p50, form) if summary else "-"

    lines = []
    for runner in runners:
        label = methods.LABELS[runner.name]
        if runner.failure:
            lines.append([label, f"failed at {runner.failure}", *7 * [""]])
            continue
        ratio = found.get((label, "throughput to LoRA"))
        spread = "{:.3f}-{:.3f}".format(*ratio.quartiles) if ratio else "-"
        loss = sum(loss.item() for loss in runner.losses[-LOSS_WINDOW:]) / len(runner.losses[-LOSS_WINDOW:])
        lines.append([
            label, cell(label, "iterations per second", ".2f"), cell(label, "throughput to LoRA", ".3f"), spread,
            cell(label, "optimizer step", ".2f"), cell(label, "optimizer step to LoRA", ".2f"),
            cell(label, "peak memory above LoRA", "+.2f"), cell(label, "peak memory of a step", ".2f"), f"{loss:.4f}",
        ])  # fmt: skip
    return harness.table(columns, lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, the open ones filled in by the model's preset. Exits with one clear line where an option is bad."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=(__doc__ or "").split("\n")[0])
    known = ", ".join(models.PRESETS)
    parser.add_argument("--model", help=f"{known}, a hub id or a folder (default: minilm, on a GPU deberta-v3-base)")
    parser.add_argument("--data", default=data.DEFAULT, help="stdlib, FILE.jsonl[.gz], a GLUE folder or a hub data set")
    parser.add_argument("--methods", default=",".join(methods.DEFAULT), help=f"from {', '.join(methods.LABELS)}")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--targets", help="all-linear, or names with commas (default: the model's preset)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, help="tokens a sequence, padded")
    parser.add_argument("--steps", type=int, help="training steps of each method (default: 50, on a GPU 100)")
    parser.add_argument("--warmup", type=int, default=20, help="plain steps of the RefLoRA variants, never timed")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurement out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the CSV and the PNG")
    options = parser.parse_args(argv)
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: expected a device that torch can use, got {options.device}; this torch sees no GPU")
    gpu = options.device.type == "cuda"
    options.model = options.model or ("deberta-v3-base" if gpu else "minilm")
    preset = models.PRESETS.get(options.model, models.OTHER)
    for name in ("rank", "batch", "length", "lr"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(preset, name))
    options.alpha = options.rank * preset.alpha // preset.rank
    targets = options.targets or preset.targets
    split = isinstance(targets, str) and targets != "all-linear"
    options.targets = tuple(targets.split(",")) if split else targets
    options.steps = options.steps if options.steps is not None else (100 if gpu else 50)
    options.block = 4 if gpu else 1
    options.methods = options.methods.split(",")
    unknown = [name for name in options.methods if name not in methods.LABELS]
    if unknown:
        parser.error(f"--methods: expected some of {', '.join(methods.LABELS)}, got {', '.join(unknown)}")
    reason = methods.unserved(options.backend, options.device) or methods.missing(options.methods)
    if reason:
        parser.error(reason)
    for name, least in (("rank", 1), ("batch", 1), ("length", 3), ("warmup", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if options.steps < untimed(options) + options.block:
        remedy = "the first steps are not timed"
        parser.error(f"--steps: expected at least {untimed(options) + options.block}, got {options.steps}; {remedy}")
    return options


def untimed(options: argparse.Namespace) -> int:
    """Steps that are not timed: the warm-up and two more, in whole blocks."""
    return -(-(options.warmup + 2) // options.block) * options.block


def run(options: argparse.Namespace) -> tuple[list[Runner], list[Measurement], str]:
    """Load, train in turns, measure memory. Returns the runners, the CSV rows and the table with its head."""
    task = data.load(options.data)
    preset = (options.rank, options.alpha, options.targets, options.seed)
    loaded = models.load(options.model, task.classes, options.device, *preset)
    draws = batches.batches(task.train, options.batch, options.seed)
    feed = []
    for _ in range(options.steps):
        batch = batches.encode(loaded.tokenizer, next(draws), options.length, True, loaded.causal)
        feed.append({key: value.to(options.device) for key, value in batch.items()})
    setting = methods.Setting(options.lr, options.warmup, backend=options.backend)
    bench = Bench(loaded, feed, setting, options.device)
    runners = train(bench, options.methods, options.steps, untimed(options), options.block)
    memory = {}
    if not options.no_memory:
        start = next((r.parameters for r in runners if r.name == "lora"), runners[0].parameters)
        for runner in runners:
            memory[runner.name] = None if runner.failure else bench.memory(runner.name, start)
    rows = measurements(runners, memory, f"{options.model} r={options.rank} on {task.name}")
    return runners, rows, _head(options, task, loaded, runners) + report(runners, rows)


def _head(options: argparse.Namespace, task: data.Task, loaded: models.Loaded, runners: Sequence[Runner]) -> str:
    count = len(models.lora_pairs(loaded.model))
    served = {backend for runner in runners for backend in getattr(runner.optimizer, "backends", {}).values()}
    rounds = (options.steps - untimed(options)) // options.block
    counter = harness.CUDA_MEMORY if options.device.type == "cuda" else harness.CPU_MEMORY
    return "\n".join([
        harness.header(harness.environment(options.device, torch.float32)),
        f"{options.model}, {loaded.weights}; {count} LoRA pairs, r={options.rank}, batch {options.batch}, length "
        f"{options.length}; {task.name}, {task.classes} classes, {len(task.train)} training texts",
        f"reflora backend {', '.join(sorted(served)) or 'not run'}; lr {options.lr} constant, {options.steps} steps, "
        f"warm-up {options.warmup}; medians of {rounds} rounds; loss: mean of the last {LOSS_WINDOW} steps",
        f"memory: {counter}; above LoRA in two whole iterations, and the peak of one optimizer step",
        "", "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    began = time.perf_counter()
    try:
        runners, rows, text = run(options)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"throughput: {error}") from error
    stem = f"throughput_{options.model.replace('/', '_')}_{options.device.type}"
    csv_path, png_path = options.out / f"{stem}.csv", options.out / f"{stem}.png"
    env = harness.environment(options.device, torch.float32)
    harness.write_csv(csv_path, rows, env)
    print(text)
    drawn = figures.overhead(png_path, rows, env)
    wrote = f"{csv_path} and {png_path}" if drawn else f"{csv_path}; no figure, since matplotlib is not installed"
    print(f"\n{time.perf_counter() - began:.0f} s; wrote {wrote}")


if __name__ == "__main__":
    main()
