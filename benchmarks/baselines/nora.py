"""NoRA+: a sketch of the pretrained weight as the first A, and AdamW on preconditioned gradients.

Li, Zhang, Mokhtari and He, arXiv 2410.18965. Their start is `A = (sigma / s) Omega W` with a Gaussian `Omega`
`[r, n_out]` (the Nystrom sketch of W) and B = 0, so W stays as it is; their step divides each preconditioner of
ScaledGD by its Frobenius norm and leaves A's gradient alone in the first step, where B = 0. The published code assigns
the sketch to an attribute that its layer never reads: we follow the paper there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .common import AdjustedAdamW, Pair, damped_inverse, grams

SIGMA = 0.02  # of the published LLaMA runs
DAMPING = 1e-6


@torch.no_grad()
def start_(
    pairs: Iterable[Pair], weights: Iterable[Tensor], scaling: float, sigma: float = SIGMA, seed: int = 0
) -> None:
    """Fill every A by the sketch of its pretrained `W [n_out, n_in]` and every B by zeros."""
    for index, ((A, B), W) in enumerate(zip(pairs, weights, strict=True)):
        generator = torch.Generator().manual_seed(seed + index)
        omega = torch.randn(A.shape[0], W.shape[0], generator=generator).to(W)
        A.copy_(omega @ W).mul_(sigma / scaling)
        B.zero_()


class NoRAPlus(AdjustedAdamW):
    """AdamW on `P gA / ||P||_F`, `P = (B^T B + d I)^-1`, and `gB Q / ||Q||_F`, `Q = (A A^T + d I)^-1`."""

    def __init__(self, parameters: Iterable[Tensor], pairs: Iterable[Pair], damping: float = DAMPING, **options: Any):
        super().__init__(parameters, pairs, **options)
        self.damping = damping

    def adjust(self, pairs: Sequence[Pair]) -> None:
        P, Q = (_normalised(damped_inverse(gram, self.damping)) for gram in reversed(grams(pairs)))
        first = not self.state[pairs[0][0]]
        for (A, B), left, right in zip(pairs, P, Q):
            if not first:
                A.grad = left @ A.grad
            B.grad = B.grad @ right


def _normalised(X: Tensor) -> Tensor:
    return X / torch.linalg.matrix_norm(X, keepdim=True)
