"""Batched torch operations, grouped by shape: serves any device, with no kernels of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import plan as col
from ..contract import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from ..plan import A_SIDE, B_SIDE, Plan
from . import FRESH, IDENTITY, SAVED, AdamWStep
from .torch_solve import Gram, Solution, gram, newton_polar, solve

NAME = "torch"


def unavailable(device: torch.device) -> str | None:
    return None


@dataclass
class Group:
    """Rows of one shape and dtype. Stacks are `[b, r, n]` copies; `views` are where they go back to."""

    plan: Plan
    rows: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.plan.rows[self.rows[0]].A.dtype

    @property
    def apply(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def views(self, side: int, column: int) -> list[Tensor]:
        """What a column of these rows points at, as `[r, n]` views."""
        found = []
        for number in self.rows:
            row = self.plan.rows[number]
            pair = self.plan.pairs[row.pair]
            if column == col.P:
                found.append(row.B.mT if side == B_SIDE else row.A)
                continue
            tensor = self.plan.tensors[side + column][row.pair]
            views = pair.views_B(tensor) if side == B_SIDE else pair.views_A(tensor)
            found.append(views[row.expert].mT if side == B_SIDE else views[row.expert])
        return found

    def stack(self, side: int, column: int) -> Tensor:
        return torch.stack([view.detach() for view in self.views(side, column)])

    def once(self, column: int) -> list[Tensor]:
        """What a column with one entry a row points at."""
        tensors = [self.plan.pair_tensors[column][self.plan.rows[n].pair] for n in self.rows]
        return [t[self.plan.rows[n].expert] if t.dim() else t for n, t in zip(self.rows, tensors)]

    def write(self, side: int, column: int, values: Tensor, where: Tensor) -> None:
        """Rows with `where` take `values [b, r, n]`, saturated to the storage range; the others stay as they are."""
        views = self.views(side, column)
        top = torch.finfo(self.dtype).max
        old = torch.stack([view.detach() for view in views])
        new = values.nan_to_num(0.0, top, -top).clamp(-top, top).to(self.dtype).where(where.view(-1, 1, 1), old)
        torch._foreach_copy_([view.detach() for view in views], list(new.unbind(0)))


def refactor(plan: Plan, scalar: bool, precision: str, rows: Sequence[int] | None = None) -> Tensor:
    """A <- P^T A, B <- B P^-T (sqrt(s) A and B / sqrt(s) where scalar)."""
    results = _results(plan)
    for group in _groups(plan, rows):
        a, b, solution = _solve(group, precision, scalar)
        done = solution.status < SKIPPED
        if scalar:
            done &= solution.status == REFACTORED
            root = solution.scale.sqrt().view(-1, 1, 1)
            left, right = root * _eye(group), _eye(group) / root
        else:
            left, right = solution.P.mT, solution.P_inv_T.mT
        group.write(A_SIDE, col.P, left @ group.stack(A_SIDE, col.P).double(), done)
        group.write(B_SIDE, col.P, right @ group.stack(B_SIDE, col.P).double(), done)
        _record(results, group, a, b, solution)
    return results if rows is None else results[list(rows)]


def precondition(plan: Plan, scalar: bool, precision: str, rows: Sequence[int] | None = None) -> Tensor:
    """gA <- S^-1 gA, gB <- gB S."""
    results = _results(plan)
    for group in _groups(plan, rows):
        a, b, solution = _solve(group, precision, scalar)
        gA, gB = (group.stack(side, col.G).to(group.apply) for side in (A_SIDE, B_SIDE))
        solution = _skip(solution, gA, gB)
        done = solution.status < SKIPPED
        group.write(A_SIDE, col.G, solution.S_inv @ gA, done)
        group.write(B_SIDE, col.G, solution.S @ gB, done)
        _record(results, group, a, b, solution)
    return results if rows is None else results[list(rows)]


def adamw(plan: Plan, step: AdamWStep, rows: Sequence[int] | None = None) -> Tensor:
    """One RefLoRA AdamW step; see AdamWStep."""
    results = _results(plan)
    for group in _groups(plan, rows):
        _AdamW(group, step).run(results)
    return results if rows is None else results[list(rows)]


class _AdamW:
    """One group's step. Sides are lists `[A, B]`; moments in units of S move by `[1 / c, c]`."""

    def __init__(self, group: Group, step: AdamWStep):
        self.group, self.step = group, step
        self.device = group.plan.device
        self.amsgrad = bool(step.hypers[:, col.AMSGRAD].any())

    def run(self, results: Tensor) -> None:
        group, step = self.group, self.step
        scalar = step.scalar_before or step.scalar_after
        a, b, solution = _solve(group, step.precision, scalar)
        grads = [self._gradient(side) for side in (A_SIDE, B_SIDE)]
        solution = _skip(solution, *grads)
        self.done = solution.status < SKIPPED
        if step.found_inf is not None:
            self.done &= step.found_inf.to(self.device) == 0
        self.P, self.M, self.V = (
            [group.stack(side, c).to(group.apply) for side in (A_SIDE, B_SIDE)] for c in (col.P, col.M, col.V)
        )
        self.X = [group.stack(side, col.X).to(group.apply) for side in (A_SIDE, B_SIDE)] if self.amsgrad else []
        if scalar:
            if step.scalar_before:
                grads = self._scalar_refactor(solution, grads)
        else:
            grads = self._precondition(solution, grads)
        self._update(grads)
        if step.scalar_after:
            _, _, after = _solve_stacks(self.P[0], self.P[1], group, step.precision, True)
            self._scalar_refactor(after, grads)
        self._store()
        _record(results, group, a, b, solution if scalar else self._reported(solution))

    def _reported(self, solution: Solution) -> Solution:
        """What is not of this step's making is not reported: S of a warm-up (PLAIN) or of an earlier step."""
        other = torch.full_like(solution.status, PLAIN if self.step.source == IDENTITY else REFACTORED)
        keep = self.fresh | (solution.status == SKIPPED)
        balance = solution.balance.where(self.fresh, torch.nan)
        return solution._replace(status=solution.status.where(keep, other), balance=balance)

    def _gradient(self, side: int) -> Tensor:
        g = self.group.stack(side, col.G).to(self.group.apply)
        if self.step.grad_scale is not None:
            g = g / self.step.grad_scale.to(self.device)
        maximize = self._hyper(side, col.MAXIMIZE)
        return torch.where(maximize != 0, -g, g)

    def _hyper(self, side: int, column: int) -> Tensor:
        index = self.group.plan.table[self.group.rows, side + col.HYPER]
        return self.step.hypers[index, column].to(self.device, non_blocking=True).view(-1, 1, 1)

    def _precondition(self, solution: Solution, grads: list[Tensor]) -> list[Tensor]:
        """S of this step applied to the gradients; moments moved where S stops or starts being I."""
        source, phases = self.step.source, torch.stack(self.group.once(col.PHASE))
        due = self.done if source == FRESH else torch.zeros_like(self.done)
        if source == SAVED:  # zeros: a layer has had no S yet, so it is due now
            saved = torch.stack(self.group.once(col.SAVED))
            due = self.done & (saved[:, 0, 0, 0] == 0)
        self.fresh = due
        identity = torch.full_like(self.done, source == IDENTITY)
        identity = ((solution.status == DEGENERATE) & (solution.scale == 1)).where(due, identity)
        changes = due | (self.done & (source == IDENTITY))
        leaving, entering = changes & ~identity & (phases == 0), changes & identity & (phases != 0)
        ones = torch.ones_like(solution.scale)
        c = solution.scale.where(leaving, (1 / solution.scale).where(entering, ones))
        self._move_moments((1 / c).to(self.group.apply))
        phases = (~identity).to(phases.dtype).where(changes, phases)
        torch._foreach_copy_(self.group.once(col.PHASE), list(phases.unbind(0)))
        if source == IDENTITY:
            return grads
        S, S_inv = solution.S, solution.S_inv
        if self.step.keep:
            kept = self.group.once(col.SAVED)
            both = torch.stack([S, S_inv], 1).where(due.view(-1, 1, 1, 1), torch.stack(kept))
            torch._foreach_copy_(kept, list(both.unbind(0)))
            S, S_inv = both.unbind(1)
        return [_saturated(S_inv @ grads[0]), _saturated(S @ grads[1])]

    def _scalar_refactor(self, solution: Solution, grads: list[Tensor]) -> list[Tensor]:
        use = self.done & (solution.status == REFACTORED)
        root = solution.scale.sqrt().where(use, 1.0).to(self.group.apply)
        self._move_moments(1 / root)
        root = root.view(-1, 1, 1)
        self.P = [self.P[0] * root, self.P[1] / root]
        return [grads[0] / root, grads[1] * root]

    def _move_moments(self, factor: Tensor) -> None:
        """A's gradients are in units `factor [b]` times larger from here on, B's in units `1 / factor`."""
        for i, f in enumerate((factor.view(-1, 1, 1), 1 / factor.view(-1, 1, 1))):
            self.M[i], self.V[i] = self.M[i] * f, self.V[i] * f * f  # f * f itself may leave the range
            if self.amsgrad:
                self.X[i] = self.X[i] * f * f

    def _update(self, grads: list[Tensor]) -> None:
        apply = self.group.apply
        for i, side in enumerate((A_SIDE, B_SIDE)):
            lr, beta1, beta2, eps, decay = (
                self._hyper(side, c) for c in (col.LR, col.BETA1, col.BETA2, col.EPS, col.WEIGHT_DECAY)
            )
            count = torch.stack(self.group.once(side + col.STEP)).double().view(-1, 1, 1) + 1
            g = grads[i]
            self.M[i] = self.M[i] + (1 - beta1).to(apply) * (g - self.M[i])
            self.V[i] = beta2.to(apply) * self.V[i] + (1 - beta2).to(apply) * g * g
            second = self.V[i]
            if self.amsgrad:
                self.X[i] = torch.where(self._hyper(side, col.AMSGRAD) != 0, self.X[i].maximum(second), self.X[i])
                second = torch.where(self._hyper(side, col.AMSGRAD) != 0, self.X[i], second)
            denom = second.sqrt() / (1 - beta2**count).sqrt().to(apply) + eps.to(apply)
            decayed = self.P[i] * (1 - lr * decay).to(apply)
            # eps = 0 and no gradient yet: 0 / 0 is no step
            ratio = torch.where(self.M[i] == 0, 0.0, self.M[i] / denom)
            self.P[i] = decayed - (lr / (1 - beta1**count)).to(apply) * ratio

    def _store(self) -> None:
        for i, side in enumerate((A_SIDE, B_SIDE)):
            for column, values in ((col.P, self.P), (col.M, self.M), (col.V, self.V), (col.X, self.X)):
                if values:
                    self.group.write(side, column, values[i], self.done)
            steps = self.group.once(side + col.STEP)
            torch._foreach_add_(steps, list(self.done.to(steps[0].dtype).unbind(0)))


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
    Q = newton_polar(Ly.mT @ Lx_inv.mT, Ly_inv @ Lx)
    mean = Lx @ Q.mT @ Ly.mT
    return ((mean + mean.mT) / 2).to(X.dtype)


