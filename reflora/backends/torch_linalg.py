"""Functions of batches of small matrices in torch operations: any device, any n, no kernels of its own.

Matrices are contiguous `[batch, n, n]` of float32 or float64; results are new, or written to `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .torch_solve import polar_factor

# at most, in a polar iteration: enough for any condition number, whereas a step of RefLoRA leaves out the worst layers
STEPS = 200


class Scaled:
    """Matrices over an even power of two near the largest element of each.

    stack: in the compute dtype, zero where one is not finite (then `finite` is False and results are NaN).
    exponent: that of two.
    """

    def __init__(self, X: Tensor, precision: str):
        top = X.abs().amax((1, 2), keepdim=True)
        self.finite = top.isfinite()
        usable = self.finite & (top > 0)
        # frexp sees subnormals as they are; a shift past the range is taken in two steps
        self.exponent = torch.frexp(top.where(usable, torch.ones_like(top))).exponent // 2 * 2
        # in float64: what is small beside the largest may be subnormal in the dtype of X
        scaled = _raised(X.double(), -self.exponent).where(self.finite, 0.0)
        self.stack = scaled.to(getattr(torch, precision))

    def back(self, result: Tensor, exponent: Tensor | int, out: Tensor) -> Tensor:
        """`2^exponent` times the result, `[batch, n, n]` or `[batch, n]`, into `out`."""
        finite = self.finite if result.dim() == 3 else self.finite.squeeze(-1)
        if isinstance(exponent, Tensor):
            exponent = exponent if result.dim() == 3 else exponent.squeeze(-1)
            result = _raised(result.to(torch.float64), exponent)
        return out.copy_(result.where(finite, torch.nan))


def _raised(X: Tensor, exponent: Tensor) -> Tensor:
    half = exponent // 2
    return torch.ldexp(torch.ldexp(X, half), exponent - half)


def eigh(
    X: Tensor, precision: str, V0: Tensor | None = None, vectors: bool = True,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`(w [batch, n], V [batch, n, n] or None)`; V0 is ignored."""
    w, V = out or (X.new_empty(X.shape[:2]), torch.empty_like(X) if vectors else None)
    x = Scaled(X, precision)
    values, columns = _stubborn(torch.linalg.eigh, _symmetric(x.stack))
    x.back(values, x.exponent, w)
    if V is not None:
        x.back(columns * _signs(columns, -2), 0, V)
    return w, V


def _stubborn(decompose: Callable[[Tensor], Sequence[Tensor]], X: Tensor) -> tuple[Tensor, ...]:
    """`decompose(X)`, retried where LAPACK or cuSOLVER gives up on a matrix (pytorch issue 94772 and the like).

    First without the elements that are negligible beside the largest, whose squares underflow on the way; in the end
    by LAPACK in float64.
    """
    top = X.abs().amax((1, 2), keepdim=True)
    nothing = 1e-3 * torch.finfo(X.dtype).eps / X.shape[-1] * top
    plain = X.where(X.abs() > nothing, 0.0)
    for attempt in (X, plain):
        try:
            return tuple(decompose(attempt))
        except torch.linalg.LinAlgError:
            pass
    return tuple(result.to(X) for result in decompose(plain.double().cpu()))


def svd(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(U, S, Vh)`, S descending."""
    U, S, Vh = out or (torch.empty_like(X), X.new_empty(X.shape[:2]), torch.empty_like(X))
    x = Scaled(X, precision)
    left, values, right = _stubborn(torch.linalg.svd, x.stack)
    signs = _signs(right, -1)
    x.back(left * signs.mT, 0, U), x.back(values, x.exponent, S), x.back(right * signs, 0, Vh)
    return U, S, Vh


def polar(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """`X = Q H` by the singular value decomposition, in float64, which is safe for singular X."""
    Q, H = out or (torch.empty_like(X), torch.empty_like(X))
    x = Scaled(X, "float64")
    left, values, right = _stubborn(torch.linalg.svd, x.stack)
    x.back(left @ right, 0, Q), x.back(_symmetric((right.mT * values.unsqueeze(1)) @ right), x.exponent, H)
    return Q, H


def geometric_mean(X: Tensor, Y: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """`X # Y = Lx Q^T Ly^T` with `Ly^T Lx^-T = Q H`; NaN where X or Y is not positive definite."""
    x, y = Scaled(X, precision), Scaled(Y, precision)
    Lx, Lx_inv = _cholesky(x.stack)
    Ly, Ly_inv = _cholesky(y.stack)
    Q = polar_factor(Ly.mT @ Lx_inv.mT, Ly_inv @ Lx, STEPS)
    mean = _symmetric(Lx @ Q.mT @ Ly.mT).where(y.finite, torch.nan)
    return x.back(mean, (x.exponent + y.exponent) // 2, torch.empty_like(X) if out is None else out)


def sqrtm(X: Tensor, precision: str, inverse: bool, out: Tensor | None = None) -> Tensor:
    """`X^(1/2) = Q^T L^T`, or `X^(-1/2) = L^-T Q`, with `L^T = Q H`; NaN where X is not positive definite."""
    x = Scaled(X, precision)
    L, L_inv = _cholesky(x.stack)
    Q = polar_factor(L.mT, L_inv, STEPS)
    root = _symmetric(L_inv.mT @ Q if inverse else Q.mT @ L.mT)
    half = x.exponent // 2
    return x.back(root, -half if inverse else half, torch.empty_like(X) if out is None else out)


def inv_root(X: Tensor, p: float, eps: float, unit: float, precision: str, out: Tensor | None = None) -> Tensor:
    """`(X + eps I)^(-1/p)`; NaN where that is not positive definite."""
    w, V = eigh(X.double(), precision)
    assert V is not None
    rounding = unit * 4 * w.shape[1] ** 0.5 * w.abs().amax(1, keepdim=True)
    shifted = w.where((w >= 0) | (w < -rounding), 0.0).double() + eps
    sound = (shifted > 0).all(1).view(-1, 1, 1)
    V = V.double()
    root = (V * shifted.pow(-1 / p).unsqueeze(1)) @ V.mT
    return (torch.empty_like(X) if out is None else out).copy_(_symmetric(root).where(sound, torch.nan))


def _signs(vectors: Tensor, dim: int) -> Tensor:
    """-1 or 1: the sign that makes the component of largest magnitude along `dim`, the first such, positive."""
    largest = vectors.gather(dim, vectors.abs().argmax(dim, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def _cholesky(X: Tensor) -> tuple[Tensor, Tensor]:
    L, broke = torch.linalg.cholesky_ex(_symmetric(X))
    L = L.where((broke == 0).view(-1, 1, 1), torch.nan)
    eye = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    return L, torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2
