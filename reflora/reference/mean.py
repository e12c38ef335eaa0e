"""S of a pair in float64, and what depends only on it: decisions, refactoring, preconditioning, known smoothness."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def geometric_mean(X: Tensor, Y: Tensor) -> Tensor:
    """`X # Y = X^(1/2) (X^(-1/2) Y X^(-1/2))^(1/2) X^(1/2)` of SPD `[..., n, n]` (paper, Lemma 7).

    By Cholesky factors and one SVD, `Ly^T Lx^-T = U diag(s) V^T`, `X # Y = Lx V diag(s) V^T Lx^T`: the formula above
    would square the condition number.
    """
    Lx, Ly = (torch.linalg.cholesky(_symmetric(M.double())) for M in (X, Y))
    _, s, Vh = torch.linalg.svd(torch.linalg.solve_triangular(Lx, Ly, upper=False).mT)
    half = (Lx @ Vh.mT) * s.sqrt().unsqueeze(-2)
    return half @ half.mT


def sqrtm(X: Tensor) -> Tensor:
    """The SPD square root of SPD `[..., n, n]`."""
    w, V = torch.linalg.eigh(_symmetric(X.double()))
    return (V * w.clamp_min(0).sqrt().unsqueeze(-2)) @ V.mT


def polar(X: Tensor) -> tuple[Tensor, Tensor]:
    """`X = Q H`, Q orthogonal, H symmetric positive semidefinite, of `[..., n, n]`."""
    U, s, Vh = torch.linalg.svd(X.double())
    return U @ Vh, (Vh.mT * s.unsqueeze(-2)) @ Vh


class Refactoring(NamedTuple):
    """S and the factor P with `S = P P^T`; refactored factors are `P^T A` and `B P^-T`.

    S, S_inv, P, P_inv_T: `[r, r]`. spectrum: the r singular values of `B A`.
    """

    S: Tensor
    S_inv: Tensor
    P: Tensor
    P_inv_T: Tensor
    spectrum: Tensor


def refactoring(A: Tensor, B: Tensor) -> Refactoring:
    """`S = (A A^T)^-1 # (B^T B)` (paper, Theorem 3, equation 9) for factors of full rank.

    By QR of the factors, never by their Grams: `A^T = Qa La^T`, `B = Qb Lb^T`, SVD `Lb^T La = U diag(s) V^T`,
    `P = La^-T V diag(s)^(1/2)`. Accurate to about `eps k(A) k(B)`; the refactored Grams are both `diag(s)`.
    """
    La = torch.linalg.qr(A.double().mT).R.mT
    Lb = torch.linalg.qr(B.double()).R.mT
    U, s, Vh = torch.linalg.svd(Lb.mT @ La)
    root = s.sqrt()
    P = torch.linalg.solve_triangular(La.mT, Vh.mT * root, upper=True)
    P_inv_T = torch.linalg.solve_triangular(Lb.mT, U * root, upper=True)
    # B = Qb Lb^T gives B P^-T = Qb Lb^T La V s^(-1/2) = Qb U s^(1/2), hence P^-T = Lb^-T U s^(1/2)
    return Refactoring(P @ P.mT, P_inv_T @ P_inv_T.mT, P, P_inv_T, s)


MEET = 0.999


def shrink_weight(steps: float, start: float) -> float:
    """Weight of the Grams in the S of a step: `w = n^2 / (n^2 + start^2)`, n the steps that a pair has done before.

    They are counted from the last one that began with A or B at 0.
    w goes from 0 at the first step over 1/2 at `start` to 1. From B = 0, Adam's first steps are nearly of rank one; S
    takes on the shape of B, and would keep it so (docs/mathematics.md).
    """
    return steps**2 / (steps**2 + start**2)


def shrunk(A: Tensor, B: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Factors whose Grams are `w G + (1 - w) tr(G) / r I`: a multiple of I is appended as columns (rows of B)."""

    def widened(X: Tensor) -> Tensor:
        r = X.shape[0]
        more = (1 - weight) ** 0.5 * norm(X) / r**0.5 * torch.eye(r, dtype=torch.float64)
        return torch.cat([weight**0.5 * X.double(), more], 1)

    return widened(A), widened(B.mT).mT


