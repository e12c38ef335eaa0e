"""The r x r solve of the torch backend, batched: Cholesky of both Grams, one polar factor, S (docs/mathematics.md).

Matrices are `[batch, r, r]` in the compute type; nothing here reads a value on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..columns import DEGENERATE, REFACTORED, SKIPPED
from ..constants import KAPPA_MAX, KAPPA_OF_RANK
from ..reference import MEET

# enough for every X that is not degenerate, and more than most need: convergence is not checked
SCHULZ_STEPS = 22


class Gram(NamedTuple):
    """Gram of factors `[b, r, n]` over its trace; I for a zero or non-finite factor.

    norm: Frobenius norms `[b]`, float64. usable: whether the factor is finite and not zero. n: its other side.
    empty: which rows of a usable factor are 0 `[b, r]`; squares of others may be too small for the compute dtype.
    """

    unit: Tensor
    norm: Tensor
    usable: Tensor
    n: int | Tensor
    empty: Tensor


class Cholesky(NamedTuple):
    """Cholesky factors of shrunk Grams and their inverses (I where they broke down).

    kappa: `||L||_F ||L^-1||_F` `[b]`, float64, inf where the Gram is numerically singular.
    """

    L: Tensor
    L_inv: Tensor
    kappa: Tensor


class Solution(NamedTuple):
    """S and its inverse `[b, r, r]` in the apply dtype, P and P^-T (`S = P P^T`) in float64; what is reported `[b]`."""

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
    """X `[b, r, n]` of any storage dtype. Powers of two keep its squares inside the range of the compute dtype."""
    tops = X.abs().amax(2)
    top = tops.amax(1).double()
    usable = top.isfinite() & (top > 0)
    exponent = torch.frexp(top.where(usable, torch.ones_like(top))).exponent.clamp(-1000, 1000)
    scaled = torch.ldexp(X.double(), -exponent.view(-1, 1, 1)).to(compute)
    G = scaled @ scaled.mT
    trace = G.diagonal(dim1=1, dim2=2).sum(1)
    norm = torch.ldexp(trace.double().sqrt(), exponent).where(usable, top)
    eye = torch.eye(X.shape[1], dtype=compute, device=X.device)
    unit = (G / trace.view(-1, 1, 1)).where(usable.view(-1, 1, 1), eye)
    return Gram(unit, norm, usable, X.shape[2], (tops == 0) & usable[:, None])


def gram_of_sums(G: Tensor, n: Tensor, compute: torch.dtype) -> Gram:
    """From float64 Grams `[b, r, r]` of factors whose other sides are `n [b]`."""
    diagonal = G.diagonal(dim1=1, dim2=2)
    trace = diagonal.sum(1)
    usable = trace.isfinite() & (trace > 0)
    eye = torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    unit = (G / trace.view(-1, 1, 1)).where(usable.view(-1, 1, 1), eye)
    return Gram(unit.to(compute), trace.sqrt(), usable, n, (diagonal == 0) & usable[:, None])


def absent(a: Gram, b: Gram) -> Tensor:
    """Which ranks are 0 in both factors, `[b, r]`."""
    return a.empty & b.empty


def cholesky(G: Gram, weight: Tensor | None, missing: Tensor) -> Cholesky:
    """Cholesky factors of Grams shrunk with the weights `[b]`, None for 1 (reference.shrink_weight).

    missing: from `absent`. These ranks have the diagonal of I over the number of the others, and no part in kappa.
    """
    r, dtype = G.unit.shape[1], G.unit.dtype
    eye = torch.eye(r, dtype=dtype, device=G.unit.device)
    count = missing.sum(1).double()
    rank = r - count
    unit = G.unit + torch.diag_embed(missing / rank[:, None]).to(dtype)
    if weight is not None:
        own, other = weight.view(-1, 1, 1).to(dtype), ((1 - weight) / rank).view(-1, 1, 1).to(dtype)
        unit = own * unit + other * eye
    L, broke = torch.linalg.cholesky_ex(unit)
    sound = ((broke == 0) & G.usable & (rank <= G.n)).view(-1, 1, 1)
    L = L.tril().where(sound, eye)
    L_inv = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
    whole = (_frobenius(L) * _frobenius(L_inv)).double().view(-1)
    kappa = (whole.square() / (1 + count / rank) - count * rank).sqrt()
    return Cholesky(L, L_inv, torch.where(count > 0, kappa, whole).where(sound.view(-1), torch.inf))


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
    """`S = c La^-T Q^T Lb^T` with `Lb^T La = Q H`; degenerate rows get c I, or I where c is unusable.

    weight: None for the paper's S; else Grams are shrunk with it, and S and S^-1 come without c.
    """
    eye = torch.eye(a.unit.shape[1], dtype=a.unit.dtype, device=a.unit.device)
    missing = absent(a, b)
    rank = a.unit.shape[1] - missing.sum(1).double()
    of_A, of_B = cholesky(a, weight, missing), cholesky(b, weight, missing)
    most = (KAPPA_OF_RANK[precision] * rank.sqrt()).clamp(max=KAPPA_MAX[precision])
    regular = (of_A.kappa <= most) & (of_B.kappa <= most)
    keep = regular.view(-1, 1, 1)
    La, La_inv, Lb, Lb_inv = (M.where(keep, eye) for M in (of_A.L, of_A.L_inv, of_B.L, of_B.L_inv))
    N = Lb.mT @ La
    Q = polar_factor(N, Lb_inv @ La_inv.mT)
    C, broke = torch.linalg.cholesky_ex(_symmetric(Q.mT @ N))

    c, useful = ratio(a, b, apply)
    huge = torch.finfo(apply).max
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
    return Solution(
        S.where(keep, c_col * eye).to(apply), S_inv.where(keep, eye / c_col).to(apply),
        P, P_inv_T, status, c, imbalance(a, b), of_A.kappa, of_B.kappa,
    )  # fmt: skip


def damped(a: Gram, b: Gram, reg: float, apply: torch.dtype, precision: str) -> Solution:
    """`(A A^T + reg I)^-1` as S and `(B^T B + reg I)^-1` as S^-1 (reference.damped_inverses), without P."""
    r = a.unit.shape[1]
    eye = torch.eye(r, dtype=a.unit.dtype, device=a.unit.device)
    most = min(KAPPA_MAX[precision], KAPPA_OF_RANK[precision] * r**0.5)
    inverses, plain, kappas, regular = [], [], [], torch.ones_like(a.usable)
    for one in (a, b):
        square = one.norm.square()
        size = square.clamp_min(reg)
        useful = usable(size, apply)
        size = size.where(useful, 1.0)
        own, other = ((x / size).where(useful, 0.0).view(-1, 1, 1).to(eye) for x in (square, square.new_full((), reg)))
        L, broke = torch.linalg.cholesky_ex(own * one.unit + other * eye)
        sound = useful & (broke == 0)
        L = L.tril().where(sound.view(-1, 1, 1), eye)
        L_inv = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        kappas.append((_frobenius(L) * _frobenius(L_inv)).double().view(-1).where(sound, torch.inf))
        regular = regular & sound & (kappas[-1] <= most)
        inverses.append((L_inv.mT @ L_inv).double() / size.view(-1, 1, 1))
        plain.append(eye.double() / size.view(-1, 1, 1))
    finite = a.norm.isfinite() & b.norm.isfinite()
    status = torch.full_like(a.norm, REFACTORED).where(regular, DEGENERATE).where(finite, SKIPPED)
    keep = regular.view(-1, 1, 1)
    S, S_inv = (x.where(keep, y).to(apply) for x, y in zip(inverses, plain))
    c = ratio(a, b, apply)[0].where(finite, 1.0)
    return Solution(S, S_inv, inverses[0], inverses[1], status, c, imbalance(a, b), *kappas)


def ratio(a: Gram, b: Gram, apply: torch.dtype) -> tuple[Tensor, Tensor]:
    """(`c = ||B|| / ||A||` `[b]`, 1 where it is of no use; where it is)."""
    c = b.norm / a.norm
    useful = usable(c, apply)
    return c.where(useful, 1.0), useful


def imbalance(a: Gram, b: Gram) -> Tensor:
    """`||Ga - Gb||_F / ||Ga||_F` of the Grams themselves `[b]`; inf for A = 0."""
    above = torch.where(a.norm > 0, b.norm / a.norm, torch.inf).view(-1, 1, 1)
    distance = _frobenius(a.unit.double() - above**2 * b.unit) / _frobenius(a.unit.double())
    return distance.where(a.norm.view(-1, 1, 1) > 0, torch.inf).view(-1)


def balance(a: Gram, b: Gram, storage: torch.dtype, apply: torch.dtype) -> Solution:
    """S = s I, `s = ||B||_F / ||A||_F` (RefLoRA-S); degenerate where s is unusable. Nothing else is measured.

    For 16-bit factors sqrt(s) is a power of two: multiplying by it rounds nothing.
    """
    s = b.norm / a.norm
    useful = usable(s, apply) & fits(a, b, storage)
    if storage in (torch.bfloat16, torch.float16):
        s = torch.exp2(2 * (s.log2() / 2).round())
    s = s.where(useful, 1.0)
    finite = a.norm.isfinite() & b.norm.isfinite()
    status = torch.full_like(s, REFACTORED).where(useful, DEGENERATE).where(finite, SKIPPED)
    column, eye = s.view(-1, 1, 1), torch.eye(a.unit.shape[1], dtype=torch.float64, device=s.device)
    root, none = column.sqrt(), torch.full_like(s, torch.nan)
    S, S_inv = (column * eye).to(apply), (eye / column).to(apply)
    return Solution(S, S_inv, root * eye, eye / root, status, s, none, none, none)


def usable(c: Tensor, apply: torch.dtype) -> Tensor:
    """Whether c and 1 / c are normal numbers of the dtype in which S is applied."""
    tiny, huge = torch.finfo(apply).tiny, torch.finfo(apply).max
    return (c >= tiny) & (c <= huge) & (1 / c >= tiny) & (1 / c <= huge)


def met(old_A: Tensor, old_B: Tensor, norm_A: Tensor, norm_B: Tensor, equal: float = MEET) -> Tensor:
    """Whether the smaller of two norms has caught up with the other, elementwise (reference.met)."""
    below, above = (old_B <= old_A) & (norm_B >= norm_A), (old_B >= old_A) & (norm_B <= norm_A)
    return below | above | (old_A.minimum(old_B) >= equal * old_A.maximum(old_B))


def fits(a: Gram, b: Gram, storage: torch.dtype) -> Tensor:
    """Whether balanced factors can be stored: their norms are at most sqrt(||A|| ||B||), or sqrt(2) times that."""
    return a.norm.sqrt() * b.norm.sqrt() <= torch.finfo(storage).max / 2


def _frobenius(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2
