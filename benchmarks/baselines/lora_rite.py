"""LoRA-RITE: matrix preconditioning of LoRA that does not depend on the factorisation.

Yen, Si, Meng, Yu, Duvvuri, Dhillon, Hsieh and Kumar, arXiv 2410.20625 (ICLR 2025), Algorithm 1, in the defaults of
their PyTorch code: with `A^T = Ua Ra` and `B = Ub Rb` (QR), the unmagnified gradients `gA^T Rb^-1` and `gB Ra^-1` are
skipped where their root mean square passes 1, clipped together at norm 1, whitened by their own second moments `[r, r]`
and averaged; both moments are carried to the basis of the next step by `P = U_new^T U_old`. No escaped mass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import Pair, PairOptimizer


@dataclass(frozen=True)
class Side:
    """One side of pairs of one rank: its updates `[n, r]`, the bases `[n', r]` of the other side and its `R^-1`."""

    parameters: list[Tensor]
    transposed: bool
    updates: list[Tensor]
    bases: list[Tensor]
    inverses: Tensor


class LoRARITE(PairOptimizer):
    """eps: added to the root of the second moment, in the authors' code 1e-6. skip and clip: their `update_skipping`
    and `clip_unmagnified_grad`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        pairs: Iterable[Pair],
        eps: float = 1e-6,
        skip: float = 1.0,
        clip: float = 1.0,
        **options: Any,
    ):
        super().__init__(parameters, pairs, **options)
        self.eps, self.skip, self.clip = eps, skip, clip

    def move(self, groups: Sequence[Sequence[Pair]], options: dict[str, Any]) -> None:
        sides = [side for pairs in groups for side in self._unmagnified(pairs)]
        total = torch.stack([update.square().sum() for side in sides for update in side.updates]).sum().sqrt()
        shrink = torch.where(total > self.clip, self.clip / total, 1.0)
        for side in sides:
            self._move(side, shrink, options)

    def _unmagnified(self, pairs: Sequence[Pair]) -> tuple[Side, Side]:
        """Both gradients in the basis of the other side's factor."""
        of_A = [torch.linalg.qr(A.T) for A, _ in pairs]
        of_B = [torch.linalg.qr(B) for _, B in pairs]
        inverse_A, inverse_B = (torch.linalg.pinv(torch.stack([qr.R for qr in side])) for side in (of_A, of_B))
        left = [self._skipped(A.grad.T @ inverse) for (A, _), inverse in zip(pairs, inverse_B)]
        right = [self._skipped(B.grad @ inverse) for (_, B), inverse in zip(pairs, inverse_A)]
        return (
            Side([A for A, _ in pairs], True, left, [qr.Q for qr in of_B], inverse_B),
            Side([B for _, B in pairs], False, right, [qr.Q for qr in of_A], inverse_A),
        )

    def _skipped(self, update: Tensor) -> Tensor:
        return torch.where(update.square().mean().sqrt() > self.skip, 0.0, update)

    def _move(self, side: Side, shrink: Tensor, options: dict[str, Any]) -> None:
        """Whiten, average and apply the updates of one side of pairs of one rank."""
        states = [self._state(parameter, basis) for parameter, basis in zip(side.parameters, side.bases)]
        carry = torch.stack([basis.T @ state["basis"] for basis, state in zip(side.bases, states)])
        beta1, beta2 = (_decay(beta, self.step_count) for beta in options["betas"])
        updates = [update * shrink for update in side.updates]
        seen = torch.stack([update.T @ update / update.shape[0] for update in updates])
        carried = carry @ torch.stack([state["exp_avg_sq"] for state in states]) @ carry.mT
        second = _symmetric((1 - beta2) * _symmetric(seen) + beta2 * _symmetric(carried).nan_to_num())
        w, V = torch.linalg.eigh(second)
        whiten = _symmetric((V / (w.sqrt() + self.eps)[..., None, :]) @ V.mT)
        for index, (parameter, state) in enumerate(zip(side.parameters, states)):
            update = (updates[index] @ whiten[index]).nan_to_num()  # a negative w makes it NaN: then no update
            first = state["exp_avg"] @ carry[index].T
            state["exp_avg"] = first.mul_(beta1).add_(update, alpha=1 - beta1)
            state["exp_avg_sq"], state["basis"] = second[index].clone(), side.bases[index]
            moved = state["exp_avg"] @ side.inverses[index].T
            moved = moved.T if side.transposed else moved
            parameter.mul_(1 - options["lr"] * options["weight_decay"]).sub_(moved, alpha=options["lr"])

    def _state(self, parameter: Tensor, basis: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            r = basis.shape[1]
            state["exp_avg"] = parameter.new_zeros(parameter.numel() // r, r)
            state["exp_avg_sq"] = parameter.new_zeros(r, r)
            state["basis"] = torch.zeros_like(basis)
        return state


def _decay(beta: float, step: int) -> float:
    """beta with Adam's bias correction folded in (Shazeer and Stern, arXiv 1804.04235, section 7.1); step from 1."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2
