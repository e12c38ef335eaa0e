"""Figure 1: loss after a step and its two bounds against the learning rate: `python -m benchmarks.paper.landscape`.

Linear regression (Appendix D.2), `||Y - W X||_F^2 / 2` with Gaussian data and `W = B A`: its smoothness L, the largest
eigenvalue of `X X^T`, is known, so both bounds are. LoRA takes S = I; RefLoRA the S of Theorem 3, either with its
branch for small learning rates, which needs L, or balanced always, as in practice. Float64.

With `P = B S^-1 B^T`, `Q = A^T S A`, `x = tr P + tr Q`, `t = 1 / (L lr)` and G the gradient of W, a step moves W by
`D = -lr (P G + G Q) + lr^2 gB gA`, and

- quadratic bound (6): `loss + <G, D> + L |D|^2 / 2`;
- alternative bound (7), whose minimum over S is Theorem 3's: `loss - |G|^2 / 2L + L lr^2 |G|^2 (x - t)^2 / 2`, without
  its term of higher order. The eigenvalues of `D -> P D + D Q` lie between 0 and x, hence what is proved is this with
  `max(x - t, t)` for `x - t`: the same for `x >= 2 t`, the loss before the step below.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reflora import reference

from .. import drawing, harness

METHODS = ("LoRA", "RefLoRA, L known", "RefLoRA, balanced")
COLOURS = {"LoRA": "#8c8c8c", "RefLoRA, L known": "#0072B2", "RefLoRA, balanced": "#0072B2"}
CURVES = {"loss": "-", "quadratic": "--", "alternative": ":"}


@dataclass(frozen=True)
class Regression:
    """X `[n, rows]`, Y `[m, rows]`; the factors A `[r, n]` and B `[m, r]` before the step."""

    X: Tensor
    Y: Tensor
    A: Tensor
    B: Tensor

    @classmethod
    def draw(cls, m: int, n: int, r: int, rows: int, seed: int, imbalance: float) -> Regression:
        """Standard normal data and B; A has standard deviation `imbalance`, as LoRA's factors early in a run."""
        generator = torch.Generator().manual_seed(seed)
        X, Y, A, B = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((n, rows), (m, rows), (r, n), (m, r))
        )
        return cls(X, Y, imbalance * A, B)

    def loss(self, W: Tensor) -> float:
        return 0.5 * float((self.Y - W @ self.X).square().sum())

    @property
    def gradient(self) -> Tensor:
        return (self.B @ self.A @ self.X - self.Y) @ self.X.T

    @property
    def smoothness(self) -> float:
        return float(torch.linalg.matrix_norm(self.X, 2) ** 2)


class Row(NamedTuple):
    """The loss after one step and its bounds."""

    method: str
    lr: float
    loss: float
    quadratic: float
    alternative: float
    proved: float


def choose(problem: Regression, method: str, lr: float) -> Tensor:
    """S `[r, r]` of Theorem 3. With L known and `2 |B A|_* < t`, the smaller of the two scales that reach zero."""
    if method == "LoRA":
        return torch.eye(problem.A.shape[0], dtype=torch.float64)
    if method == "RefLoRA, balanced":
        return reference.refactoring(problem.A, problem.B).S
    S = reference.known_smoothness(problem.A, problem.B, problem.smoothness, lr, upper=False)
    assert S is not None  # B A is not 0
    return S


def step(problem: Regression, method: str, lr: float) -> Row:
    """One step of gradient descent from the refactored pair."""
    A, B, G, L = problem.A, problem.B, problem.gradient, problem.smoothness
    S = choose(problem, method, lr)
    S_inv = torch.linalg.inv(S)
    gA, gB = B.T @ G, G @ A.T
    D = (B - lr * gB @ S) @ (A - lr * S_inv @ gA) - B @ A
    before, size = problem.loss(B @ A), float(G.square().sum())
    quadratic = before + float((G * D).sum()) + 0.5 * L * float(D.square().sum())
    x, t = float((S * (A @ A.T)).sum() + (S_inv * (B.T @ B)).sum()), 1 / (L * lr)
    floor, weight = before - size / (2 * L), 0.5 * L * lr**2 * size
    # gB gA does not depend on S; it enters what is proved by the triangle inequality
    higher = lr * float((gB @ gA).norm()) / size**0.5
    alternative, proved = (floor + weight * factor**2 for factor in (x - t, max(x - t, t) + higher))
    return Row(method, lr, problem.loss(B @ A + D), quadratic, alternative, proved)


