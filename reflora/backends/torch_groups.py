"""Rows of a plan that one batched torch operation can serve: stacks of what they point at, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .. import columns as col
from ..columns import A_SIDE, B_SIDE, PLAIN, SKIPPED
from ..plan import Plan
from .torch_frames import Frames
from .torch_solve import Gram, Solution, balance, gram, solve

SIDES = (A_SIDE, B_SIDE)


@dataclass(frozen=True)
class Batch:
    """Rows of one shape, dtype, state dtype and group of hyperparameters.

    Stacks are `[b, r, n]` copies; `views` are where they go back to. hypers: rows of the hyperparameter table that A
    and B use. master: whether there are float32 master weights.
    """

    plan: Plan
    rows: list[int]
    hypers: tuple[int, int]
    master: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.plan.rows[self.rows[0]].A.dtype

    @property
    def apply(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def eye(self) -> Tensor:
        return torch.eye(self.plan.rows[self.rows[0]].A.shape[0], dtype=torch.float64, device=self.plan.device)

    def column(self, column: int) -> list[int]:
        """Entries of the table itself."""
        entries = self.plan.table[:, column].tolist()
        return [entries[number] for number in self.rows]

    def views(self, side: int, column: int) -> list[Tensor]:
        """What a column points at in these rows, as `[r, n]` views."""
        found = []
        for number in self.rows:
            row = self.plan.rows[number]
            pair = self.plan.pairs[row.pair]
            if column == col.P:
                found.append(row.B.mT if side == B_SIDE else row.A)
                continue
            tensor = self.plan.tensors[side + column][row.pair].detach()
            views = pair.views_B(tensor) if side == B_SIDE else pair.views_A(tensor)
            found.append(views[row.expert].mT if side == B_SIDE else views[row.expert])
        return found

    def stack(self, side: int, column: int) -> Tensor:
        return torch.stack(self.views(side, column))

    def once(self, column: int) -> list[Tensor]:
        """What a column with one entry per row points at."""
        tensors = [self.plan.pair_tensors[column][self.plan.rows[n].pair] for n in self.rows]
        return [t[self.plan.rows[n].expert] if t.dim() else t for n, t in zip(self.rows, tensors)]

    def write(self, side: int, column: int, values: Tensor, where: Tensor) -> None:
        """Rows with `where` take `values [b, r, n]`, saturated to the storage range; the others stay as they are."""
        views = self.views(side, column)
        old = torch.stack(views)
        new = saturated(values, torch.finfo(old.dtype).max).to(old.dtype).where(where.view(-1, 1, 1), old)
        torch._foreach_copy_(views, list(new.unbind(0)))

    def grams(self, precision: str) -> tuple[Gram, Gram]:
        """Grams of the factors as they are stored now."""
        compute = getattr(torch, precision)
        return gram(self.stack(A_SIDE, col.P), compute), gram(self.stack(B_SIDE, col.P), compute)

    def shrink_weight(self, start: int) -> Tensor | None:
        """`[b]` float64, for rows that have done COUNT steps (reference.shrink_weight); None for the paper's S."""
        if not start:
            return None
        return shrink_weight(torch.stack(self.once(col.COUNT)), start)

    def solve(self, a: Gram, b: Gram, precision: str, scalar: bool, weight: Tensor | None = None) -> Solution:
        """weight: of the Grams `[b]`, as in torch_solve.solve."""
        if scalar:
            return balance(a, b, self.dtype, self.apply)
        return solve(a, b, self.apply, precision, weight)


def groups(plan: Plan, rows: Sequence[int] | None) -> Iterator[Batch]:
    """The active ones among `rows` (None: among all)."""
    found: dict[tuple, list[int]] = {}
    table = plan.table.tolist()
    for number in range(len(plan.rows)) if rows is None else rows:
        row, entries = plan.rows[number], table[number]
        if entries[col.ACTIVE]:
            hypers, master = (entries[A_SIDE + col.HYPER], entries[B_SIDE + col.HYPER]), entries[A_SIDE + col.W] != 0
            key = (hypers, master, entries[col.STATE], row.A.shape, row.B.shape, row.A.dtype)
            found.setdefault(key, []).append(number)
    return (Batch(plan, numbers, key[0], key[1]) for key, numbers in found.items())


Found = TypeVar("Found", Solution, Frames)


def skip(solution: Found, *grads: Tensor) -> Found:
    """Skip rows with a gradient that is not finite."""
    finite = torch.stack([g.isfinite().all(2).all(1) for g in grads]).all(0)
    return solution._replace(status=solution.status.where(finite, SKIPPED))


def saturated(values: Tensor, limit: float) -> Tensor:
    """Clamp to the limit; NaN, from inf - inf inside a product, becomes 0."""
    return values.nan_to_num(0.0, limit, -limit).clamp(-limit, limit)


def results_of(plan: Plan) -> Tensor:
    results = torch.full((len(plan.rows), col.RESULTS), torch.nan, dtype=torch.float64, device=plan.device)
    results.select(1, col.STATUS).fill_(PLAIN)
    return results


def chosen(results: Tensor, rows: Sequence[int] | None) -> Tensor:
    """`results[rows]` without copying an index to the device."""
    return results if rows is None else torch.stack([results[number] for number in rows])


def record(results: Tensor, group: Batch, a: Gram, b: Gram, solution: Solution | Frames) -> None:
    values = reported(a, b, solution)
    torch._foreach_copy_([results[number, : col.REPORTED] for number in group.rows], list(values.unbind(0)))


def reported(a: Gram, b: Gram, solution: Solution | Frames) -> Tensor:
    """Columns of the result table, `[b, REPORTED]`."""
    kappas = (solution.kappa_A, solution.kappa_B)
    columns = (solution.status, *kappas, solution.balance, solution.scale, a.norm, b.norm)
    return torch.stack([c.double() for c in columns], 1)


def shrink_weight(counts: Tensor, start: int) -> Tensor:
    """Float64, for rows that have done so many steps (reference.shrink_weight)."""
    square = counts.double() ** 2
    return square / (square + start**2)
