"""Batched linear algebra of small matrices, any leading dimensions, on the backends of the RefLoRA step.

Matrices are `[..., n, n]`. Arithmetic is float64 on every backend (`precision="float32"` is a faster mode of "triton"
and "torch"); results have the dtype of the input. Nothing raises on the values: a matrix that is not positive definite
where it must be, or not finite, gives NaN in its own result and nowhere else. n > 128 goes through "torch" on a GPU.
Results carry no autograd graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import Backend, load, resolve
from .contract import RANK_CLASSES, STORAGE_DTYPES, check_backend, check_precision, fail


def polar(X: Tensor, *, backend: str | None = None, precision: str = "float64") -> tuple[Tensor, Tensor]:
    """`X = Q H`: Q orthogonal, H symmetric positive semidefinite. Q is not unique where X is singular.

    Raises TypeError or ValueError for anything but a floating `[..., n, n]`, RuntimeError for an unavailable backend.
    """
    serve, x = _serve("polar", X, backend, precision), _Scaled(X)
    Q, H = serve.polar(x.stack, precision)
    return x.back(Q, 0), x.back(H, x.exponent)


def geometric_mean(X: Tensor, Y: Tensor, *, backend: str | None = None, precision: str = "float64") -> Tensor:
    """`X # Y = X^(1/2) (X^(-1/2) Y X^(-1/2))^(1/2) X^(1/2)` of SPD X and Y (paper, Lemma 7).

    Raises as `polar`, and ValueError where X and Y differ in shape, dtype or device.
    """
    serve = _serve("geometric_mean, X", X, backend, precision)
    _serve("geometric_mean, Y", Y, backend, precision)
    if (X.shape, X.dtype, X.device) != (Y.shape, Y.dtype, Y.device):
        got = f"{tuple(Y.shape)} {Y.dtype} on {Y.device}"
        want = f"{tuple(X.shape)} {X.dtype} on {X.device} like X"
        fail("geometric_mean, Y", want, got, "Broadcast or cast it first.")
    x, y = _Scaled(X), _Scaled(Y)
    mean = serve.geometric_mean(x.stack, y.stack, precision)
    return x.back(mean.where(y.finite, torch.nan), (x.exponent + y.exponent) // 2)


def sqrtm(X: Tensor, *, backend: str | None = None, precision: str = "float64") -> Tensor:
    """The SPD square root of SPD X. Raises as `polar`."""
    serve, x = _serve("sqrtm", X, backend, precision), _Scaled(X)
    return x.back(serve.sqrtm(x.stack, precision, False), x.exponent // 2)


def invsqrtm(X: Tensor, *, backend: str | None = None, precision: str = "float64") -> Tensor:
    """The inverse of the SPD square root of SPD X. Raises as `polar`."""
    serve, x = _serve("invsqrtm", X, backend, precision), _Scaled(X)
    return x.back(serve.sqrtm(x.stack, precision, True), -(x.exponent // 2))


def eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[..., n]`, ascending, and eigenvectors `[..., n, n]` of symmetric X: torch.linalg.eigh."""
    values, vectors = torch.linalg.eigh(X)
    return values, vectors


def _serve(what: str, X: Tensor, backend: str | None, precision: str) -> Backend:
    """Checks the arguments; who serves X."""
    check_backend(backend)
    check_precision(precision)
    if not isinstance(X, Tensor) or X.dtype not in STORAGE_DTYPES:
        got = X.dtype if isinstance(X, Tensor) else type(X).__name__
        fail(what, "a floating-point tensor", got, "Cast it to float32 or float64.", TypeError)
    if X.dim() < 2 or X.shape[-1] != X.shape[-2] or X.shape[-1] == 0:
        fail(what, "square matrices [..., n, n], n >= 1", tuple(X.shape), "Only square matrices have this function.")
    serve = resolve(backend, X.device)
    return load("torch") if serve.NAME == "triton" and X.shape[-1] > RANK_CLASSES[-1] else serve


class _Scaled:
    """X as contiguous `[batch, n, n]` of float32 or float64, each matrix over a power of four near its largest element.

    stack: the matrices, zero where one is not finite (then `finite` is False and results are NaN).
    exponent: that of two, even.
    """

    def __init__(self, X: Tensor):
        self.like = X
        wide = X.detach().to(X.dtype if X.dtype in (torch.float32, torch.float64) else torch.float32)
        wide = wide.reshape(math.prod(X.shape[:-2]), *X.shape[-2:])
        top = wide.abs().amax((1, 2), keepdim=True) if len(wide) else wide.new_zeros(0, 1, 1)
        self.finite = top.isfinite()
        exponent = torch.frexp(top.where(self.finite & (top > 0), torch.ones_like(top))).exponent
        bound = 1000 if wide.dtype == torch.float64 else 120
        self.exponent = exponent.clamp(-bound, bound) // 2 * 2
        self.stack = torch.ldexp(wide, -self.exponent).where(self.finite, 0.0).contiguous()

    def back(self, result: Tensor, exponent: Tensor | int) -> Tensor:
        scaled = torch.ldexp(result, torch.as_tensor(exponent, device=result.device)).where(self.finite, torch.nan)
        return scaled.view(self.like.shape).to(self.like.dtype)
