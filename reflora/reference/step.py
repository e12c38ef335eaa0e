"""One whole step of RefLoRAAdamW, or of RiemannianAdamW, on one pair, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .mean import balance_scalar, choose, meet, met, norm, shrink_weight, transport
from .riemannian import damped_inverses


@dataclass(frozen=True)
class Hypers:
    """AdamW's hyperparameters for one factor; names and meaning as in torch.optim.AdamW."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    amsgrad: bool = False
    maximize: bool = False


Sides = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AdamWState:
    """What RefLoRAAdamW keeps for a pair, float64; for A and B each, shaped like the factor.

    step: steps of A and of B. phase: 1 where the moments are in units of S, 2 where RefLoRA-S balances the pair.
    count: steps of the pair. S: the last S and S^-1 for interval > 1, or None. master: weights that are not rounded.
    """

    exp_avg: Sides
    exp_avg_sq: Sides
    max_exp_avg_sq: Sides
    step: tuple[float, float] = (0, 0)
    phase: float = 0
    count: float = 0
    S: Sides | None = None
    master: Sides | None = None

    def moved(self, factor: float) -> AdamWState:
        """Gradients of A are in units `factor` times larger from now on, and those of B in units `1 / factor`."""
        by = factor, 1 / factor
        exp_avg, exp_avg_sq = zip(*map(transport, self.exp_avg, self.exp_avg_sq, by))
        _, largest = zip(*map(transport, self.exp_avg, self.max_exp_avg_sq, by))
        return replace(self, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, max_exp_avg_sq=largest)


@dataclass(frozen=True)
class Schedule:
    """When S is I, computed or reused, as RefLoRAAdamW's options say; start: of `shrink_weight`, 0 for none.

    reg: RiemannianAdamW's, which has `damped_inverses` in place of S and S^-1 in every step; 0 for RefLoRA.
    """

    scalar: bool = False
    warmup_steps: int = 0
    start: int = 0
    interval: int = 1
    reg: float = 0.0


def adamw_step(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, state: AdamWState, hypers: tuple[Hypers, Hypers],
    schedule: Schedule, storage: torch.dtype = torch.float64, kappa_max: float = 1e6,
) -> tuple[Tensor, Tensor, AdamWState, str]:  # fmt: skip
    """One step of RefLoRAAdamW on one pair: (A, B, state after it, "refactored", "degenerate", "skipped" or "plain").

    hypers: of A and of B. storage: type of the factors. Nothing changes where a factor or gradient is not finite.
    """
    factors, grads = (A.double(), B.double()), (grad_A.double(), grad_B.double())
    if not all(t.isfinite().all() for t in (*factors, *grads)):
        return *factors, state, "skipped"
    grads = each(lambda g, h: -g if h.maximize else g, grads, hypers)
    if schedule.scalar:
        weights, state, why = _scalar_step(factors, grads, state, hypers, schedule, storage)
    else:
        S, S_inv, state, why = _mixer(*factors, state, schedule, kappa_max)
        weights, state = _updated(state.master or factors, (S_inv @ grads[0], grads[1] @ S), state, hypers)
    state = replace(state, count=state.count + 1, master=weights if state.master else None)
    return *each(lambda w: w.to(storage).double(), weights), state, why


def _mixer(
    A: Tensor, B: Tensor, state: AdamWState, schedule: Schedule, kappa_max: float
) -> tuple[Tensor, Tensor, AdamWState, str]:
    """S and S^-1 of a step, and its state with the moments in their units."""
    past = state.count - schedule.warmup_steps
    eye = torch.eye(A.shape[0], dtype=torch.float64)
    if schedule.reg:
        for_B, for_A, why = damped_inverses(A, B, schedule.reg, kappa_max)
        return for_B, for_A, _in_units(A, B, state, identity=True), why
    if past < 0:
        return eye, eye, _in_units(A, B, state, identity=True), "plain"
    if state.S is not None and past % schedule.interval != 0:
        return *state.S, state, "refactored"
    weight = shrink_weight(state.count, schedule.start) if schedule.start else None
    S, S_inv, why = choose(A, B, kappa_max, weight)
    state = _in_units(A, B, state, weight is not None or (why == "degenerate" and torch.equal(S, eye)))
    if schedule.interval > 1:
        state = replace(state, S=(S, S_inv))
    if schedule.start and min(norm(A), norm(B)) == 0:
        state = replace(state, count=0)  # the start is still to come
    return S, S_inv, state, why


