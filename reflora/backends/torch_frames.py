"""Frames of a metric, and second moments whitened in them: reference.frames and reference.whitener, batched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..columns import DEGENERATE, REFACTORED, SKIPPED
from ..constants import KAPPA_MAX, KAPPA_OF_RANK
from .torch_solve import Gram, cholesky, imbalance, polar_factor, ratio, solve


class Frames(NamedTuple):
    """P_A and P_B `[b, r, r]`, float64, of the metrics `P P^T`; what is reported `[b]`."""

    of_A: Tensor
    of_B: Tensor
    status: Tensor
    scale: Tensor
    balance: Tensor
    kappa_A: Tensor
    kappa_B: Tensor


def frames(a: Gram, b: Gram, metric: str, apply: torch.dtype, precision: str) -> Frames:
    """The frames of a metric, from the Grams of both factors. S keeps its scale."""
    if metric == "identity":
        return _identity(a, b, apply)
    scaled = _scaled(a, b, apply, precision)
    if metric == "scaled":
        return scaled
    found = solve(a, b, apply, precision)
    empty = (a.norm == 0) | (b.norm == 0)
    either = empty.view(-1, 1, 1)
    return Frames(
        scaled.of_A.where(either, found.P_inv_T), scaled.of_B.where(either, found.P),
        scaled.status.where(empty, found.status), found.scale, found.balance,
        scaled.kappa_A.where(empty, found.kappa_A), scaled.kappa_B.where(empty, found.kappa_B),
    )  # fmt: skip


def whitener(V: Tensor, P: Tensor, damping: float, eps: float, compute: torch.dtype) -> Tensor:
    """`K [b, r, r]` of second moments V and frames P, float64, with its roots in `compute`. 0 where V tells nothing."""
    r = V.shape[1]
    framed = P.mT @ V @ P
    mean = framed.diagonal(dim1=1, dim2=2).sum(1) / r
    size = mean + eps**2
    useful = size.isfinite() & (mean > 0)
    size, mean = size.where(useful, 1.0), mean.where(useful, 1.0)
    eye = torch.eye(r, dtype=torch.float64, device=V.device)
    unit = framed / size.view(-1, 1, 1) + ((damping * mean + eps**2) / size).view(-1, 1, 1) * eye
    unit = ((unit + unit.mT) / 2).where(useful.view(-1, 1, 1), eye).to(compute)
    L, broke = torch.linalg.cholesky_ex(unit)
    # second moments from elsewhere may not be positive: their mean has to do
    L = L.tril().where((broke == 0).view(-1, 1, 1), eye.to(compute))
    L_inv = torch.linalg.solve_triangular(L, eye.to(compute).expand_as(L), upper=False)
    # L = H Q gives C^(-1/2) = H^-1 = Q L^-1
    root = (polar_factor(L, L_inv.mT) @ L_inv).double()
    K = P @ ((root + root.mT) / 2) @ P.mT / size.sqrt().view(-1, 1, 1)
    return K.where((useful & K.isfinite().all(2).all(1)).view(-1, 1, 1), 0.0)


def _identity(a: Gram, b: Gram, apply: torch.dtype) -> Frames:
    c, _ = ratio(a, b, apply)
    eye = torch.eye(a.unit.shape[1], dtype=torch.float64, device=c.device).expand(a.unit.shape)
    none = torch.full_like(c, torch.nan)
    return Frames(eye, eye, _status(torch.ones_like(c, dtype=torch.bool), a, b), c, none, none, none)


def _scaled(a: Gram, b: Gram, apply: torch.dtype, precision: str) -> Frames:
    c, _ = ratio(a, b, apply)
    (of_A, kappa_B, sound_B), (of_B, kappa_A, sound_A) = (_inverse_root(G, precision) for G in (b, a))
    return Frames(of_A, of_B, _status(sound_A & sound_B, a, b), c, imbalance(a, b), kappa_A, kappa_B)


def _inverse_root(G: Gram, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(P with `P P^T = (X X^T)^-1` for the X of a Gram, its condition estimate, whether it has full rank)."""
    r = G.unit.shape[1]
    rank = (r - G.empty.sum(1)).double()
    factor = cholesky(G, None, G.empty)
    most = (KAPPA_OF_RANK[precision] * rank.sqrt()).clamp(max=KAPPA_MAX[precision])
    sound = factor.kappa <= most
    eye = torch.eye(r, dtype=torch.float64, device=G.norm.device)
    size = G.norm.where(G.usable, rank.sqrt()).view(-1, 1, 1)
    P = factor.L_inv.mT.double().where(sound.view(-1, 1, 1), rank.sqrt().view(-1, 1, 1) * eye) / size
    return P, factor.kappa, sound


def _status(sound: Tensor, a: Gram, b: Gram) -> Tensor:
    finite = a.norm.isfinite() & b.norm.isfinite()
    return torch.full_like(a.norm, REFACTORED).where(sound, DEGENERATE).where(finite, SKIPPED)
