"""The fused step of InvariantAdamW in batched torch operations. As in torch_adamw, the host reads nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import columns as col
from ..plan import Plan
from . import InvariantStep
from .torch_frames import Frames, frames, whitener
from .torch_groups import SIDES, chosen, groups, record, results_of, saturated, skip
from .torch_step import GroupStep, Hypers, Memory

# differences of gradients stay finite, and so do sums of their squares in float64
MOST = {torch.float32: 1e38, torch.float64: 1e145}


def invariant(plan: Plan, step: InvariantStep, rows: Sequence[int] | None = None) -> Tensor:
    results = results_of(plan)
    for group in groups(plan, rows):
        WhitenedStep(group, step, plan.kept(Memory)).run(results)
    return chosen(results, rows)


class WhitenedStep(GroupStep):
    """One group's step."""

    step: InvariantStep

    def run(self, results: Tensor) -> None:
        group, step = self.group, self.step
        a, b = group.grams(step.precision)
        grads = [self._gradient(side, h) for side, h in zip(SIDES, self.hypers)]
        found = frames(a, b, step.metric, group.apply, step.precision)
        self.done = self._stepped(found.status)
        told = skip(found, *grads)
        if not step.late:
            self.done = self._stepped(told.status)
        limit = MOST[group.apply]
        means = [saturated(m, limit) for m in self._wide(col.M)]
        moments = [m + (1 - h.beta1) * (filled(g, m, limit) - m) for m, g, h in zip(means, grads, self.hypers)]
        weights = self._moved(self._weights(), moments, self._whiteners(found, grads, moments))
        self._store_weights(self._round(weights))
        self._write(col.M, moments)
        self._count_steps()
        record(results, group, a, b, found._replace(status=self._reported(told.status)))

    def _whiteners(self, found: Frames, grads: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
        """K of A and of B `[b, r, r]`; second moments are updated and kept."""
        compute, result = getattr(torch, self.step.precision), []
        for side, P, g, m, h in zip(SIDES, (found.of_A, found.of_B), grads, moments, self.hypers):
            kept = self.group.once(side + col.V)
            stored, t = torch.stack(kept), self._next(side)
            before = saturated(stored, torch.finfo(torch.float64).max)
            sound = (self.done & g.isfinite().all(2).all(1)).view(-1, 1, 1)
            g = saturated(g, MOST[self.group.apply])
            V, second = second_moments(before, g, m, t, h, self.step)
            held = before * held_by(t, h, self.step)
            V = V.where(sound, held.where(self.done.view(-1, 1, 1), stored))
            second = second.where(sound, 0.0)
            if self.step.late:
                there = before.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1) > 0
                second = without_bias(before, t - 1, h, self.step).where(there, second)
            torch._foreach_copy_(kept, list(V.unbind()))
            K = whitener(second, P, self.step.damping, h.eps, compute)
            result.append(saturated(K, torch.finfo(self.group.apply).max).to(self.group.apply))
        return result

    def _moved(self, weights: list[Tensor], moments: list[Tensor], K: list[Tensor]) -> list[Tensor]:
        apply = self.group.apply
        moved = []
        for side, w, m, k, h in zip(SIDES, weights, moments, K, self.hypers):
            size = (h.lr / (1 - h.beta1 ** self._next(side))).to(apply)
            moved.append(w * (1 - h.lr * h.decay) - size * (k @ m))
        return moved

    def _next(self, side: int) -> Tensor:
        """Number of the step that a row is about to take, float64 `[b, 1, 1]`, from 1."""
        return self._steps(side).double().view(-1, 1, 1) + 1

    def _reported(self, status: Tensor) -> Tensor:
        if self.step.found_inf is None:
            return status
        return status.where(self.step.found_inf.to(self.device) == 0, col.PLAIN)


def filled(g: Tensor, m: Tensor, limit: float) -> Tensor:
    """Gradients within the limit, and the means m where they are not finite."""
    return saturated(g.where(g.isfinite(), m), limit)


def second_moments(
    before: Tensor, g: Tensor, m: Tensor, t: Tensor, h: Hypers, step: InvariantStep
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[b, r, r]` after step t of gradients g with means m `[b, r, n]`, and the same without bias."""
    if step.moments == "momentum":
        V = _gram_over_n(m) / (1 - h.beta1**t) ** 2
    else:
        V = h.beta2 * before + (1 - h.beta2) * _gram_over_n(g)
    return V, without_bias(V, t, h, step)


def without_bias(V: Tensor, t: Tensor, h: Hypers, step: InvariantStep) -> Tensor:
    return V if step.moments == "momentum" else V / (1 - h.beta2**t)


def held_by(t: Tensor, h: Hypers, step: InvariantStep) -> Tensor:
    """What keeps the second moments as they are without their bias, where step t takes no part in them."""
    ratio = (1 - h.beta2**t) / (1 - h.beta2 ** (t - 1))
    return torch.ones_like(t) if step.moments == "momentum" else ratio.where(t > 1, 1.0)


def _gram_over_n(g: Tensor) -> Tensor:
    """`g g^T / n` of `[b, r, n]`, float64."""
    g = g.double()
    return g @ g.mT / g.shape[2]