def sqrtm(X: Tensor, precision: str, inverse: bool) -> Tensor:
    """`X^(1/2) = Q^T L^T`, or `X^(-1/2) = L^-T Q`, with `L^T = Q H`; NaN where X is not positive definite."""
    L, L_inv = _cholesky(X, precision)
    Q = newton_polar(L.mT, L_inv)
    root = L_inv.mT @ Q if inverse else Q.mT @ L.mT
    return ((root + root.mT) / 2).to(X.dtype)


def _cholesky(X: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    X = X.to(getattr(torch, precision))
    L, broke = torch.linalg.cholesky_ex((X + X.mT) / 2)
    L = L.where((broke == 0).view(-1, 1, 1), torch.nan)
    eye = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    return L, torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)


def _groups(plan: Plan, rows: Sequence[int] | None) -> Iterator[Group]:
    groups: dict[tuple, list[int]] = {}
    active = plan.table[:, col.ACTIVE].tolist()
    for number in range(len(plan.rows)) if rows is None else rows:
        row = plan.rows[number]
        if active[number]:
            groups.setdefault((row.A.shape, row.B.shape, row.A.dtype), []).append(number)
    return (Group(plan, numbers) for numbers in groups.values())


def _solve(group: Group, precision: str, scalar: bool) -> tuple[Gram, Gram, Solution]:
    return _solve_stacks(group.stack(A_SIDE, col.P), group.stack(B_SIDE, col.P), group, precision, scalar)


