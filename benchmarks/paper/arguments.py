"""The options that every program of the paper's trainings has, and what is wrong with them, in one line each."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import harness, jsonl, methods


def parser(program: str, summary: str, chosen: Sequence[str]) -> argparse.ArgumentParser:
    """`chosen`: the methods where none are given."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.paper.{program}", description=summary)
    made.add_argument("--data", help="a folder with one folder a task, or hub")
    made.add_argument("--model", default="minilm", help="a known name, a hub id or a folder")
    made.add_argument("--methods", nargs="+", default=list(chosen), choices=list(methods.METHODS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--steps", type=int, help="in place of the paper's epochs")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--length", type=int, help="most tokens of a text")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=int, default=8)
    made.add_argument("--plain-steps", type=int, help="AdamW steps before RefLoRA starts (default: its own start)")
    made.add_argument("--train-rows", type=int, help="only so many training examples")
    made.add_argument("--eval-rows", type=int, help="only so many dev examples")
    made.add_argument("--bfloat16", action="store_true", help="forward and backward under bfloat16 autocast")
    made.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path, help="the file of runs")
    return made


def plain_steps(chosen: argparse.Namespace, method: str) -> int | None:
    """0 for a method that has no start of its own: its runs are the same whatever is asked of the others."""
    return chosen.plain_steps if methods.starts(method) else 0


def add_grid(made: argparse.ArgumentParser, rates: Sequence[float]) -> None:
    """The options of a program that tunes learning rates."""
    narrow = "tune on the first seed; the others only have each method's best learning rate"
    made.add_argument("--lrs", nargs="+", type=float, default=list(rates))
    made.add_argument("--tune-first-seed", action="store_true", help=narrow)
    made.add_argument("--table", action="store_true", help="make no run, print the table of those there are")


def parse_grid(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a program that tunes learning rates and keeps its runs in one file, checked."""
    options = made.parse_args(argv)
    check(made, options)
    check_rates(made, "--lrs", options.lrs)
    check_file(made, options.out)
    return options


def check(made: argparse.ArgumentParser, chosen: argparse.Namespace, counts: Sequence[str] = ()) -> None:
    """Leave with one clear line where a common option is bad; `counts`: more of them that are 1 or more."""
    device = harness.pick_device(made, chosen.device)
    reason = methods.unserved(chosen.backend, device) or methods.missing(chosen.methods)
    if reason:
        made.error(reason)
    for name in ("steps", "batch", "rank", "alpha", "length", "train_rows", "eval_rows", *counts):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            made.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if (chosen.plain_steps or 0) < 0:
        made.error(f"--plain-steps: expected at least 0, got {chosen.plain_steps}")


def environment(chosen: argparse.Namespace) -> dict[str, str]:
    """harness.environment of these options."""
    env = harness.environment(torch.device(chosen.device), torch.float32)
    return {**env, "dtype": "float32, autocast to bfloat16"} if chosen.bfloat16 else env


def check_file(made: argparse.ArgumentParser, out: Path) -> None:
    if out.is_dir():
        made.error(f"--out: expected a file of JSON lines, got the folder {out}")
    if jsonl.other_content(out):
        made.error(f"--out: expected a file of JSON lines, or none yet, got {out}")
    harness.make_folder(made, out.parent, out)


def check_rates(made: argparse.ArgumentParser, option: str, given: Sequence[float]) -> None:
    for lr in given:
        if not 0 < lr < math.inf:
            made.error(f"{option}: expected positive numbers, got {lr}")
