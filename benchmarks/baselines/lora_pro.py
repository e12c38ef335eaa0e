"""LoRA-Pro: gradients of the factors whose update of W comes closest to that of full fine-tuning.

Wang, Liang, He, Wang and Tan, arXiv 2407.18242 (ICLR 2025), Theorems 2.1 and 2.3:

    gA <- (1/s^2) (B^T B)^-1 gA + X A
    gB <- (1/s^2) (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 - B X
    B^T B X + X A A^T = -(1/s^2) (B^T B)^-1 gA A^T

with inverses of Gram + 1e-8 I, as pseudo-inverses. One eigendecomposition of each Gram serves both its inverse and the
Sylvester equation; the projector is applied, never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import AdjustedAdamW, Pair, PairOptimizer, grams

DAMPING = 1e-8


@dataclass(frozen=True)
class Spectrum:
    """A stack of Grams as `V diag(w) V^T`, w `[pairs, r]`, and the inverses of the damped Grams."""

    w: Tensor
    V: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> Spectrum:
        w, V = torch.linalg.eigh(gram)
        damped = w + DAMPING
        least = gram.shape[-1] * torch.finfo(gram.dtype).eps * damped.abs().amax(-1, keepdim=True)
        reciprocal = torch.where(damped.abs() > least, 1 / damped, 0)
        return cls(w, V, (V * reciprocal[..., None, :]) @ V.mT)


def adjusted(
    pairs: Sequence[Pair],
    gradients: Sequence[tuple[Tensor, Tensor]],
    spectra: tuple[Spectrum, Spectrum],
    scaling: float,
    free: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """The two gradients of each pair of one rank. free: with the X of the Sylvester equation, else with X = 0."""
    of_A, of_B = spectra
    scale = 1 / scaling**2
    lefts = [scale * (inverse @ gA) for inverse, (gA, _) in zip(of_B.inverse, gradients)]
    rights = [scale * (gB @ inverse) for inverse, (_, gB) in zip(of_A.inverse, gradients)]
    found = []
    if free:
        C = -torch.stack([left @ A.T for left, (A, _) in zip(lefts, pairs)])
        X = of_B.V @ ((of_B.V.mT @ C @ of_A.V) / (of_B.w[..., :, None] + of_A.w[..., None, :])) @ of_A.V.mT
    for index, ((A, B), left, right) in enumerate(zip(pairs, lefts, rights)):
        inner = of_B.inverse[index] @ (B.T @ right)
        if free:
            inner, left = inner + X[index], left + X[index] @ A
        found.append((left, right - B @ inner))
    return found


class LoRAPro(AdjustedAdamW):
    """The efficient form: AdamW on the adjusted gradients, moments of the factors' size."""

    def adjust(self, pairs: Sequence[Pair]) -> None:
        of_A, of_B = map(Spectrum.of, grams(pairs))
        gradients = [(A.grad, B.grad) for A, B in pairs]
        for (A, B), (gA, gB) in zip(pairs, adjusted(pairs, gradients, (of_A, of_B), self.scaling)):
            A.grad, B.grad = gA, gB


class LoRAProFull(PairOptimizer):
    """The full form: Adam's moments of `[n_out, n_in]` for the equivalent gradient `s B gA + s gB A`, projected back.

    moment_dtype: bfloat16 as in the authors' code. Weight decay shrinks B A alone (their code shrinks the pretrained
    weight along).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        pairs: Iterable[Pair],
        scaling: float = 1.0,
        moment_dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ):
        super().__init__(parameters, pairs, **options)
        self.scaling, self.moment_dtype = scaling, moment_dtype

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which makes everything the factor's dtype
        for A, _ in self.pairs:
            for name in ("exp_avg", "exp_avg_sq"):
                if name in self.state.get(A, {}):
                    self.state[A][name] = self.state[A][name].to(self.moment_dtype)

    def move(self, groups: Sequence[Sequence[Pair]], options: dict[str, Any]) -> None:
        for pairs in groups:
            self._move(pairs, options)

    def _move(self, pairs: Sequence[Pair], options: dict[str, Any]) -> None:
        of_A, of_B = map(Spectrum.of, grams(pairs))
        gradients = [(A.grad, B.grad) for A, B in pairs]
        tentative = adjusted(pairs, gradients, (of_A, of_B), self.scaling, free=False)
        projected = []
        for (A, B), (gA, gB) in zip(pairs, tentative):
            direction = self._adam(A, self.scaling * (B @ gA + gB @ A), options).to(B.dtype)
            projected.append((self.scaling * (B.T @ direction), self.scaling * (direction @ A.T)))
        shrink = math.sqrt(1 - options["weight_decay"] * options["lr"])
        for (A, B), (gA, gB) in zip(pairs, adjusted(pairs, projected, (of_A, of_B), self.scaling)):
            A.mul_(shrink).sub_(gA, alpha=options["lr"])
            B.mul_(shrink).sub_(gB, alpha=options["lr"])

    def _adam(self, key: Tensor, gradient: Tensor, options: dict[str, Any]) -> Tensor:
        """Adam's direction for a gradient `[n_out, n_in]`; its moments are kept under A."""
        state = self.state[key]
        if not state:
            state["exp_avg"] = torch.zeros_like(gradient, dtype=self.moment_dtype)
            state["exp_avg_sq"] = torch.zeros_like(gradient, dtype=self.moment_dtype)
        beta1, beta2 = options["betas"]
        gradient = gradient.to(self.moment_dtype)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**self.step_count)).add_(options["eps"])
        return state["exp_avg"].div(1 - beta1**self.step_count).div_(root)
