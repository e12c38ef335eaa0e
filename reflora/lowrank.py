"""B A as a singular value decomposition, by way of r x r matrices: B A itself is never formed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# matrices up to this size go to LAPACK; subspace iteration ends when a round recovers less than this share of the lost
# energy, or after this many rounds
SMALL, GAIN, ROUNDS = 256, 1e-4, 60


@dataclass(frozen=True)
class SVD:
    """`B A = Q_B u diag(s) vh Q_A^T`, in float64: Q_B `[n_out, .]` and Q_A `[n_in, .]` have orthonormal columns, u
    `[., k]`, s `[k]` in descending order, vh `[k, .]`.
    """

    Q_B: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor
    Q_A: Tensor

    def cut(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(A `[rank, n_in]`, B `[n_out, rank]`), the nearest B A of that rank, with `A A^T = B^T B = diag(s)`.

        Past the number of singular values, the rows of A are drawn at random with the mean size of the others, or 1
        over the root of n_in, and the columns of B are 0: B A is what it was, and training can use them.
        """
        k = min(rank, len(self.s))
        root = self.s[:k].sqrt()
        A, B = (root[:, None] * self.vh[:k]) @ self.Q_A.mT, self.Q_B @ (self.u[:, :k] * root)
        if rank == k:
            return A, B
        n_in = A.shape[1]
        size = A.square().mean().sqrt() if float(root.sum()) > 0 else A.new_tensor(n_in**-0.5)
        drawn = torch.randn(rank - k, n_in, generator=generator, dtype=A.dtype, device="cpu").to(A.device)
        return torch.cat([A, size * drawn]), torch.cat([B, B.new_zeros(B.shape[0], rank - k)], dim=1)


def svd(A: Tensor, B: Tensor) -> SVD:
    """The singular value decomposition of B A, exactly: A `[r, n_in]` and B `[n_out, r]` of any floating dtype, both
    finite; k is the least of r, n_in and n_out.
    """
    A, B, size = _unit(A, B)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return SVD(Q_B, u, s * size, vh, Q_A)


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The singular values of B A in descending order, float64 `[k]`; NaN where a factor is not finite."""
    A, B, size = _unit(A, B)
    if math.isnan(size):
        return A.new_full((min(*A.shape, B.shape[0]),), size)
    return torch.linalg.svdvals(torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT) * size


def leading(D: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U `[m, k]`, s `[k]`, V^T `[k, n]`): the first k = min(rank, m, n) singular values of D `[m, n]`, with vectors.

    A small D, or a rank near its size, takes LAPACK's decomposition; a large one subspace iteration (Halko, Martinsson
    and Tropp, arXiv 0909.4061) with `k / 4 + 8` further vectors, until a round recovers too little of what is lost.
    """
    k = min(rank, *D.shape)
    width = k + k // 4 + 8
    if min(D.shape) <= max(SMALL, 3 * width):
        U, s, Vt = torch.linalg.svd(D, full_matrices=False)
        return U[:, :k], s[:k], Vt[:k]
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(D.shape[1], width, generator=generator, dtype=D.dtype, device="cpu").to(D.device)
    Q, kept, whole = torch.linalg.qr(D @ start).Q, 0.0, float(D.norm()) ** 2
    for _ in range(ROUNDS):
        P = torch.linalg.qr(D.mT @ Q).Q
        Q, R = torch.linalg.qr(D @ P)
        u, s, vh = torch.linalg.svd(R)
        before, kept = kept, float(s[:k].square().sum())
        if kept - before <= max(GAIN * (whole - kept), torch.finfo(D.dtype).eps * whole):
            break
    return Q @ u[:, :k], s[:k], vh[:k] @ P.mT


def rank_for(s: Tensor, energy: float, norm: float | None = None) -> int:
    """The least rank that keeps this share of `sum(s^2)`, or of `norm^2`: at least 1, at most what s has."""
    share = s / s[0] if float(s[0]) > 0 else s
    kept = share.square().cumsum(0)
    whole = kept[-1] if norm is None else (norm / max(float(s[0]), 1e-300)) ** 2
    # a share of 1 asks for all but what rounding adds
    enough = kept >= energy * whole * (1 - 1e-14)
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else len(s)


def distance(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], norm: float) -> float:
    """`||B A - B' A'||_F / ||B A||_F` of (A, B) and (A', B') of any two ranks, by r x r products in float64.

    norm: `||B A||_F`, not 0. Good to 1e-8, as what it subtracts are squares.
    """
    (A, B, size), (new_A, new_B, new_size) = _unit(*old), _unit(*new)
    size, new_size = size / norm, new_size / norm
    cross = ((A @ new_A.mT) * (B.mT @ new_B)).sum()
    square = ((new_A @ new_A.mT) * (new_B.mT @ new_B)).sum()
    return math.sqrt(max(1 - 2 * float(cross) * size * new_size + float(square) * new_size**2, 0.0))


def _unit(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, float]:
    """A and B in float64, divided by their largest entries if a square could overflow or vanish, and the product of
    these; NaN where an entry is not finite.
    """
    A, B = A.double(), B.double()
    scales = [float(t.abs().max()) for t in (A, B)]
    if not all(map(math.isfinite, scales)):
        return A, B, math.nan
    scales = [1.0 if scale == 0 or 1e-70 < scale < 1e70 else scale for scale in scales]
    return A / scales[0] if scales[0] != 1 else A, B / scales[1] if scales[1] != 1 else B, scales[0] * scales[1]