def balance_scalar(A: Tensor, B: Tensor) -> Tensor:
    """`s = ||B||_F / ||A||_F`: RefLoRA-S (paper, Theorem 5), and the S = s I of a degenerate layer."""
    return norm(B) / norm(A)


def meet(storage: torch.dtype) -> float:
    """Ratio of norms from which they count as equal: what balancing factors of that dtype leaves of it.

    sqrt(s) of 16-bit factors is a power of two, so they cannot be balanced better than within a factor of two.
    """
    return 0.5 if storage in (torch.bfloat16, torch.float16) else MEET


def met(old_A: Tensor, old_B: Tensor, A: Tensor, B: Tensor, equal: float = MEET) -> bool:
    """Whether in a step the smaller factor has caught up with the other in norm: RefLoRA-S balances from then on.

    Norms equal before it, up to `equal` (from `meet`), have met, so that rounding decides nothing.

    Adam's step moves every element by about the rate, so the product moves by rate times `||A|| + ||B||`; balancing a
    pair with `||B|| = s ||A||` multiplies that by `2 sqrt(s) / (1 + s)`, which costs nothing at s = 1.
    """
    old = [float(norm(X)) for X in (old_A, old_B)]
    new = [float(norm(X)) for X in (A, B)]
    crossed = (old[1] <= old[0] and new[1] >= new[0]) or (old[1] >= old[0] and new[1] <= new[0])
    return crossed or min(old) >= equal * max(old)


def condition(A: Tensor) -> Tensor:
    """Frobenius condition estimate `||L||_F ||L^-1||_F` of `A [r, n]`, with `A A^T = L L^T`; inf when singular."""
    singular_values = torch.linalg.svdvals(A.double())
    if A.shape[0] > A.shape[1] or singular_values[-1] == 0:
        return torch.tensor(torch.inf, dtype=torch.float64)
    scaled = singular_values / singular_values[0]
    return scaled.norm() * (1 / scaled).norm()


def present(A: Tensor, B: Tensor) -> Tensor:
    """Which of the r ranks are not 0 in both factors, `[r]` bool: ranks padded with zeros get no gradient either."""
    return A.ne(0).any(1) | B.ne(0).any(0)


def choose(A: Tensor, B: Tensor, kappa_max: float = 1e6, weight: float | None = None) -> tuple[Tensor, Tensor, str]:
    """The S a step uses, its inverse, and why: "refactored", "degenerate" or "skipped".

    weight: None for the paper's S; else, from `shrink_weight`, S of the factors with shrunk Grams over the balance
    scalar: Adam, which divides constants away, would take its growth from B = 0 for a trend of the gradient.

    A degenerate layer (a condition estimate past `kappa_max`, or n < r) uses `S = s I` with the balance scalar,
    `S = I` where a norm is zero. A layer with a non-finite factor is skipped. Ranks that are not `present` get that
    multiple of I, and the others the S of the layer without them (docs/mathematics.md).
    """
    eye = torch.eye(A.shape[0], dtype=torch.float64)
    if not (A.isfinite().all() and B.isfinite().all()):
        return eye, eye, "skipped"
    s = eye[0, 0] if weight is not None or norm(A) == 0 or norm(B) == 0 else balance_scalar(A, B)
    there = present(A, B)
    a, b = A[there], B[:, there]
    wide = len(a) <= min(A.shape[1], B.shape[0])
    own = (a, b) if weight is None else shrunk(a, b, weight)
    if wide and min(norm(A), norm(B)) > 0 and max(condition(own[0]), condition(own[1].mT)) <= kappa_max:
        result = refactoring(*own)
        scale = 1.0 if weight is None else balance_scalar(A, B)
        S, S_inv = s * eye, eye / s
        S[there[:, None] & there], S_inv[there[:, None] & there] = (
            (result.S / scale).flatten(), (result.S_inv * scale).flatten()
        )  # fmt: skip
        return S, S_inv, "refactored"
    return s * eye, eye / s, "degenerate"


