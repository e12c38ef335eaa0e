"""Batched torch operations, grouped by shape: serves any device, with no kernels of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import plan as col
from ..contract import REFACTORED, SKIPPED
from ..plan import A_SIDE, B_SIDE, Plan
from . import AdamWStep, torch_adamw
from .torch_groups import SIDES, chosen, groups, record, results_of, skip
from .torch_solve import polar_factor

NAME = "torch"


def unavailable(device: torch.device) -> str | None:
    return None


def refactor(plan: Plan, scalar: bool, precision: str, rows: Sequence[int] | None = None) -> Tensor:
    """A <- P^T A, B <- B P^-T (sqrt(s) A and B / sqrt(s) where scalar)."""
    results = results_of(plan)
    for group in groups(plan, rows):
        a, b = group.grams(precision)
        solution = group.solve(a, b, precision, scalar)
        done = solution.status < SKIPPED
        if scalar:
            done &= solution.status == REFACTORED
            root = solution.scale.sqrt().view(-1, 1, 1)
            left, right = root * group.eye, group.eye / root
        else:
            left, right = solution.P.mT, solution.P_inv_T.mT
        group.write(A_SIDE, col.P, left @ group.stack(A_SIDE, col.P).double(), done)
        group.write(B_SIDE, col.P, right @ group.stack(B_SIDE, col.P).double(), done)
        record(results, group, a, b, solution)
    return chosen(results, rows)


def precondition(plan: Plan, scalar: bool, precision: str, rows: Sequence[int] | None = None) -> Tensor:
    """gA <- S^-1 gA, gB <- gB S."""
    results = results_of(plan)
    for group in groups(plan, rows):
        a, b = group.grams(precision)
        gA, gB = (group.stack(side, col.G).to(group.apply) for side in SIDES)
        solution = skip(group.solve(a, b, precision, scalar), gA, gB)
        done = solution.status < SKIPPED
        group.write(A_SIDE, col.G, solution.S_inv @ gA, done)
        group.write(B_SIDE, col.G, solution.S @ gB, done)
        record(results, group, a, b, solution)
    return chosen(results, rows)


def adamw(plan: Plan, step: AdamWStep, rows: Sequence[int] | None = None) -> Tensor:
    """One RefLoRA AdamW step; see AdamWStep."""
    return torch_adamw.adamw(plan, step, rows)


def polar(X: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """`X = Q H` by the singular value decomposition, which is safe for singular X."""
    usable = X.isfinite().all(-1).all(-1).view(-1, 1, 1)
    U, s, Vh = torch.linalg.svd(X.double().where(usable, torch.eye(X.shape[1], dtype=torch.float64, device=X.device)))
    Q, H = U @ Vh, (Vh.mT * s.unsqueeze(1)) @ Vh
    H = (H + H.mT) / 2
    nan = torch.full_like(Q, torch.nan)
    return Q.where(usable, nan).to(X.dtype), H.where(usable, nan).to(X.dtype)


def geometric_mean(X: Tensor, Y: Tensor, precision: str) -> Tensor:
    """`X # Y = Lx Q^T Ly^T` with `Ly^T Lx^-T = Q H`; NaN where X or Y is not positive definite."""
    Lx, Lx_inv = _cholesky(X, precision)
    Ly, Ly_inv = _cholesky(Y, precision)
    Q = polar_factor(Ly.mT @ Lx_inv.mT, Ly_inv @ Lx)
    mean = Lx @ Q.mT @ Ly.mT
    return ((mean + mean.mT) / 2).to(X.dtype)


def sqrtm(X: Tensor, precision: str, inverse: bool) -> Tensor:
    """`X^(1/2) = Q^T L^T`, or `X^(-1/2) = L^-T Q`, with `L^T = Q H`; NaN where X is not positive definite."""
    L, L_inv = _cholesky(X, precision)
    Q = polar_factor(L.mT, L_inv)
    root = L_inv.mT @ Q if inverse else Q.mT @ L.mT
    return ((root + root.mT) / 2).to(X.dtype)


def _cholesky(X: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    X = X.to(getattr(torch, precision))
    L, broke = torch.linalg.cholesky_ex((X + X.mT) / 2)
    L = L.where((broke == 0).view(-1, 1, 1), torch.nan)
    eye = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    return L, torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
