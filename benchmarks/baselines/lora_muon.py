"""LoRA-Muon: the step of steepest descent in the spectral norm of W, on the manifold of matrices of rank r.

Cesista, Simal, Crowson and Biderman, arXiv 2606.12921. With momenta mA, mB, `Ra = (A A^T)^-1/2`, `Rb = (B^T B)^-1/2`:

    dA = -(lr / 2) Rb msign(Rb mA)      dB = -(lr / 2) msign(mB Ra) Ra
    A <- c A + dA / c                   B <- c B + dB / c,   c = sqrt(1 - lr weight_decay)

so each half moves W by lr / 2 in spectral norm, whatever the factorisation. `msign(X) = X (X^T X)^-1/2` is taken
through the Gram. No published code was found: tests hold it to these equations and to that invariance. At a singular
Gram (B = 0) we take the pseudo-inverse root, of which the equations say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .common import Pair, PairOptimizer, grams

Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]


class LoRAMuon(PairOptimizer):
    """momentum: of the average of the gradients. eigh: of `[pairs, r, r]`, torch's or another of its signature."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        pairs: Iterable[Pair],
        momentum: float = 0.95,
        eigh: Eigh = torch.linalg.eigh,
        **options: Any,
    ):
        super().__init__(parameters, pairs, **options)
        self.momentum, self.eigh = momentum, eigh

    def move(self, groups: Sequence[Sequence[Pair]], options: dict[str, Any]) -> None:
        for pairs in groups:
            self._move(pairs, options)

    def _move(self, pairs: Sequence[Pair], options: dict[str, Any]) -> None:
        root_A, root_B = (self._inverse_root(gram) for gram in grams(pairs))
        left = [root @ self._average(A) for (A, _), root in zip(pairs, root_B)]
        right = [self._average(B) @ root for (_, B), root in zip(pairs, root_A)]
        sign_A = self._inverse_root(torch.stack([X @ X.T for X in left]))
        sign_B = self._inverse_root(torch.stack([X.T @ X for X in right]))
        keep = (1 - options["lr"] * options["weight_decay"]) ** 0.5
        step = -options["lr"] / (2 * keep)
        for index, (A, B) in enumerate(pairs):
            dA = root_B[index] @ sign_A[index] @ left[index]
            dB = right[index] @ (sign_B[index] @ root_A[index])
            A.mul_(keep).add_(dA, alpha=step)
            B.mul_(keep).add_(dB, alpha=step)

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"].lerp_(parameter.grad, 1 - self.momentum)

    def _inverse_root(self, gram: Tensor) -> Tensor:
        """`X^-1/2` of `[pairs, r, r]` on the range of X."""
        w, V = self.eigh(gram)
        least = gram.shape[-1] * torch.finfo(gram.dtype).eps * w[..., -1:].clamp(min=0)
        root = torch.where(w > least, w.clamp(min=torch.finfo(w.dtype).tiny).rsqrt(), 0)
        return (V * root[..., None, :]) @ V.mT
