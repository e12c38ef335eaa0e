"""The functions as operators, `torch.ops.reflora`: for torch.compile, and with a backward pass where one exists.

backend: "" for None. Results are new tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..ambient import independent
from ..checks import check_there
from . import direct


def _there(what: str, X: Tensor) -> Tensor:
    check_there(what, X)
    return X


@torch.library.custom_op(add_op_namespace_prefix("eigh"), mutates_args=())
def eigh(X: Tensor, V0: Tensor | None, backend: str, precision: str) -> tuple[Tensor, Tensor]:
    w, V = direct.eigh(_there("eigh", X), V0 if V0 is None else _there("eigh, V0", V0), backend or None, precision)
    return w, V


@torch.library.custom_op(add_op_namespace_prefix("eigvalsh"), mutates_args=())
def eigvalsh(X: Tensor, backend: str, precision: str) -> Tensor:
    return direct.eigvalsh(_there("eigvalsh", X), backend or None, precision)[0]


@torch.library.custom_op(add_op_namespace_prefix("svd"), mutates_args=())
def svd(X: Tensor, backend: str, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = direct.svd(_there("svd", X), backend or None, precision)
    return U, S, Vh


@torch.library.custom_op(add_op_namespace_prefix("polar"), mutates_args=())
def polar(X: Tensor, backend: str, precision: str) -> tuple[Tensor, Tensor]:
    Q, H = direct.polar(_there("polar", X), backend or None, precision)
    return Q, H


@torch.library.custom_op(add_op_namespace_prefix("geometric_mean"), mutates_args=())
def geometric_mean(X: Tensor, Y: Tensor, backend: str, precision: str) -> Tensor:
    return direct.geometric_mean(
        _there("geometric_mean", X), _there("geometric_mean, Y", Y), backend or None, precision
    )[0]


@torch.library.custom_op(add_op_namespace_prefix("sqrtm"), mutates_args=())
def sqrtm(X: Tensor, inverse: bool, backend: str, precision: str) -> Tensor:
    return direct.sqrtm(_there("sqrtm", X), inverse, backend or None, precision)[0]


@torch.library.custom_op(add_op_namespace_prefix("inv_root"), mutates_args=())
def inv_root(X: Tensor, p: float, eps: float, backend: str, precision: str) -> Tensor:
    return direct.inv_root(_there("inv_root", X), p, eps, backend or None, precision)[0]


# ---- shapes


def _matrix(X: Tensor) -> Tensor:
    return X.new_empty(X.shape)


def _vector(X: Tensor) -> Tensor:
    return X.new_empty(X.shape[:-1])


@eigh.register_fake
def _(X: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _vector(X), _matrix(X)


@eigvalsh.register_fake
def _(X: Tensor, *_: object) -> Tensor:
    return _vector(X)


@svd.register_fake
def _(X: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _matrix(X), _vector(X), _matrix(X)


@polar.register_fake
def _(X: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _matrix(X), _matrix(X)


@geometric_mean.register_fake
@sqrtm.register_fake
@inv_root.register_fake
def _(X: Tensor, *_: object) -> Tensor:
    return _matrix(X)


# ---- backward


def _keep_eigh(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _eigh_backward(ctx: Any, grad_w: Tensor | None, grad_V: Tensor | None) -> tuple[Tensor, None, None, None]:
    """`V (diag(gw) + (V^T gV) / (w_j - w_i)) V^T`, its symmetric part; 0 for quotients that are not finite."""
    w, V = ctx.saved_tensors
    with independent():
        inner = torch.zeros_like(V) if grad_w is None else torch.diag_embed(grad_w)
        if grad_V is not None:
            gap = w.unsqueeze(-2) - w.unsqueeze(-1)
            apart = gap.abs() > 1 / torch.finfo(gap.dtype).max
            quotient = torch.where(apart, 1 / torch.where(apart, gap, 1.0), 0.0)
            inner = inner + (V.mT @ grad_V) * quotient
        grad = V @ inner @ V.mT
    return (grad + grad.mT) / 2, None, None, None


def _keep_sqrtm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse, ctx.backend = inputs[1:3]
    ctx.save_for_backward(inputs[0])


def _sqrtm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """`V (L * (V^T g V)) V^T` with L the divided differences of the root (Daleckii and Krein)."""
    (X,) = ctx.saved_tensors
    w, V = ops.eigh(X.double(), None, ctx.backend, "float64")
    root = w.clamp_min(0).sqrt()
    differences = 1 / (root.unsqueeze(-1) + root.unsqueeze(-2))
    if ctx.inverse:
        differences = -differences / (root.unsqueeze(-1) * root.unsqueeze(-2))
    with independent():
        inner = V.mT @ ((grad + grad.mT) / 2).double() @ V
        return (V @ (differences * inner) @ V.mT).to(X.dtype), None, None, None


eigh.register_autograd(_eigh_backward, setup_context=_keep_eigh)
sqrtm.register_autograd(_sqrtm_backward, setup_context=_keep_sqrtm)