def unit(problem: Regression) -> float:
    """1 / (L |B A|_*): half of it is where the branches of Theorem 3 meet, whichever scale the data have."""
    return 1 / (problem.smoothness * float(torch.linalg.matrix_norm(problem.B @ problem.A, "nuc")))


# ---- output


def draw(path: Path, found: Sequence[Row], before: float, unit: float, env: dict[str, str]) -> bool:
    """Loss and bounds of LoRA and RefLoRA: with the branch that needs L, and without it. PNG and SVG.

    before: the loss before the step; unit: the learning rate that is 1 on the axis.
    """
    pyplot = drawing.pyplot()
    if pyplot is None:
        return False
    with pyplot.rc_context(drawing.STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(6.6, 2.9), sharey=True)
        for axis, refactored, title in zip(axes, METHODS[1:], ("(a) L known", "(b) balanced always")):
            for method in ("LoRA", refactored):
                own = [row for row in found if row.method == method]
                for name, dash in CURVES.items():
                    values = [getattr(row, name) / before for row in own]
                    label = f"{method.partition(',')[0]}: {name}{' bound' * (name != 'loss')}"
                    axis.plot([row.lr / unit for row in own], values, dash, color=COLOURS[method], lw=1.2, label=label)
            axis.axhline(1.0, color="#999999", lw=0.6, zorder=0)
            axis.set(xlabel="learning rate · L |BA|$_*$", xlim=(0, None), ylim=(0, 1.5))
            axis.set_title(title, fontsize=8, loc="left")
            axis.grid(**drawing.GRID)
        axes[0].set_ylabel("loss after the step / before")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=2, frameon=False, fontsize=7, handlelength=2.4)
        figure.tight_layout(rect=drawing.room(figure, env, 3))
        for suffix in (".png", ".svg"):
            drawing.save(pyplot, figure, path.with_suffix(suffix))
    return True


def main(argv: Sequence[str] | None = None) -> None:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.landscape", description=summary)
    parser.add_argument("--size", nargs=4, type=int, default=[20, 16, 4, 40], metavar=("M", "N", "R", "ROWS"))
    parser.add_argument("--imbalance", type=float, default=4.0, help="standard deviation of A over that of B")
    parser.add_argument("--largest", type=float, default=6.0, help="learning rate, in units of 1 / (L |B A|_*)")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/paper"))
    options = parser.parse_args(argv)
    m, n, r, _ = options.size
    if min(*options.size, options.points) < 1 or r > min(m, n):
        parser.error(f"--size, --points: expected positive numbers and R at most M and N, got {options.size}")
    if not all(0 < value < math.inf for value in (options.imbalance, options.largest)):
        parser.error(f"--imbalance, --largest: expected positive numbers, got {options.imbalance}, {options.largest}")
    harness.make_folder(parser, options.out, options.out)
    problem = Regression.draw(*options.size, options.seed, options.imbalance)
    scale = unit(problem)
    rates = [scale * options.largest * (index + 1) / options.points for index in range(options.points)]
    found = [step(problem, method, lr) for method in METHODS for lr in rates]
    path = options.out / "landscape.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([Row._fields, *found])
    env = harness.environment(torch.device("cpu"), torch.float64)
    before = problem.loss(problem.B @ problem.A)
    drawn = draw(path, found, before, scale, env)
    for method in METHODS:
        least, lr = min((row.loss, row.lr) for row in found if row.method == method)
        rate = f"{lr / scale:.2f} / (L |BA|_*)"
        print(f"{method:18} least loss {least / before:.3f} of that before, at learning rate {rate}")
    print(f"wrote {path}" + (" and its figure, PNG and SVG" if drawn else "; no figure without matplotlib"))


if __name__ == "__main__":
    main()
