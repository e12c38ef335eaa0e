"""The fused RefLoRA-AdamW step in batched torch operations.

The host reads nothing from the device: what differs from row to row is chosen by torch.where, so that a step can be
captured in a CUDA graph as far as torch's own linear algebra can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import columns as col
from ..columns import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from ..plan import Plan
from ..reference import meet
from . import AdamWStep
from .torch_groups import SIDES, Batch, chosen, groups, record, results_of, saturated, skip
from .torch_solve import Gram, Solution, damped, gram, met
from .torch_step import GroupStep, Memory


def adamw(plan: Plan, step: AdamWStep, rows: Sequence[int] | None = None) -> Tensor:
    results = results_of(plan)
    memory = plan.kept(Memory)
    # a group that sits out, or has other rows, starts afresh: its factors may have changed since
    carried, memory.grams = memory.grams, {}
    for group in groups(plan, rows):
        key = (tuple(group.rows), step.precision)
        # Grams of rows that nothing has written come out the same when computed along with the others
        grams = carried.get(key) if all(group.column(col.KEPT)) else None
        BatchStep(group, step, memory).run(results, grams or group.grams(step.precision))
        if step.carry and not step.scalar:
            memory.grams[key] = group.grams(step.precision)
    return chosen(results, rows)


def schedule(count: Tensor, step: AdamWStep) -> tuple[Tensor, Tensor]:
    """(S = I, S computed now) for rows that have done `count` steps; elsewhere the last S is reused."""
    past = count - step.warmup_steps
    return past < 0, (past >= 0) & (past % step.interval == 0)


def scalar_schedule(count: Tensor, step: AdamWStep) -> tuple[Tensor, Tensor]:
    """(refactored before the update, after it): after every step that a fresh S would follow."""
    before = (count == 0) & (step.warmup_steps == 0) & (step.start == 0)
    past = count + 1 - step.warmup_steps
    return before, (past >= 0) & (past % step.interval == 0)


class BatchStep(GroupStep):
    """One group's step; moments in units of S move by `[1 / c, c]`."""

    step: AdamWStep

    def __init__(self, group: Batch, step: AdamWStep, memory: Memory):
        super().__init__(group, step, memory)
        self.count = torch.stack(group.once(col.COUNT)).long()

    def run(self, results: Tensor, grams: tuple[Gram, Gram]) -> None:
        group, step = self.group, self.step
        if step.reg:
            solution = damped(*grams, step.reg, group.apply, step.precision)
        else:
            solution = group.solve(*grams, step.precision, step.scalar, group.shrink_weight(step.start))
        grads = [self._gradient(side, h) for side, h in zip(SIDES, self.hypers)]
        if step.check:
            solution = skip(solution, *grads)
        self.done = self._stepped(solution.status)
        self._load()
        if step.scalar:
            reported = self._scalar_step(solution, grads, grams)
        else:
            reported, grads = self._precondition(solution, grads, (grams[0].norm == 0) | (grams[1].norm == 0))
            self._update(grads)
        self._store()
        record(results, group, *grams, reported)

    def _load(self) -> None:
        self.P, self.M, self.V = self._weights(), self._wide(col.M), self._wide(col.V)
        self.X = [
            self.group.stack(side, col.X).to(self.group.apply) if h.amsgrad else None
            for side, h in zip(SIDES, self.hypers)
        ]

    def _scalar_step(self, solution: Solution, grads: list[Tensor], old: tuple[Gram, Gram]) -> Solution:
        """RefLoRA-S; rows that are not refactored in this step take a plain one."""
        before, after = scalar_schedule(self.count, self.step)
        plain = ~(before | after)
        # the gradients were in units of c itself, not rounded as sqrt(s) is for 16-bit factors
        exact = solution._replace(scale=(old[1].norm / old[0].norm).where(solution.status == REFACTORED, 1.0))
        self._change_phase(self.done & (self._phases() == col.REFACTORED_UNITS), torch.ones_like(plain), exact)
        self._update(self._scalar_refactor(solution, before, grads))
        # norms of the stored factors, after rounding
        a, b = (gram(p.to(self.group.dtype), getattr(torch, self.step.precision)) for p in self.P)
        if self.step.start:
            after = after & self._begun(met(old[0].norm, old[1].norm, a.norm, b.norm, meet(self.group.dtype)))
        self._scalar_refactor(self.group.solve(a, b, self.step.precision, True), after, grads)
        return self._reported(solution, before | after, PLAIN)

    def _begun(self, crosses: Tensor) -> Tensor:
        """Rows that RefLoRA-S balances: from the step in which their norms have met."""
        kept, phases = self.group.once(col.PHASE), self._phases()
        begins = self.done & crosses
        torch._foreach_copy_(kept, list(phases.masked_fill(begins, col.BALANCED).unbind(0)))
        return begins | (phases == col.BALANCED)

    def _phases(self) -> Tensor:
        return torch.stack(self.group.once(col.PHASE))

    def _precondition(self, solution: Solution, grads: list[Tensor], empty: Tensor) -> tuple[Solution, list[Tensor]]:
        """(what is reported, gradients mixed by this step's S); moments are moved where S stops or starts being I.

        empty: rows with a factor at 0. Their start is still to come.
        """
        group = self.group
        warm_up, due = schedule(self.count, self.step)
        S, S_inv = solution.S, solution.S_inv
        if self.step.keep:
            kept = group.once(col.SAVED)
            saved = torch.stack(kept)
            due = due | (~warm_up & (saved[:, 0, 0, 0] == 0))  # zeros: this row has had no S yet
            both = torch.stack([S, S_inv], 1).where((self.done & due).view(-1, 1, 1, 1), saved)
            torch._foreach_copy_(kept, list(both.unbind(0)))
            S, S_inv = both.unbind(1)
        unsolved = (solution.status == DEGENERATE) & (solution.scale == 1)
        in_units_of_I = warm_up | unsolved | bool(self.step.start or self.step.reg)
        self._change_phase(self.done & (due | warm_up), in_units_of_I, solution)
        reported = self._reported(solution, due, torch.where(warm_up, PLAIN, REFACTORED).double())
        if self.step.start:
            self.count = self.count.masked_fill(due & empty, 0)
        plain = warm_up.view(-1, 1, 1)
        return reported, [g.where(plain, mixed) for g, mixed in zip(grads, (S_inv @ grads[0], S @ grads[1]))]

    def _reported(self, solution: Solution, own: Tensor, other: Tensor | int) -> Solution:
        """Leave out what this step has not computed: S of a warm-up or of an earlier step."""
        status = solution.status.where(own | (solution.status == SKIPPED), other)
        if self.step.found_inf is not None:
            status = status.where(self.step.found_inf.to(self.device) == 0, PLAIN)
        names = ("balance", "kappa_A", "kappa_B")
        return solution._replace(status=status, **{n: getattr(solution, n).where(own, torch.nan) for n in names})

    def _change_phase(self, changes: Tensor, identity: Tensor, solution: Solution) -> None:
        """Rows with `changes` start (`identity`) or stop using S = I; their moments move to its units, or back."""
        kept, phases = self.group.once(col.PHASE), self._phases()
        moved = phases == col.REFACTORED_UNITS
        leaving, entering = changes & ~identity & ~moved, changes & identity & moved
        c = solution.scale.where(leaving, (1 / solution.scale).where(entering, 1.0))
        self._move_moments((1 / c).to(self.group.apply))
        torch._foreach_copy_(kept, list((~identity).to(phases.dtype).where(changes, phases).unbind(0)))

    def _scalar_refactor(self, solution: Solution, where: Tensor, grads: list[Tensor]) -> list[Tensor]:
        use = self.done & where & (solution.status == REFACTORED)
        root = solution.scale.sqrt().where(use, 1.0).to(self.group.apply)
        self._move_moments(1 / root)
        root = root.view(-1, 1, 1)
        self.P = [self.P[0] * root, self.P[1] / root]
        return [grads[0] / root, grads[1] * root]

    def _move_moments(self, factor: Tensor) -> None:
        """A's gradients are in units `factor [b]` times larger from now on, B's in units `1 / factor`."""
        for i, f in enumerate((factor.view(-1, 1, 1), 1 / factor.view(-1, 1, 1))):
            self.M[i], self.V[i] = self.M[i] * f, self.V[i] * f * f  # f * f itself may leave the range
            x = self.X[i]
            if x is not None:
                self.X[i] = x * f * f

    def _update(self, grads: list[Tensor]) -> None:
        apply = self.group.apply
        # squares stay finite
        limit = torch.finfo(apply).max ** 0.5 / 10
        for i, (side, h) in enumerate(zip(SIDES, self.hypers)):
            t = self._steps(side).double().view(-1, 1, 1) + 1
            g = saturated(grads[i], limit)
            self.M[i] = self.M[i] + (1 - h.beta1) * (g - self.M[i])
            self.V[i] = second = h.beta2 * self.V[i] + (1 - h.beta2) * g * g
            x = self.X[i]
            if x is not None:
                self.X[i] = second = x.maximum(second)
            denom = second.sqrt() / (1 - h.beta2**t).sqrt().to(apply) + h.eps
            # eps = 0 and no gradient yet: 0 / 0 is no step
            ratio = torch.where(self.M[i] == 0, 0.0, self.M[i] / denom)
            self.P[i] = self.P[i] * (1 - h.lr * h.decay) - (h.lr / (1 - h.beta1**t)).to(apply) * ratio
        self.P = self._round(self.P)

    def _store(self) -> None:
        self._store_weights(self.P)
        for column, values in ((col.M, self.M), (col.V, self.V), (col.X, self.X)):
            self._write(column, values)
        self._count_steps()
        counts = self.group.once(col.COUNT)
        before = torch.stack(counts)
        torch._foreach_copy_(counts, list((self.count + 1).to(before.dtype).where(self.done, before).unbind(0)))
