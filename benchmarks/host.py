"""Host time of a step alone, against fused AdamW's: check, refresh of the tables and dispatch, by number of pairs.

Factors of one number each, on the CPU: what is left of a step is the host's own. "with backend" is the whole step,
"host" the same with the backend's call taken out; torch's fused AdamW is timed over the same parameters. Methods in
turns, medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reflora
from reflora.optim.adamw_engine import AdamWEngine

from . import harness

NAME = "host"
PAIRS = (72, 224, 448)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", nargs="+", type=int, default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--warm", type=int, default=20, help="rounds before them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the CSV")


class _Idle:
    """A backend that returns the last results."""

    NAME = "idle"

    def __init__(self, results: Any):
        self.results = results

    def adamw(self, *_: Any) -> Any:
        return self.results


@contextmanager
def without_backend(engines: list[AdamWEngine]) -> Iterator[None]:
    kept = [engine.backend for engine in engines]
    for engine in engines:
        engine.backend = _Idle(engine.results)  # type: ignore[assignment]
    try:
        yield
    finally:
        for engine, backend in zip(engines, kept):
            engine.backend = backend


def cases(pairs: int) -> dict[str, Callable[[], object]]:
    """By name: one step."""
    factors = [nn.Parameter(torch.randn(1, 1)) for _ in range(2 * pairs)]
    others = [nn.Parameter(factor.detach().clone()) for factor in factors]
    for parameter in factors + others:
        parameter.grad = torch.randn_like(parameter)
    ours = reflora.RefLoRAAdamW(list(zip(factors[::2], factors[1::2])), backend="torch")
    theirs = torch.optim.AdamW(others, fused=True)
    ours.step()  # makes the engines

    def host() -> None:
        with without_backend(ours._engines.made):
            ours.step()

    fused = reflora.RefLoRAAdamW(list(zip(factors[::2], factors[1::2])))
    return {"RefLoRA, host": host, "RefLoRA, with backend": fused.step, "AdamW fused": theirs.step}


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`python -m benchmarks.kernels host`."""
    for name in ("rounds", "warm"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if min(options.pairs) < 1:
        parser.error(f"--pairs: expected at least 1, got {min(options.pairs)}")
    harness.make_folder(parser, options.out, options.out)
    env = harness.environment(torch.device("cpu"), torch.float32)
    print(harness.header(env), flush=True)
    rows, lines = [], []
    for pairs in options.pairs:
        seconds: dict[str, list[float]] = {}

        def timed(name: str, step: Callable[[], object], found: dict[str, list[float]]) -> Callable[[int], None]:
            def once(round_: int) -> None:
                with harness.Stopwatch(torch.device("cpu")) as watch:
                    step()
                if round_ >= options.warm:
                    found.setdefault(name, []).append(watch.seconds)

            return once

        turns = {name: timed(name, step, seconds) for name, step in cases(pairs).items()}
        harness.interleave(turns, options.warm + options.rounds, f"{pairs} pairs")
        for name, samples in seconds.items():
            summary = harness.summarize([1e3 * sample for sample in samples])
            rows.append(harness.Measurement(NAME, f"{pairs} pairs", name, "step", "ms", summary))
            lines.append([f"{pairs} pairs", name, f"{summary.p50:.3f}", f"{summary.p20:.3f}", f"{summary.p80:.3f}"])
    path = options.out / f"{NAME}_cpu.csv"
    harness.write_csv(path, rows, env)
    print(harness.table(["case", "method", "ms", "p20", "p80"], lines))
    print(f"wrote {path}")
