"""The functions on a backend: any leading dimensions and floating dtype in, new results out.

Arguments have been checked (functions.py). Batches go to a backend as contiguous `[batch, n, n]` of float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ambient import independent
from ..backends import resolve

# how many of the last dimensions of X a result has
MATRIX, VECTOR = 2, 1
BATCHED = (torch.float32, torch.float64)


def eigh(X: Tensor, V0: Tensor | None, backend: str | None, precision: str) -> list[Tensor]:
    start = None if V0 is None else batch(V0.detach().to(wide(X)))
    serve = resolve(backend, X.device).eigh
    return into(X, (VECTOR, MATRIX), lambda own: serve(batch(X), precision, start, True, (own[0], own[1])))


def eigvalsh(X: Tensor, backend: str | None, precision: str) -> list[Tensor]:
    serve = resolve(backend, X.device).eigh
    return into(X, (VECTOR,), lambda own: serve(batch(X), precision, None, False, (own[0], None)))


def svd(X: Tensor, backend: str | None, precision: str) -> list[Tensor]:
    serve = resolve(backend, X.device).svd
    return into(X, (MATRIX, VECTOR, MATRIX), lambda own: serve(batch(X), precision, own))


def polar(X: Tensor, backend: str | None, precision: str) -> list[Tensor]:
    serve = resolve(backend, X.device).polar
    return into(X, (MATRIX, MATRIX), lambda own: serve(batch(X), precision, own))


def geometric_mean(X: Tensor, Y: Tensor, backend: str | None, precision: str) -> list[Tensor]:
    serve = resolve(backend, X.device).geometric_mean
    return into(X, (MATRIX,), lambda own: serve(batch(X), batch(Y), precision, own[0]))


def sqrtm(X: Tensor, inverse: bool, backend: str | None, precision: str) -> list[Tensor]:
    serve = resolve(backend, X.device).sqrtm
    return into(X, (MATRIX,), lambda own: serve(batch(X), precision, inverse, own[0]))


def inv_root(X: Tensor, p: float, eps: float, backend: str | None, precision: str) -> list[Tensor]:
    serve = resolve(backend, X.device).inv_root
    # X is known only to the rounding of its own dtype, whatever the arithmetic
    unit = max(torch.finfo(X.dtype).eps, torch.finfo(getattr(torch, precision)).eps)
    return into(X, (MATRIX,), lambda own: serve(batch(X), p, eps, unit, precision, own[0]))


def wide(X: Tensor) -> torch.dtype:
    """The dtype in which a batch of X goes to a backend."""
    return X.dtype if X.dtype in BATCHED else torch.float32


def batch(X: Tensor) -> Tensor:
    if X.requires_grad:
        X = X.detach()
    if X.is_neg():
        X = X.resolve_neg()
    if X.dtype not in BATCHED:
        X = X.to(torch.float32)
    if X.dim() != 3:
        X = X.reshape(math.prod(X.shape[:-2]), *X.shape[-2:])
    return X.contiguous()


def into(X: Tensor, kinds: Sequence[int], run: Callable[[Sequence[Tensor]], object]) -> list[Tensor]:
    """`run` on new results, `[batch, n, n]` or `[batch, n]`, contiguous; returned in the shape and dtype of X."""
    dtype, shape = wide(X), X.shape
    count, n = math.prod(shape[:-2]), shape[-1]
    flats = [(count, n, n) if kind == MATRIX else (count, n) for kind in kinds]
    with independent():
        own = [torch.empty(flat, dtype=dtype, device=X.device) for flat in flats]
        if count:
            run(own)
    if len(shape) != 3:
        own = [result.view(*shape[:-2], *result.shape[1:]) for result in own]
    return own if dtype == X.dtype else [result.to(X.dtype) for result in own]
