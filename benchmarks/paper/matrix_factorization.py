"""Figure 2: low-rank matrix factorisation by gradient descent: `python -m benchmarks.paper.matrix_factorization`.

`min ||B A - M||_F^2 / 2` for a Gaussian M cut to rank r (section 4.1, Appendix D.3). A starts Gaussian and B at zero;
the first step is plain gradient descent for all, then each goes its way. LoRA, ScaledGD, RefLoRA and RefLoRA-S at two
learning rates; and, for LoRA and RefLoRA, the norms of factors and gradients. Float64; the refactoring is reflora's.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import reflora

from .. import drawing, harness
from ..baselines import preclora

METHODS = ("LoRA", "ScaledGD", "RefLoRA", "RefLoRA-S")
RATES = (0.01, 0.03)
COLOURS = {"LoRA": "#8c8c8c", "ScaledGD": "#D55E00", "RefLoRA": "#0072B2", "RefLoRA-S": "#56B4E9"}
COLUMNS = ("method", "lr", "step", "loss", "norm A", "norm B", "norm gA", "norm gB")
Move = Callable[[Tensor, Tensor, Tensor, float], None]


@dataclass(frozen=True)
class Problem:
    """M `[m, n]` of rank r, and where A `[r, n]` starts."""

    M: Tensor
    A: Tensor

    @classmethod
    def draw(cls, m: int, n: int, r: int, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        full = torch.randn(m, n, generator=generator, dtype=torch.float64)
        U, values, Vh = torch.linalg.svd(full, full_matrices=False)
        return cls((U[:, :r] * values[:r]) @ Vh[:r], torch.randn(r, n, generator=generator, dtype=torch.float64))


def _descend(A: Tensor, B: Tensor, error: Tensor, lr: float) -> None:
    gA, gB = B.T @ error, error @ A.T
    A.sub_(gA, alpha=lr)
    B.sub_(gB, alpha=lr)


def _scaled(A: Tensor, B: Tensor, error: Tensor, lr: float) -> None:
    A.grad, B.grad = B.T @ error, error @ A.T
    preclora.precondition_([(A, B)], damping=0.0)
    A.sub_(A.grad, alpha=lr)
    B.sub_(B.grad, alpha=lr)


def _refactored(A: Tensor, B: Tensor, error: Tensor, lr: float, scalar: bool = False) -> None:
    """A step from the balanced pair of the same product."""
    reflora.refactor_([(A, B)], scalar=scalar)
    _descend(A, B, error, lr)


MOVES: dict[str, Move] = {
    "LoRA": _descend,
    "ScaledGD": _scaled,
    "RefLoRA": _refactored,
    "RefLoRA-S": functools.partial(_refactored, scalar=True),
}


@torch.no_grad()
def run(problem: Problem, method: str, lr: float, steps: int) -> list[list[object]]:
    """Rows of COLUMNS: the state before each step, and after the last. Ends where the loss passes 1e12."""
    A, M = problem.A.clone(), problem.M
    B = torch.zeros(M.shape[0], A.shape[0], dtype=M.dtype)
    rows: list[list[object]] = []
    for step in range(steps + 1):
        error = B @ A - M
        loss = 0.5 * float(error.square().sum())
        norms = [float(torch.linalg.norm(tensor)) for tensor in (A, B, B.T @ error, error @ A.T)]
        rows.append([method, lr, step, loss, *norms])
        if loss > 1e12:
            break
        (_descend if step == 0 else MOVES[method])(A, B, error, lr)
    return rows


# ---- output


def draw(path: Path, rows: Sequence[Sequence[object]], env: dict[str, str]) -> bool:
    """Loss against steps, and the norms of LoRA's and RefLoRA's factors and gradients, as PNG and SVG."""
    pyplot = drawing.pyplot()
    if pyplot is None:
        return False
    with pyplot.rc_context(drawing.STYLE):
        figure, (left, *rest) = pyplot.subplots(1, 3, figsize=(7.4, 2.6))
        for method in METHODS:
            for lr, dash in zip(RATES, ("-", "--")):
                own = [row for row in rows if row[0] == method and row[1] == lr]
                label = f"{method}, lr {lr:g}"
                left.plot(
                    [row[2] for row in own], [row[3] for row in own], dash, color=COLOURS[method], label=label, lw=1.1
                )
        left.set(yscale="log", xlabel="step", ylabel="loss", ylim=(1e-10, 1e6))
        for axis, method in zip(rest, ("LoRA", "RefLoRA")):
            own = [row for row in rows if row[0] == method and row[1] == RATES[0]]
            for column, dash, colour in zip(range(4, 8), ("-", "-", ":", ":"), 2 * ("#0072B2", "#D55E00")):
                axis.plot([row[2] for row in own], [row[column] for row in own], dash, color=colour, lw=1.1)
            axis.set(title=f"{method}, lr {RATES[0]:g}", xlabel="step", yscale="log")
        names = ("‖A‖", "‖B‖", "‖∇A‖", "‖∇B‖")
        rest[1].legend(rest[1].get_lines(), names, frameon=False, fontsize=6.5, loc="lower left")
        for axis in (left, *rest):
            axis.grid(**drawing.GRID)
            axis.set_title(axis.get_title(), fontsize=7.5)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=6.5, handlelength=2.2)
        figure.tight_layout(rect=drawing.room(figure, env, 2))
        for suffix in (".png", ".svg"):
            drawing.save(pyplot, figure, path.with_suffix(suffix))
    return True


def main(argv: Sequence[str] | None = None) -> None:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.matrix_factorization", description=summary)
    parser.add_argument("--size", nargs=3, type=int, default=[128, 100, 10], metavar=("M", "N", "R"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/paper"))
    options = parser.parse_args(argv)
    if min(*options.size, options.steps) < 1 or options.size[2] > min(options.size[:2]):
        got = f"{options.size} and {options.steps}"
        parser.error(f"--size, --steps: expected positive numbers and R at most M and N, got {got}")
    harness.make_folder(parser, options.out, options.out)
    problem = Problem.draw(*options.size, options.seed)
    rows = [row for method in METHODS for lr in RATES for row in run(problem, method, lr, options.steps)]
    env = harness.environment(torch.device("cpu"), torch.float64)
    path = options.out / "matrix_factorization.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
    drawn = draw(path, rows, env)
    print(f"wrote {path}" + (" and its figure, PNG and SVG" if drawn else "; no figure without matplotlib"))


if __name__ == "__main__":
    main()
