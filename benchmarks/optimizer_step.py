"""The cost of an optimizer step on true shapes, without a model: `python -m benchmarks.optimizer_step --help`.

Every method has pairs of its own with the same values. As in training, each step gets fresh gradient tensors after
`zero_grad(set_to_none=True)`, and host time counts; making the gradients does not. Two orders, which differ where the
factors fit a cache: "turns" interleaves the methods, so that a step finds its factors evicted, as the forward and
backward passes of training leave them; "alone" runs the rounds of one method on end and finds them there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import harness, methods, shapes
from .harness import Measurement, summarize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Stepper:
    """One method on its own pairs; `times` in seconds, of the counted rounds."""

    def __init__(self, name: str, pairs: list[tuple[Tensor, Tensor]], setting: methods.Setting, warm: int):
        self.name, self.warm = name, warm
        self.parameters = [factor for pair in pairs for factor in pair]
        self.device = self.parameters[0].device
        self.optimizer = methods.build(name, self.parameters, pairs, setting)
        self.times: list[float] = []
        self.failure: str | None = None

    def __call__(self, turn: int, gradients: Sequence[Tensor]) -> None:
        if self.failure:
            return
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        try:
            with harness.Stopwatch(self.device) as watch:
                self.optimizer.step()
        except torch.linalg.LinAlgError as error:
            self.failure = f"turn {turn}: {str(error).partition('(')[0]}"
            return
        if turn >= self.warm:
            self.times.append(watch.seconds)


def measure(options: argparse.Namespace, shape: str, rank: int, order: str) -> list[Stepper]:
    """All methods on the pairs of `shape` at `rank`."""
    setting = methods.Setting(lr=1e-4, warmup_steps=0, backend=options.backend)

    def stepper(name: str) -> Stepper:
        pairs = shapes.random_pairs(shape, rank, DTYPES[options.dtype], options.device)
        return Stepper(name, pairs, setting, options.warm)

    steppers = {name: stepper(name) for name in options.methods}
    parameters = next(iter(steppers.values())).parameters
    generator = torch.Generator(options.device).manual_seed(0)
    draws = [[_gradient(parameter, generator) for parameter in parameters] for _ in range(2)]

    def case(name: str):  # type: ignore[no-untyped-def]
        return lambda turn: steppers[name](turn, draws[turn % len(draws)])

    cases = {name: case(name) for name in steppers}
    groups = [cases] if order == "turns" else [{name: cases[name]} for name in cases]
    for group in groups:
        harness.interleave(group, options.warm + options.rounds, f"{shape} r={rank} {order}")
    return list(steppers.values())


def _gradient(parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
    return (1e-3 * noise).to(parameter.dtype)


def measurements(steppers: Sequence[Stepper], case: str, paired: bool) -> list[Measurement]:
    """Times, and ratios to LoRA's fused AdamW where it was run: round by round if `paired`, else to its median."""
    base = next((stepper.times for stepper in steppers if stepper.name == "lora"), None)
    rows = []
    for stepper in steppers:
        if stepper.failure:
            continue
        label = methods.LABELS[stepper.name]
        milliseconds = summarize([1e3 * t for t in stepper.times])
        rows.append(Measurement("optimizer_step", case, label, "optimizer step", "ms", milliseconds))
        if base:
            ratio = harness.paired_ratio(stepper.times, base if paired else [summarize(base).p50] * len(base))
            rows.append(Measurement("optimizer_step", case, label, "optimizer step to LoRA", "ratio", ratio))
    return rows


def report(rows: Sequence[Measurement], failures: Sequence[str]) -> str:
    """A row a method and case: median, quartiles, the ratio of medians to LoRA and the median of ratios."""
    found = {(row.case, row.method, row.metric): row.summary for row in rows}
    lines = []
    for case, method, metric in found:
        if metric != "optimizer step":
            continue
        time, base = found[case, method, metric], found.get((case, methods.LABELS["lora"], metric))
        paired = found.get((case, method, "optimizer step to LoRA"))
        spread = "{:.3f}-{:.3f}".format(*time.quartiles)
        of_medians = f"{time.p50 / base.p50:.2f}" if base else "-"
        lines.append([case, method, f"{time.p50:.3f}", spread, of_medians, f"{paired.p50:.2f}" if paired else "-"])
    columns = ["case", "method", "median ms", "quartiles", "of medians", "to LoRA"]
    return "\n".join([harness.table(columns, lines), *failures])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizer_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--shapes", nargs="+", default=["deberta-v3-base"], choices=shapes.NAMES)
    parser.add_argument("--rank", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--methods", nargs="+", default=list(methods.DEFAULT), choices=list(methods.LABELS))
    parser.add_argument("--order", nargs="+", default=["turns", "alone"], choices=["turns", "alone"])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=100, help="counted turns of each method")
    parser.add_argument("--warm", type=int, default=10, help="turns before that, not counted")
    parser.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the CSV")
    options = parser.parse_args(argv)
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: expected a device that torch can use, got {options.device}; this torch sees no GPU")
    reason = methods.unserved(options.backend, options.device)
    if reason:
        parser.error(reason)
    for name, least, values in (
        ("rank", 1, options.rank),
        ("rounds", 1, [options.rounds]),
        ("warm", 0, [options.warm]),
    ):
        if min(values) < least:
            parser.error(f"--{name}: expected at least {least}, got {min(values)}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    env = harness.environment(options.device, DTYPES[options.dtype])
    print(harness.header(env), flush=True)
    rows: list[Measurement] = []
    failures: list[str] = []
    for shape in options.shapes:
        for rank in options.rank:
            for order in options.order:
                steppers = measure(options, shape, rank, order)
                case = f"{shape} ({len(shapes.layers(shape))} pairs) r={rank} {order}"
                rows += measurements(steppers, case, order == "turns")
                failures += [f"{methods.LABELS[s.name]}, {case}: failed at {s.failure}" for s in steppers if s.failure]
    path = options.out / f"optimizer_step_{options.device.type}.csv"
    harness.write_csv(path, rows, env)
    print(report(rows, failures))
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
