"""The damped inverse Grams in front of AdamW that PEFT's `create_riemannian_optimizer` has, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mean import norm


def damped_inverses(A: Tensor, B: Tensor, reg: float, kappa_max: float = 1e6) -> tuple[Tensor, Tensor, str]:
    """`(A A^T + reg I)^-1` for the gradient of B, `(B^T B + reg I)^-1` for that of A, and why.

    Riemannian preconditioned LoRA (arXiv 2402.02347), or ScaledGD with damping. `reg` > 0 is in units of the Grams, so
    a factor at 0 is nothing special. "degenerate" where the Cholesky factor of either sum has a condition
    estimate past `kappa_max`: then both are I over the larger of `reg` and the trace of the Gram.
    """
    eye = torch.eye(A.shape[0], dtype=torch.float64)
    found, sizes, regular = [], [], True
    for X in (A.double(), B.double().mT):
        size = max(float(norm(X)) ** 2, reg)
        L = torch.linalg.qr(torch.cat([X, reg**0.5 * eye], 1).mT / size**0.5).R.mT
        found.append(torch.cholesky_inverse(L) / size)
        sizes.append(size)
        condition = L.norm() * torch.linalg.inv(L).norm() if L.diagonal().all() else math.inf
        regular = regular and bool(condition <= kappa_max)
    if regular:
        return found[0], found[1], "refactored"
    return eye / sizes[0], eye / sizes[1], "degenerate"
