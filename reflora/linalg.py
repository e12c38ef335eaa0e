"""Batched linear algebra of small matrices, any leading dimensions, on the backends of the RefLoRA step.

Matrices are `[..., n, n]`. Arithmetic is float64 on every backend (`precision="float32"` is a faster mode of "triton"
and "torch"); results have the dtype of the input. Nothing raises on the values: a matrix that is not positive definite
where it must be, or not finite, gives NaN in its own result and nowhere else. n > 128 goes through "torch" on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Backend, load, resolve
from .contract import RANK_CLASSES, STORAGE_DTYPES, check_backend, check_precision, fail


def polar(X: Tensor, *, backend: str | None = None, precision: str = "float64") -> tuple[Tensor, Tensor]:
    """`X = Q H`: Q orthogonal, H symmetric positive semidefinite. Q is not unique where X is singular.

    Raises TypeError or ValueError for anything but a floating `[..., n, n]`, RuntimeError for an unavailable backend.
    """
    stack, serve = _prepare("polar", X, backend, precision)
    Q, H = serve.polar(stack, precision)
    return Q.view(X.shape).to(X.dtype), H.view(X.shape).to(X.dtype)


def geometric_mean(X: Tensor, Y: Tensor, *, backend: str | None = None, precision: str = "float64") -> Tensor:
    """`X # Y = X^(1/2) (X^(-1/2) Y X^(-1/2))^(1/2) X^(1/2)` of SPD X and Y (paper, Lemma 7); only that they are read as
    symmetric is assumed. Raises as `polar`, and ValueError where X and Y differ in shape, dtype or device.
    """
    if (X.shape, X.dtype, X.device) != (Y.shape, Y.dtype, Y.device):
        got = f"{tuple(Y.shape)} {Y.dtype} on {Y.device}"
        fail(
            "geometric_mean, Y", f"{tuple(X.shape)} {X.dtype} on {X.device} like X", got, "Broadcast or cast it first."
        )
    stack, serve = _prepare("geometric_mean, X", X, backend, precision)
    other, _ = _prepare("geometric_mean, Y", Y, backend, precision)
    return serve.geometric_mean(stack, other, precision).view(X.shape).to(X.dtype)


def sqrtm(X: Tensor, *, backend: str | None = None, precision: str = "float64") -> Tensor:
    """The SPD square root of SPD X. Raises as `polar`."""
    stack, serve = _prepare("sqrtm", X, backend, precision)
    return serve.sqrtm(stack, precision, False).view(X.shape).to(X.dtype)


def invsqrtm(X: Tensor, *, backend: str | None = None, precision: str = "float64") -> Tensor:
    """The inverse of the SPD square root of SPD X. Raises as `polar`."""
    stack, serve = _prepare("invsqrtm", X, backend, precision)
    return serve.sqrtm(stack, precision, True).view(X.shape).to(X.dtype)


def eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[..., n]`, ascending, and eigenvectors `[..., n, n]` of symmetric X: torch.linalg.eigh."""
    values, vectors = torch.linalg.eigh(X)
    return values, vectors


def _prepare(what: str, X: Tensor, backend: str | None, precision: str) -> tuple[Tensor, Backend]:
    """X as a contiguous `[batch, n, n]` of float32 or float64, and who serves it."""
    check_backend(backend)
    check_precision(precision)
    if not isinstance(X, Tensor) or X.dtype not in STORAGE_DTYPES:
        got = X.dtype if isinstance(X, Tensor) else type(X).__name__
        fail(what, "a floating-point tensor", got, "Cast it to float32 or float64.", TypeError)
    if X.dim() < 2 or X.shape[-1] != X.shape[-2]:
        fail(what, "square matrices [..., n, n]", tuple(X.shape), "Only square matrices have this function.")
    serve = resolve(backend, X.device)
    if serve.NAME == "triton" and X.shape[-1] > RANK_CLASSES[-1]:
        serve = load("torch")
    wide = X.detach().to(X.dtype if X.dtype in (torch.float32, torch.float64) else torch.float32)
    return wide.reshape(-1, *X.shape[-2:]).contiguous(), serve