def _in_units(A: Tensor, B: Tensor, state: AdamWState, identity: bool) -> AdamWState:
    c = float(balance_scalar(A, B)) if min(norm(A), norm(B)) > 0 else 1.0
    if identity and state.phase == 1:
        state = state.moved(c)
    elif not identity and state.phase != 1:
        state = state.moved(1 / c)
    return replace(state, phase=float(not identity))


def _scalar_step(
    factors: Sides, grads: Sides, state: AdamWState, hypers: tuple[Hypers, Hypers], schedule: Schedule,
    storage: torch.dtype,
) -> tuple[Sides, AdamWState, str]:  # fmt: skip
    """RefLoRA-S: a plain step, after which the pair is balanced; without warm-up and start also before the first."""
    past = state.count + 1 - schedule.warmup_steps
    first = state.count == 0 == schedule.warmup_steps == schedule.start
    due = past >= 0 and past % schedule.interval == 0
    why = "degenerate" if min(map(norm, factors)) == 0 else "refactored"
    if state.phase == 1:
        state = _in_units(*factors, state, identity=True)
    weights = state.master or factors
    if first:
        root = _root(*factors, storage)
        weights, grads = (weights[0] * root, weights[1] / root), (grads[0] / root, grads[1] * root)
        state = state.moved(1 / root)
    weights, state = _updated(weights, grads, state, hypers)
    stored = each(lambda w: w.to(storage).double(), weights)
    if schedule.start:
        if met(*factors, *stored, meet(storage)):
            state = replace(state, phase=2.0)
        due = due and state.phase == 2
    if due:
        root = _root(*stored, storage)
        weights, state = (weights[0] * root, weights[1] / root), state.moved(1 / root)
    return weights, state, why if first or due else "plain"


def _root(A: Tensor, B: Tensor, storage: torch.dtype) -> float:
    """sqrt(s); 16-bit factors take the nearest power of two, which rounds nothing."""
    if min(norm(A), norm(B)) == 0:
        return 1.0
    root = float(balance_scalar(A, B).sqrt())
    return 2.0 ** round(math.log2(root)) if storage in (torch.bfloat16, torch.float16) else root


def _updated(
    weights: Sides, grads: Sides, state: AdamWState, hypers: tuple[Hypers, Hypers]
) -> tuple[Sides, AdamWState]:  # fmt: skip
    """AdamW's step of both factors (Loshchilov and Hutter, algorithm 2)."""
    step = (state.step[0] + 1, state.step[1] + 1)
    exp_avg = each(lambda m, g, h: h.beta1 * m + (1 - h.beta1) * g, state.exp_avg, grads, hypers)
    exp_avg_sq = each(lambda v, g, h: h.beta2 * v + (1 - h.beta2) * g**2, state.exp_avg_sq, grads, hypers)
    largest = each(lambda x, v, h: x.maximum(v) if h.amsgrad else x, state.max_exp_avg_sq, exp_avg_sq, hypers)

    def moved(w: Tensor, m: Tensor, v: Tensor, x: Tensor, t: float, h: Hypers) -> Tensor:
        divisor = ((x if h.amsgrad else v) / (1 - h.beta2**t)).sqrt() + h.eps
        # eps = 0 and no gradient yet: 0 / 0 is no step
        change = (m / divisor).where(m != 0, 0.0) / (1 - h.beta1**t)
        return w * (1 - h.lr * h.weight_decay) - h.lr * change

    weights = each(moved, weights, exp_avg, exp_avg_sq, largest, step, hypers)
    return weights, replace(state, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, max_exp_avg_sq=largest, step=step)


def each(function: Callable[..., Tensor], *sides: Sequence[Any]) -> Sides:
    """The function applied to A's arguments and to B's."""
    of_A, of_B = (function(*own) for own in zip(*sides))
    return of_A, of_B
