"""A small least-squares problem of three LoRA pairs that draws the same numbers under every version of torch."""

from __future__ import annotations

import random

import torch
from torch import Tensor

RANK, SCALING, STEPS = 3, 2.0, 10
SHAPES = ((11, 8), (5, 9), (7, 7))  # (n_out, n_in)
Pair = tuple[Tensor, Tensor]


def draw(source: random.Random, rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
    values = [scale * source.gauss(0.0, 1.0) for _ in range(rows * columns)]
    return torch.tensor(values, dtype=torch.float64).reshape(rows, columns).to(dtype)


def pairs_and_targets(dtype: torch.dtype, start: str) -> tuple[list[Pair], list[Tensor]]:
    """Pairs that require gradients, and the W that `SCALING * B @ A` should become. start: "full", or "zero": B = 0."""
    source = random.Random(7)
    pairs, targets = [], []
    for n_out, n_in in SHAPES:
        A, B = draw(source, RANK, n_in, 0.5, dtype), draw(source, n_out, RANK, 0.5, dtype)
        targets.append(draw(source, n_out, n_in, 1.0, dtype))
        pairs.append((A.requires_grad_(), (0 * B if start == "zero" else B).requires_grad_()))
    return pairs, targets


def set_gradients(pairs: list[Pair], targets: list[Tensor]) -> None:
    """Those of `0.02 sum ||SCALING B A - W||_F^2 / 2`."""
    for (A, B), target in zip(pairs, targets):
        error = 0.02 * (SCALING * B.detach() @ A.detach() - target)
        A.grad, B.grad = SCALING * B.detach().T @ error, SCALING * error @ A.detach().T
