"""BaLoRA: AdamW, and after each step the balanced pair of the same product.

Castin, Nadjahi, Ablin and Peyre, arXiv 2605.31484, Algorithm 2: with the thin SVD `B A = U diag(s) V^T`,
`B <- U s^(1/2)` and `A <- s^(1/2) V^T`, so that `A A^T = B^T B`, and diagonal. Adam's moments stay as they are. In
the authors' order: polar factors of A and B, then the SVD of the `[r, r]` product of their symmetric parts, which also
fixes the signs of the singular vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .common import Pair, by_rank

Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class BaLoRA(torch.optim.AdamW):
    """torch's fused AdamW with the projection behind it.

    svd: of `[pairs, r, r]`, as `torch.linalg.svd`, which is the default; another one may be given.
    """

    def __init__(
        self, parameters: Iterable[Tensor], pairs: Iterable[Pair], svd: Svd = torch.linalg.svd, **options: Any
    ):
        super().__init__(parameters, fused=True, **options)
        self.pairs, self.svd = list(pairs), svd

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = super().step(closure)
        for group in by_rank(self.pairs):
            project_(group, self.svd)
        return loss


@torch.no_grad()
def project_(pairs: Sequence[Pair], svd: Svd = torch.linalg.svd) -> None:
    """Balance pairs of one rank, in place. The thin factors go through QR, so that no Gram squares their condition."""
    thin_A, thin_B = ([torch.linalg.qr(factor) for factor in factors] for factors in zip(*((A.T, B) for A, B in pairs)))
    turn_A, part_A = _polar(torch.stack([factor.R for factor in thin_A]), svd)
    turn_B, part_B = _polar(torch.stack([factor.R for factor in thin_B]), svd)
    U, values, Vh = svd(part_B @ part_A)
    root = values.clamp(min=0).sqrt()
    left, right = turn_B @ (U * root[..., None, :]), turn_A @ (root[..., None, :] * Vh.mT)
    for index, (A, B) in enumerate(pairs):
        A.copy_((thin_A[index].Q @ right[index]).T)
        B.copy_(thin_B[index].Q @ left[index])


def _polar(R: Tensor, svd: Svd) -> tuple[Tensor, Tensor]:
    """`R = Q H`, Q orthogonal and H symmetric."""
    U, values, Vh = svd(R)
    return U @ Vh, (Vh.mT * values[..., None, :]) @ Vh
