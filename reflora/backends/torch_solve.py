"""The r x r solve of the torch backend, batched: Cholesky of both Grams, one polar factor, S (docs/mathematics.md).

Matrices are `[batch, r, r]` in the compute type; nothing here reads a value on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import DEGENERATE, KAPPA_MAX, KAPPA_OF_RANK, REFACTORED, SKIPPED
from ..reference import MEET

# enough for every X that is not degenerate, and more than most need: nothing here asks whether it has converged
SCHULZ_STEPS = 22


class Gram(NamedTuple):
    """Gram of factors `[b, r, n]` over its trace, that of a zero or non-finite factor replaced by I.

    norm: Frobenius norms `[b]`, float64. sound: whether the factor is finite, not zero, and n >= r.
    """

    unit: Tensor
    norm: Tensor
    sound: Tensor


class Cholesky(NamedTuple):
    """Cholesky factors of shrunk Grams and their inverses (I where they broke down).

    kappa: `||L||_F ||L^-1||_F` `[b]`, float64, inf where the Gram is numerically singular.
    """

    L: Tensor
    L_inv: Tensor
    kappa: Tensor


class Solution(NamedTuple):
    """S and its inverse `[b, r, r]` in the apply type; status, SCALE (c), BALANCE and kappas `[b]` in float64."""

    S: Tensor
    S_inv: Tensor
    P: Tensor
    P_inv_T: Tensor
    status: Tensor
    scale: Tensor
    balance: Tensor
    kappa_A: Tensor
    kappa_B: Tensor


def gram(X: Tensor, compute: torch.dtype) -> Gram:
    """X `[b, r, n]` of any storage type. Powers of two keep its squares inside the range of the compute type."""
    top = X.abs().amax((1, 2)).double()
    usable = top.isfinite() & (top > 0)
    exponent = torch.frexp(top.where(usable, torch.ones_like(top))).exponent.clamp(-1000, 1000)
    scaled = torch.ldexp(X.double(), -exponent.view(-1, 1, 1)).to(compute)
    G = scaled @ scaled.mT
    trace = G.diagonal(dim1=1, dim2=2).sum(1)
    norm = torch.ldexp(trace.double().sqrt(), exponent).where(usable, top)
    eye = torch.eye(X.shape[1], dtype=compute, device=X.device)
    unit = (G / trace.view(-1, 1, 1)).where(usable.view(-1, 1, 1), eye)
    return Gram(unit, norm, usable & (X.shape[1] <= X.shape[2]))


def cholesky(G: Gram, weight: Tensor | None) -> Cholesky:
    """Of Grams that are shrunk with the weights `[b]`, None for 1 (reference.shrink_weight)."""
    r, dtype = G.unit.shape[1], G.unit.dtype
    eye = torch.eye(r, dtype=dtype, device=G.unit.device)
    unit = G.unit
    if weight is not None:
        own, other = weight.view(-1, 1, 1).to(dtype), ((1 - weight) / r).view(-1, 1, 1).to(dtype)
        unit = own * unit + other * eye
    L, broke = torch.linalg.cholesky_ex(unit)
    sound = ((broke == 0) & G.sound).view(-1, 1, 1)
    L = L.tril().where(sound, eye)
    L_inv = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
    kappa = (_frobenius(L) * _frobenius(L_inv)).double().where(sound, torch.inf)
    return Cholesky(L, L_inv, kappa.view(-1))


def polar_factor(X: Tensor, X_inv_T: Tensor, steps: int = SCHULZ_STEPS) -> Tensor:
    """The orthogonal polar factor of X `[batch, r, r]`, given X^-T.

    One step of Higham's scaled Newton iteration takes the root of the condition number; the cubic Newton-Schulz steps
    that follow, scaled as by Chen and Chow for singular values in [low, 1], are products of matrices only.
    """
    z = (_frobenius(X_inv_T) / _frobenius(X)).sqrt()
    X = (z * X + X_inv_T / z) / 2
    low = _frobenius(X.mT @ X).rsqrt()
    X = X * low
    for _ in range(steps):
        square = 3 / (1 + low + low * low)
        root = square.sqrt()
        X = 1.5 * root * X - 0.5 * root * square * (X @ (X.mT @ X))
        done = steps > SCHULZ_STEPS and X.device.type == "cpu" and bool((low > 1 - 1e-8).all())
        if done:
            break
        low = (0.5 * root * low * (3 - square * low * low)).clamp(max=1.0)
    return X


def solve(a: Gram, b: Gram, apply: torch.dtype, precision: str, weight: Tensor | None = None) -> Solution:
    """`S = c La^-T Q^T Lb^T` with `Lb^T La = Q H`; degenerate rows get c I, or I where c is of no use.

    weight: None for the paper's S; else Grams are shrunk with it, and S and S^-1 come without c.
    """
    eye = torch.eye(a.unit.shape[1], dtype=a.unit.dtype, device=a.unit.device)
    of_A, of_B = cholesky(a, weight), cholesky(b, weight)
    most = min(KAPPA_MAX[precision], KAPPA_OF_RANK[precision] * a.unit.shape[1] ** 0.5)
    regular = (of_A.kappa <= most) & (of_B.kappa <= most)
    keep = regular.view(-1, 1, 1)
    La, La_inv, Lb, Lb_inv = (M.where(keep, eye) for M in (of_A.L, of_A.L_inv, of_B.L, of_B.L_inv))
    N = Lb.mT @ La
    Q = polar_factor(N, Lb_inv @ La_inv.mT)
    C, broke = torch.linalg.cholesky_ex(_symmetric(Q.mT @ N))

    c = b.norm / a.norm
    tiny, huge = torch.finfo(apply).tiny, torch.finfo(apply).max
    useful = (c >= tiny) & (c <= huge) & (1 / c >= tiny) & (1 / c <= huge)
    c = c.where(useful, 1.0)
    scale = c if weight is None else torch.ones_like(c)
    c_col = scale.view(-1, 1, 1)
    S = c_col * _symmetric(La_inv.mT @ Q.mT @ Lb.mT).double()
    S_inv = _symmetric(Lb_inv.mT @ Q @ La.mT).double() / c_col
    fits = (S.abs().amax((1, 2)) <= huge) & (S_inv.abs().amax((1, 2)) <= huge)  # false for NaN too
    regular = regular & useful & fits & (broke == 0)

    finite = a.norm.isfinite() & b.norm.isfinite()
    status = torch.full_like(c, REFACTORED).where(regular, DEGENERATE).where(finite, SKIPPED)
    c = c.where(finite, 1.0)
    scale = c if weight is None else torch.ones_like(c)
    keep, c_col = regular.view(-1, 1, 1), scale.view(-1, 1, 1)
    root = c_col.sqrt()
    P = (root * (La_inv.mT @ C).double()).where(keep, root * eye)
    C_inv_T = torch.linalg.solve_triangular(C.where(keep, eye), eye.expand_as(C), upper=False).mT
    P_inv_T = ((La @ C_inv_T).double() / root).where(keep, eye / root)
    ratio = torch.where(a.norm > 0, b.norm / a.norm, torch.inf).view(-1, 1, 1)
    distance = _frobenius(a.unit.double() - ratio**2 * b.unit) / _frobenius(a.unit.double())
    distance = distance.where(a.norm.view(-1, 1, 1) > 0, torch.inf)
    return Solution(
        S.where(keep, c_col * eye).to(apply), S_inv.where(keep, eye / c_col).to(apply),
        P, P_inv_T, status, c, distance.view(-1), of_A.kappa, of_B.kappa,
    )  # fmt: skip


def balance(a: Gram, b: Gram, solution: Solution, storage: torch.dtype, apply: torch.dtype) -> Solution:
    """`solution` with S = s I, `s = ||B||_F / ||A||_F` (RefLoRA-S); degenerate where s is of no use.

    For factors of 16 bits sqrt(s) is a power of two: multiplying them by it rounds nothing.
    """
    s = b.norm / a.norm
    if storage in (torch.bfloat16, torch.float16):
        s = torch.exp2(2 * (s.log2() / 2).round())
    useful = (s >= torch.finfo(apply).tiny) & (s <= torch.finfo(apply).max) & fits(a, b, storage)
    s = s.where(useful, 1.0)
    status = torch.full_like(s, REFACTORED).where(useful, DEGENERATE).where(solution.status != SKIPPED, SKIPPED)
    column, eye = s.view(-1, 1, 1), torch.eye(a.unit.shape[1], dtype=torch.float64, device=s.device)
    return solution._replace(S=(column * eye).to(apply), S_inv=(eye / column).to(apply), status=status, scale=s)


def met(old_A: Tensor, old_B: Tensor, norm_A: Tensor, norm_B: Tensor, equal: float = MEET) -> Tensor:
    """Whether the smaller of two norms has come up to the other, elementwise (reference.met)."""
    below, above = (old_B <= old_A) & (norm_B >= norm_A), (old_B >= old_A) & (norm_B <= norm_A)
    return below | above | (old_A.minimum(old_B) >= equal * old_A.maximum(old_B))


def fits(a: Gram, b: Gram, storage: torch.dtype) -> Tensor:
    """Whether balanced factors can be stored: their norms are at most sqrt(||A|| ||B||), or sqrt(2) times that."""
    return a.norm.sqrt() * b.norm.sqrt() <= torch.finfo(storage).max / 2


def _frobenius(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2
