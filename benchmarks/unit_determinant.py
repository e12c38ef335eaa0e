"""RefLoRA with S scaled to unit determinant: does the size of S matter under Adam, or its shape alone?

Adam divides a constant factor of a gradient away, so of the size of S only its change over time reaches the weights.
Here that change is taken out: `gA <- S_u^-1 gA`, `gB <- gB S_u` with `S_u = S / det(S)^(1/r)`, which is invertible and
keeps what S says about directions. Where RefLoRA would take `c I`, S_u is I.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import reflora

from .baselines.common import AdjustedAdamW, Pair, grams

MOST_CONDITION = 1e12  # of a Gram: 1e6 of a factor, where reflora calls a layer degenerate


class UnitDeterminantRefLoRA(AdjustedAdamW):
    """torch's fused AdamW on gradients preconditioned by S_u, which is computed in float64."""

    def adjust(self, pairs: Sequence[Pair]) -> None:
        for (A, B), S, inverse in zip(pairs, *unit_means(pairs)):
            A.grad = inverse.to(A.dtype) @ A.grad
            B.grad = B.grad @ S.to(B.dtype)


def unit_means(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """S_u and its inverse, `[pairs, r, r]`, of pairs of one rank."""
    Ga, Gb = grams([(A.double(), B.double()) for A, B in pairs])
    w, V = reflora.linalg.eigh(torch.stack([Ga, Gb]))
    sound = ((w[..., 0] * MOST_CONDITION > w[..., -1]) & w.isfinite().all(-1)).all(0)
    eye = torch.eye(Ga.shape[-1], dtype=Ga.dtype, device=Ga.device)
    Ga, Gb = (torch.where(sound[:, None, None], gram, eye) for gram in (Ga, Gb))
    S = reflora.linalg.geometric_mean(torch.linalg.inv(Ga), Gb)
    S = S * torch.exp(-torch.logdet(S) / S.shape[-1])[:, None, None]
    return S, torch.linalg.inv(S)
