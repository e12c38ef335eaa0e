"""What both fused steps share in batched torch operations: hyperparameters, gradients, weights, rounding, storing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import columns as col
from ..columns import A_SIDE, B_SIDE, SKIPPED
from ..plan import Plan
from . import Step
from .torch_groups import SIDES, Batch, saturated
from .torch_rounding import round_stochastically, row_key
from .torch_solve import Gram


class Memory:
    """What is kept from one step to the next.

    grams: of the factors as the last step left them, by (rows, precision). keys: of stochastic rounding, `[b]` per
    side, by (seed, *tags); kept because a CUDA graph takes no numbers from the host.
    """

    def __init__(self, plan: Plan):
        self.grams: dict[tuple, tuple[Gram, Gram]] = {}
        self.keys: dict[tuple, list[Tensor]] = {}


class Hypers(NamedTuple):
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    decay: float
    amsgrad: bool
    maximize: bool


class GroupStep:
    """One group's step. Sides are lists `[A, B]` of stacks `[b, r, n]` in the apply dtype.

    done: rows that take the step.
    """

    done: Tensor

    def __init__(self, group: Batch, step: Step, memory: Memory):
        self.group, self.step, self.memory = group, step, memory
        self.device = group.plan.device
        self.hypers = [self._hypers(index) for index in group.hypers]

    def _hypers(self, index: int) -> Hypers:
        lr, beta1, beta2, eps, decay, amsgrad, maximize = self.step.hypers[index, : col.LR_AT].tolist()
        device_lr = self.step.lrs[index] if index < len(self.step.lrs) else None
        return Hypers(
            lr if device_lr is None else device_lr.reshape(()).to(self.device, torch.float64),
            beta1, beta2, eps, decay, amsgrad != 0, maximize != 0,
        )  # fmt: skip

    def _stepped(self, status: Tensor) -> Tensor:
        """Rows that take this step: none that is skipped, nor any where the gradient scaler has found inf."""
        done = status < SKIPPED
        if self.step.found_inf is not None:
            done &= self.step.found_inf.to(self.device) == 0
        return done

    def _gradient(self, side: int, hypers: Hypers) -> Tensor:
        g = self.group.stack(side, col.G).to(self.group.apply)
        if self.step.grad_scale is not None:
            g = g / self.step.grad_scale.to(self.device)
        return -g if hypers.maximize else g

    def _wide(self, column: int) -> list[Tensor]:
        return [self.group.stack(side, column).to(self.group.apply) for side in SIDES]

    def _weights(self) -> list[Tensor]:
        """The factors, or their master weights where these still round to them: something else may have written."""
        weights = self._wide(col.P)
        if self.group.master:
            for i, (p, w) in enumerate(zip(weights, self._wide(col.W))):
                weights[i] = w.where(w.to(self.group.dtype) == p, p)
        return weights

    def _steps(self, side: int) -> Tensor:
        return torch.stack(self.group.once(side + col.STEP)).long()

    def _round(self, weights: list[Tensor]) -> list[Tensor]:
        """Weights as they will be stored; master weights keep what was computed."""
        dtype = self.group.dtype
        weights = [saturated(p, torch.finfo(dtype).max) for p in weights]
        if self.group.master:
            return weights
        if self.step.seed is not None and dtype == torch.bfloat16:
            keys = zip(weights, self._keys(self.step.seed), SIDES)
            rounded = [round_stochastically(p, key, self._steps(side)) for p, key, side in keys]
        else:
            rounded = [p.to(dtype) for p in weights]
        return [p.to(self.group.apply) for p in rounded]

    def _keys(self, seed: int) -> list[Tensor]:
        tags, keys = self.group.column(col.TAG), self.memory.keys
        which = (seed, *tags)
        if which not in keys:
            found = [[row_key(seed, tag, side) for tag in tags] for side in (0, 1)]
            keys[which] = [torch.tensor(own, dtype=torch.int64, device=self.device) for own in found]
        return keys[which]

    def _write(self, column: int, values: Sequence[Tensor | None]) -> None:
        """Store values of A and of B, where there are any, in the rows that are stepped."""
        for side, value in zip(SIDES, values):
            if value is not None:
                self.group.write(side, column, value, self.done)

    def _store_weights(self, weights: list[Tensor]) -> None:
        self._write(col.P, weights)
        if self.group.master:
            self._write(col.W, weights)

    def _count_steps(self) -> None:
        for column in (A_SIDE + col.STEP, B_SIDE + col.STEP):
            counts = self.group.once(column)
            torch._foreach_add_(counts, list(self.done.to(counts[0].dtype).unbind(0)))
