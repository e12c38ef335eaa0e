"""How much RefLoRA costs in training a real model on real text: `python -m benchmarks.throughput --help`.

Every method starts from the same function and sees the same batches and dropout masks; they take turns in one process,
so that a slow spell of the machine meets all of them. Iterations before the end of the warm-up are not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

from . import bars, harness, methods, options, probes, unused
from .harness import Measurement, Summary, summarize
from .training import Footprint, Runner, train

MB = 1e6
# a rival may fail, that is a result
OURS = ("lora", "reflora", "reflora-carried", "reflora-s", "invariant", "riemannian-fused")
LOSS_WINDOW = 10  # the loss after N steps is the mean of the last ten: single batches are noisy


def measurements(runners: Sequence[Runner], footprints: Mapping[str, Footprint | None], case: str) -> list[Measurement]:
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
    return rows + memory_rows("throughput", footprints, case)


def memory_rows(benchmark: str, footprints: Mapping[str, Footprint | None], case: str) -> list[Measurement]:
    """Memory of each method in MB: peak, state and temporaries, and the first two above LoRA's."""
    base = footprints.get("lora")
    rows = []
    for name, own in footprints.items():
        if own is None:
            continue
        found = {"peak of training": own.peak, "optimizer state": own.state, "temporaries of a step": own.temporaries}
        if base:
            found["peak above LoRA"] = own.peak - base.peak
            found["state above LoRA"] = own.state - base.state
            found["temporaries above LoRA"] = own.temporaries - base.temporaries
        label = methods.LABELS[name]
        rows += [Measurement(benchmark, case, label, key, "MB", summarize([size / MB])) for key, size in found.items()]
    return rows


def report(runners: Sequence[Runner], rows: Sequence[Measurement]) -> str:
    """The table; a method that failed says where."""
    columns = [
        "method",
        "it/s",
        "to LoRA",
        "(quartiles)",
        "(95 %)",
        "step ms",
        "to LoRA",
        "peak +MB",
        "state MB",
        "loss",
    ]
    found = {(row.method, row.metric): row.summary for row in rows}

    def cell(label: str, metric: str, form: str) -> str:
        summary = found.get((label, metric))
        return format(summary.p50, form) if summary else "-"

    lines = []
    for runner in runners:
        label = methods.LABELS[runner.name]
        if runner.failure:
            lines.append([label, f"failed at {runner.failure}", *8 * [""]])
            continue
        ratio = found.get((label, "throughput to LoRA"))
        ends = (ratio.quartiles, ratio.interval) if ratio else (None, None)
        spread, sure = ("{:.3f}-{:.3f}".format(*pair) if pair else "-" for pair in ends)
        loss = sum(loss.item() for loss in runner.losses[-LOSS_WINDOW:]) / len(runner.losses[-LOSS_WINDOW:])
        lines.append([
            label, cell(label, "iterations per second", ".2f"), cell(label, "throughput to LoRA", ".3f"), spread, sure,
            cell(label, "optimizer step", ".2f"), cell(label, "optimizer step to LoRA", ".2f"),
            cell(label, "peak above LoRA", "+.2f"), cell(label, "optimizer state", ".2f"), f"{loss:.4f}",
        ])  # fmt: skip
    return harness.table(columns, lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, the open ones filled in by the model's preset. Exits with one clear line where an option is bad."""
    parser = options.parser("throughput", (__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps of each method (default: 50, on a GPU 100)")
    parser.add_argument("--warmup", type=int, default=20, help="plain steps of the RefLoRA variants, never timed")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurement out")
    chosen = parser.parse_args(argv)
    options.complete(parser, chosen)
    gpu = chosen.device.type == "cuda"
    chosen.steps = chosen.steps if chosen.steps is not None else (100 if gpu else 50)
    chosen.block = 4 if gpu else 1
    if chosen.warmup < 0:
        parser.error(f"--warmup: expected at least 0, got {chosen.warmup}")
    least = untimed(chosen) + chosen.block
    if chosen.steps < least:
        parser.error(f"--steps: expected at least {least}, got {chosen.steps}; the first steps are not timed")
    return chosen


def untimed(chosen: argparse.Namespace) -> int:
    """Steps that are not timed: the warm-up and two more, in whole blocks."""
    return -(-(chosen.warmup + 2) // chosen.block) * chosen.block


def run(chosen: argparse.Namespace) -> tuple[list[Runner], list[Measurement], str]:
    """Load, train in turns, measure memory. Returns the runners, the CSV rows and the table with its head."""
    prepared = options.prepare(chosen, chosen.steps, chosen.warmup)
    runners = train(prepared.bench, chosen.methods, chosen.steps, untimed(chosen), chosen.block)
    sound = [runner.name for runner in runners if not runner.failure]
    footprints = {} if chosen.no_memory else prepared.bench.footprints(sound)
    rows = measurements(runners, footprints, prepared.case)
    rounds = (chosen.steps - untimed(chosen)) // chosen.block
    counter = probes.CUDA_MEMORY if chosen.device.type == "cuda" else probes.CPU_MEMORY
    of_memory = f"memory: {counter}; peak of two whole iterations above LoRA's, and what the optimizer keeps after them"
    head = [
        prepared.head,
        f"lr {chosen.lr} constant, {chosen.steps} steps, warm-up {chosen.warmup}; medians of {rounds} rounds, their "
        f"quartiles and the 95 % interval of the median; loss: mean of the last {LOSS_WINDOW} steps",
        *([] if chosen.no_memory else [of_memory]), "", "",
    ]  # fmt: skip
    return runners, rows, "\n".join(head) + report(runners, rows)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    options.announce("throughput", chosen, f"{chosen.steps} steps each")
    began = time.perf_counter()
    try:
        runners, rows, text = run(chosen)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"throughput: {error}") from error
    options.finish("throughput", chosen, rows, f"{text}\n\n{time.perf_counter() - began:.0f} s", bars.throughput)
    if any(runner.failure and runner.name in OURS for runner in runners):
        raise SystemExit(1)


if __name__ == "__main__":
    unused.leave_out()
    main()
