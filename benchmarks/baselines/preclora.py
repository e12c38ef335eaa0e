"""PrecLoRA, the Riemannian preconditioner of LoRA: ScaledGD, and AdamW in its metric.

Zhang and Pilanci, arXiv 2402.02347: `gA <- (B^T B + d I)^-1 gA`, `gB <- gB (A A^T + d I)^-1`, in front of gradient
descent (their equation 2) or of AdamW. The metric is that of Tong, Ma and Chi, arXiv 2005.08898.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .common import AdjustedAdamW, Pair, by_rank, damped_inverse

DAMPING = 1e-6


@torch.no_grad()
def precondition_(pairs: Sequence[Pair], damping: float = DAMPING) -> None:
    """Both gradients of pairs of one rank, by the factors as they are."""
    precondition_A_(pairs, damping)
    precondition_B_(pairs, damping)


def precondition_A_(pairs: Sequence[Pair], damping: float) -> None:
    inverses = damped_inverse(torch.stack([B.T @ B for _, B in pairs]), damping)
    for (A, _), inverse in zip(pairs, inverses):
        A.grad = inverse @ A.grad


def precondition_B_(pairs: Sequence[Pair], damping: float) -> None:
    inverses = damped_inverse(torch.stack([A @ A.T for A, _ in pairs]), damping)
    for (_, B), inverse in zip(pairs, inverses):
        B.grad = B.grad @ inverse


class ScaledGD(torch.optim.SGD):
    """Gradient descent on preconditioned gradients; parameters outside `pairs` get plain gradient descent."""

    def __init__(self, parameters: Iterable[Tensor], pairs: Iterable[Pair], damping: float = DAMPING, **options: Any):
        super().__init__(parameters, **options)
        self.pairs, self.damping = list(pairs), damping

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in by_rank(self.pairs):
            precondition_(group, self.damping)
        super().step(closure)


class PrecLoRA(AdjustedAdamW):
    """AdamW in the metric of the factors.

    As in the authors' code the sides take turns: A moves first, and the preconditioner of B is that of the new A.
    """

    def __init__(self, parameters: Iterable[Tensor], pairs: Iterable[Pair], damping: float = DAMPING, **options: Any):
        super().__init__(parameters, pairs, **options)
        self.damping = damping

    def adjust(self, pairs: Sequence[Pair]) -> None:
        precondition_A_(pairs, self.damping)
        self._step_of([A for A, _ in pairs], pairs)
        precondition_B_(pairs, self.damping)

    def _step_of(self, moving: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
        """One AdamW step of `moving` alone; their gradients are gone after it, so that the step to come skips them."""
        kept = [(parameter, parameter.grad) for group in self.param_groups for parameter in group["params"]]
        chosen = set(map(id, moving))
        for parameter, _ in kept:
            if id(parameter) not in chosen:
                parameter.grad = None
        torch.optim.AdamW.step(self)
        for parameter, gradient in kept:
            parameter.grad = None if id(parameter) in chosen else gradient