def _solve_stacks(A: Tensor, B: Tensor, group: Group, precision: str, scalar: bool) -> tuple[Gram, Gram, Solution]:
    a, b = (gram(X, getattr(torch, precision)) for X in (A, B))
    solution = solve(a, b, group.apply, precision)
    if not scalar:
        return a, b, solution
    half = group.dtype in (torch.bfloat16, torch.float16)
    s = b.norm / a.norm
    s = torch.exp2(2 * (s.log2() / 2).round()) if half else s
    tiny, huge = torch.finfo(group.apply).tiny, torch.finfo(group.apply).max
    useful = (s >= tiny) & (s <= huge)
    s = s.where(useful, 1.0)
    status = torch.full_like(s, REFACTORED).where(useful, DEGENERATE).where(solution.status != SKIPPED, SKIPPED)
    column = s.view(-1, 1, 1)
    S, S_inv = (column * _eye(group)).to(group.apply), (_eye(group) / column).to(group.apply)
    return a, b, solution._replace(S=S, S_inv=S_inv, status=status, scale=s)


def _skip(solution: Solution, *grads: Tensor) -> Solution:
    finite = torch.stack([g.isfinite().all(2).all(1) for g in grads]).all(0)
    return solution._replace(status=solution.status.where(finite, SKIPPED))


def _saturated(g: Tensor) -> Tensor:
    """Held in a range whose squares are finite; inf - inf inside a product has no sign left and becomes 0."""
    top = torch.finfo(g.dtype).max ** 0.5 / 10
    return g.nan_to_num(0.0, top, -top).clamp(-top, top)


def _eye(group: Group) -> Tensor:
    return torch.eye(group.plan.rows[group.rows[0]].A.shape[0], dtype=torch.float64, device=group.plan.device)


def _results(plan: Plan) -> Tensor:
    results = torch.full((len(plan.rows), col.RESULTS), torch.nan, dtype=torch.float64, device=plan.device)
    results[:, col.STATUS] = PLAIN
    return results


def _record(results: Tensor, group: Group, a: Gram, b: Gram, solution: Solution) -> None:
    index = torch.tensor(group.rows, device=results.device)
    columns = (solution.status, a.kappa, b.kappa, solution.balance, solution.scale, a.norm, b.norm)
    results[index, : len(columns)] = torch.stack([c.double() for c in columns], 1)
