"""Batched torch operations, grouped by shape: serves any device, with no kernels of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import columns as col
from ..columns import A_SIDE, B_SIDE, REFACTORED, SKIPPED
from ..constants import START_STEPS
from ..plan import Plan
from . import AdamWStep, InvariantStep, torch_adamw, torch_invariant
from .torch_groups import SIDES, chosen, groups, record, reported, results_of, shrink_weight, skip
from .torch_linalg import eigh, geometric_mean, inv_root, polar, sqrtm, svd
from .torch_solve import fits, gram_of_sums
from .torch_solve import solve as solve_grams

NAME = "torch"
__all__ = ["eigh", "geometric_mean", "inv_root", "polar", "sqrtm", "svd"]


def unavailable(device: torch.device) -> str | None:
    return None


def refactor(plan: Plan, scalar: bool, precision: str, rows: Sequence[int] | None = None) -> Tensor:
    """A <- P^T A, B <- B P^-T (sqrt(s) A and B / sqrt(s) where scalar)."""
    results = results_of(plan)
    for group in groups(plan, rows):
        a, b = group.grams(precision)
        solution = group.solve(a, b, precision, scalar)
        if not scalar:
            solution = solution._replace(status=solution.status.where(fits(a, b, group.dtype), SKIPPED))
        done = solution.status == REFACTORED if scalar else solution.status < SKIPPED
        group.write(A_SIDE, col.P, solution.P.mT @ group.stack(A_SIDE, col.P).double(), done)
        group.write(B_SIDE, col.P, solution.P_inv_T.mT @ group.stack(B_SIDE, col.P).double(), done)
        record(results, group, a, b, solution)
    return chosen(results, rows)


def precondition(plan: Plan, scalar: bool, precision: str, start: int = 0, rows: Sequence[int] | None = None) -> Tensor:
    """gA <- S^-1 gA, gB <- gB S."""
    results = results_of(plan)
    for group in groups(plan, rows):
        a, b = group.grams(precision)
        gA, gB = (group.stack(side, col.G).to(group.apply) for side in SIDES)
        solution = skip(group.solve(a, b, precision, scalar, group.shrink_weight(start)), gA, gB)
        done = solution.status < SKIPPED
        group.write(A_SIDE, col.G, solution.S_inv @ gA, done)
        group.write(B_SIDE, col.G, solution.S @ gB, done)
        record(results, group, a, b, solution)
    return chosen(results, rows)


def solve(plan: Plan, precision: str, start: int = 0, rows: Sequence[int] | None = None) -> Tensor:
    """Write S and S^-1 to where SAVED points, I where a row is skipped."""
    results = results_of(plan)
    for group in groups(plan, rows):
        a, b = group.grams(precision)
        solution = group.solve(a, b, precision, False, group.shrink_weight(start))
        both = torch.stack([solution.S, solution.S_inv], 1).to(group.apply)
        done = (solution.status < SKIPPED).view(-1, 1, 1, 1)
        torch._foreach_copy_(group.once(col.SAVED), list(both.where(done, group.eye.to(both)).unbind()))
        record(results, group, a, b, solution)
    return chosen(results, rows)


def means(
    grams: tuple[Tensor, Tensor], n: tuple[Tensor, Tensor], precision: str, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S and S^-1 from Grams summed elsewhere; I where they are not finite."""
    a, b = (gram_of_sums(G, side, getattr(torch, precision)) for G, side in zip(grams, n))
    weight = None if counts is None else shrink_weight(counts, START_STEPS)
    solution = solve_grams(a, b, torch.float64, precision, weight)
    both = torch.stack([solution.S, solution.S_inv], 1)
    eye = torch.eye(both.shape[-1], dtype=both.dtype, device=both.device)
    results = torch.full((len(both), col.RESULTS), torch.nan, dtype=torch.float64, device=both.device)
    results[:, : col.REPORTED] = reported(a, b, solution)
    return both.where((solution.status < SKIPPED).view(-1, 1, 1, 1), eye), results


def adamw(plan: Plan, step: AdamWStep, rows: Sequence[int] | None = None) -> Tensor:
    """One RefLoRA AdamW step; see AdamWStep."""
    return torch_adamw.adamw(plan, step, rows)


def invariant(plan: Plan, step: InvariantStep, rows: Sequence[int] | None = None) -> Tensor:
    """One step of InvariantAdamW; see InvariantStep."""
    return torch_invariant.invariant(plan, step, rows)