def refactor(A: Tensor, B: Tensor, scalar: bool = False) -> tuple[Tensor, Tensor]:
    """The balanced pair with the same B A: `(P^T A, B P^-T)`, or `(sqrt(s) A, B / sqrt(s))` for RefLoRA-S."""
    if scalar:
        root = balance_scalar(A, B).sqrt()
        return root * A.double(), B.double() / root
    there = present(A, B)
    result = refactoring(A[there], B[:, there])
    new_A, new_B = A.double().clone(), B.double().clone()
    new_A[there], new_B[:, there] = result.P.mT @ new_A[there], new_B[:, there] @ result.P_inv_T
    return new_A, new_B


def precondition(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, weight: float | None = None
) -> tuple[Tensor, Tensor]:
    """`(S^-1 gA, gB S)`: the step of the refactored pair, in the axes of the original one (paper, section 3.3)."""
    S, S_inv, _ = choose(A, B, weight=weight)
    return S_inv @ grad_A.double(), grad_B.double() @ S


def known_smoothness(
    A: Tensor, B: Tensor, L: float, lr: float, scaling: float = 1.0, upper: bool = True
) -> Tensor | None:
    """S of Theorem 3, equation (10), when the smoothness constant L of the loss in W is known.

    `t = 1 / (L lr scaling^2)`, `k = ||B A||_*`. For `2 k >= t` the balanced S; else `c S` with
    `c = (t ± sqrt(t^2 - 4 k^2)) / (2 k)` (`upper` picks the sign). None where k = 0: take a plain step.
    """
    result = refactoring(A, B)
    t, k = 1 / (L * lr * scaling**2), float(result.spectrum.sum())
    if k == 0:
        return None
    return result.S * _branch(t, k, k, upper)


def known_smoothness_scalar(
    A: Tensor, B: Tensor, L: float, lr: float, scaling: float = 1.0, upper: bool = True
) -> Tensor | None:
    """s of Theorem 5 for a known L; with `a = ||A||_F^2`, `b = ||B||_F^2`: `(t ± sqrt(t^2 - 4 a b)) / (2 a)`."""
    t = 1 / (L * lr * scaling**2)
    a, b = float(norm(A)) ** 2, float(norm(B)) ** 2
    if a == 0 or b == 0:
        return None
    return balance_scalar(A, B) * _branch(t, (a * b) ** 0.5, (a * b) ** 0.5, upper)


def upper_bound(A: Tensor, B: Tensor, S: Tensor, L: float, lr: float, scaling: float = 1.0) -> Tensor:
    """What S minimises: `(tr(S Ga) + tr(S^-1 Gb) - t)^2`, `t = 1 / (L lr scaling^2)` (paper, equation 8)."""
    Ga, Gb = A.double() @ A.double().mT, B.double().mT @ B.double()
    return (torch.trace(S @ Ga) + torch.trace(torch.linalg.solve(S, Gb)) - 1 / (L * lr * scaling**2)) ** 2


def transport(exp_avg: Tensor, exp_avg_sq: Tensor, factor: float | Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments once gradients are measured in units `factor` times larger: `m * factor, v * factor^2`.

    Refactoring by the scalar s moves A's moments by `1 / sqrt(s)` and B's by `sqrt(s)` (paper, section 3.3);
    a layer whose S changes from I to about `c I` moves A's by `1 / c` and B's by `c`.
    """
    return exp_avg * factor, exp_avg_sq * factor**2


def _branch(t: float, k: float, half: float, upper: bool) -> float:
    if 2 * k >= t:
        return 1.0
    root = (t * t - 4 * k * k) ** 0.5
    return (t + root) / (2 * half) if upper else 2 * k * k / (t + root) / half


def norm(X: Tensor) -> Tensor:
    """Frobenius norm that neither overflows nor underflows."""
    X = X.double()
    top = X.abs().max()
    return top * (X / top).norm() if top > 0 and torch.isfinite(top) else top


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2
