"""The public functions: arguments are checked here, once. What they share stands in the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import STORAGE_DTYPES, check_backend, check_precision, fail
from . import direct, operators


class Eigh(NamedTuple):
    """eigenvalues `[..., n]`, ascending; eigenvectors `[..., n, n]`, one a column."""

    eigenvalues: Tensor
    eigenvectors: Tensor


class SVD(NamedTuple):
    """`X = U diag(S) Vh`; S `[..., n]`, descending."""

    U: Tensor
    S: Tensor
    Vh: Tensor


class Polar(NamedTuple):
    """`X = Q H`: Q orthogonal, H symmetric positive semidefinite."""

    Q: Tensor
    H: Tensor


def eigh(
    X: Tensor,
    *,
    V0: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> Eigh:
    """Eigenvalues `[..., n]`, ascending, and eigenvectors `[..., n, n]`, the columns, of symmetric X `[..., n, n]`.

    The component of largest magnitude of each eigenvector, the first where several are, is positive. V0 `[..., n, n]`:
    eigenvectors of a matrix near X, which spare the Jacobi iteration of "triton" most of its sweeps; "cpp" and "torch"
    gain nothing from them and start anew. V0 that is not orthogonal to about 0.1 is not used. On a GPU n > 128 goes
    through torch.linalg.eigh, which waits for the device.

    Differentiable: where eigenvalues coincide, the gradient of what depends on the choice of their vectors counts as 0.
    Raises TypeError or ValueError for anything but a floating `[..., n, n]`, for a V0 or `out` that does not match it,
    RuntimeError for an unavailable backend or for `out` with an X that requires grad. torch.linalg.eigh takes the same
    X (but for its lower triangle) and returns the same names.
    """
    precision = _check("eigh", X, backend, precision or _own(X))
    if V0 is not None:
        _like("eigh, V0", V0, X)
    if _needs_grad(X) or _traced(X):
        return Eigh(*_given(operators.eigh(X, V0, backend or "", precision), X, (1, 2), out))
    return Eigh(*direct.eigh(X, V0, backend, precision, _out("eigh", X, (1, 2), out)))


def eigvalsh(
    X: Tensor, *, out: Tensor | None = None, backend: str | None = None, precision: str | None = None
) -> Tensor:
    """The eigenvalues of `eigh`, to the bit, at less cost. Raises as it does."""
    precision = _check("eigvalsh", X, backend, precision or _own(X))
    outs = None if out is None else [out]
    if _needs_grad(X):
        w = operators.eigh(X, None, backend or "", precision)[0]
        return _given([w], X, (1,), outs)[0]
    if _traced(X):
        return _given([operators.eigvalsh(X, backend or "", precision)], X, (1,), outs)[0]
    return direct.eigvalsh(X, backend, precision, _out("eigvalsh", X, (1,), outs))[0]


def svd(
    X: Tensor, *, out: Sequence[Tensor] | None = None, backend: str | None = None, precision: str = "float64"
) -> SVD:
    """`X = U diag(S) Vh` of square X: S descending and not negative, U and Vh orthogonal however singular X is.

    The component of largest magnitude of each row of Vh, the first where several are, is positive. Raises as `eigh`.
    """
    _check("svd", X, backend, precision)
    if _traced(X):
        return SVD(*_given(operators.svd(X.detach(), backend or "", precision), X, (2, 1, 2), out))
    return SVD(*direct.svd(X, backend, precision, _out("svd", X, (2, 1, 2), out)))


def polar(
    X: Tensor, *, out: Sequence[Tensor] | None = None, backend: str | None = None, precision: str = "float64"
) -> Polar:
    """`X = Q H`: Q orthogonal, H symmetric positive semidefinite. Raises as `eigh`.

    Q is not unique where X is singular.
    """
    _check("polar", X, backend, precision)
    if _traced(X):
        return Polar(*_given(operators.polar(X.detach(), backend or "", precision), X, (2, 2), out))
    return Polar(*direct.polar(X, backend, precision, _out("polar", X, (2, 2), out)))


def geometric_mean(
    X: Tensor, Y: Tensor, *, out: Tensor | None = None, backend: str | None = None, precision: str = "float64"
) -> Tensor:
    """`X # Y = X^(1/2) (X^(-1/2) Y X^(-1/2))^(1/2) X^(1/2)` of SPD X and Y (paper, Lemma 7).

    Raises as `eigh`, and ValueError where X and Y differ in shape, dtype or device.
    """
    _check("geometric_mean, X", X, backend, precision)
    _like("geometric_mean, Y", Y, X)
    outs = None if out is None else [out]
    if _traced(X):
        mean = operators.geometric_mean(X.detach(), Y.detach(), backend or "", precision)
        return _given([mean], X, (2,), outs)[0]
    return direct.geometric_mean(X, Y, backend, precision, _out("geometric_mean", X, (2,), outs))[0]


def sqrtm(X: Tensor, *, out: Tensor | None = None, backend: str | None = None, precision: str = "float64") -> Tensor:
    """The SPD square root of SPD X. Differentiable. Raises as `eigh`."""
    return _sqrtm("sqrtm", X, False, out, backend, precision)


def invsqrtm(X: Tensor, *, out: Tensor | None = None, backend: str | None = None, precision: str = "float64") -> Tensor:
    """The inverse of the SPD square root of SPD X. Differentiable. Raises as `eigh`."""
    return _sqrtm("invsqrtm", X, True, out, backend, precision)


def inv_root(
    X: Tensor,
    p: float,
    *,
    eps: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
    precision: str = "float64",
) -> Tensor:
    """`(X + eps I)^(-1/p)` of symmetric positive semidefinite X: the inverse p-th root of Shampoo (arXiv 1802.09568).

    Eigenvalues that rounding has made negative (by no more than n units of the largest) count as 0. NaN where
    `X + eps I` is not positive definite: give a singular X an eps. Raises as `eigh`, ValueError for p <= 0 or eps < 0.
    """
    _check("inv_root", X, backend, precision)
    for what, value, least in (("p", p, "> 0"), ("eps", eps, ">= 0")):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not (0 < value < float("inf") or (value == 0 and what == "eps")):
            fail(f"inv_root, {what}", f"a finite number {least}", repr(value), "Shampoo's p is 4 for a matrix.")
    outs = None if out is None else [out]
    if _traced(X):
        root = operators.inv_root(X.detach(), float(p), float(eps), backend or "", precision)
        return _given([root], X, (2,), outs)[0]
    return direct.inv_root(X, float(p), float(eps), backend, precision, _out("inv_root", X, (2,), outs))[0]


def _sqrtm(what: str, X: Tensor, inverse: bool, out: Tensor | None, backend: str | None, precision: str) -> Tensor:
    _check(what, X, backend, precision)
    outs = None if out is None else [out]
    if _needs_grad(X) or _traced(X):
        return _given([operators.sqrtm(X, inverse, backend or "", precision)], X, (2,), outs)[0]
    return direct.sqrtm(X, inverse, backend, precision, _out(what, X, (2,), outs))[0]


# ---- checks


def _own(X: Tensor) -> str:
    """The precision that the type of X stands for."""
    return "float64" if isinstance(X, Tensor) and X.dtype == torch.float64 else "float32"


def _check(what: str, X: Tensor, backend: str | None, precision: str) -> str:
    check_backend(backend)
    check_precision(precision)
    if not isinstance(X, Tensor) or X.dtype not in STORAGE_DTYPES:
        got = X.dtype if isinstance(X, Tensor) else type(X).__name__
        fail(what, "a floating-point tensor", got, "Cast it to float32 or float64.", TypeError)
    if X.dim() < 2 or X.shape[-1] != X.shape[-2] or X.shape[-1] == 0:
        fail(what, "square matrices [..., n, n], n >= 1", tuple(X.shape), "Only square matrices have this function.")
    return precision


def _like(what: str, Y: Tensor, X: Tensor) -> None:
    _match(what, Y, X.shape, X, "like X", "Broadcast or cast it first.")


def _match(what: str, Y: Tensor, shape: torch.Size, X: Tensor, why: str, remedy: str) -> None:
    if not isinstance(Y, Tensor):
        fail(what, f"a tensor {why}", type(Y).__name__, remedy, TypeError)
    if (Y.shape, Y.dtype, Y.device) != (shape, X.dtype, X.device):
        got = f"{tuple(Y.shape)} {Y.dtype} on {Y.device}"
        fail(what, f"{tuple(shape)} {X.dtype} on {X.device} {why}", got, remedy)


def _out(what: str, X: Tensor, kinds: Sequence[int], out: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """kinds: how many of the last dimensions of X each result has."""
    if out is None:
        return None
    if isinstance(out, Tensor) or len(out) != len(kinds):
        fail(f"{what}, out", f"{len(kinds)} tensors", type(out).__name__, "Pass a tuple, one a result.", TypeError)
    for place, (given, kind) in enumerate(zip(out, kinds)):
        shape = torch.Size((*X.shape[:-2], *X.shape[-kind:]))
        _match(f"{what}, out[{place}]", given, shape, X, "as the result", "torch.empty of that shape will do.")
        if _needs_grad(given):
            remedy = "Detach it, or call under torch.no_grad."
            fail(f"{what}, out[{place}]", "a tensor that does not require grad", "one that does", remedy, RuntimeError)
        if any(given.data_ptr() == other.data_ptr() != 0 for other in out[:place]):
            fail(f"{what}, out[{place}]", "memory of its own", "that of another result", "Pass a tensor for each.")
    return out


def _needs_grad(X: Tensor) -> bool:
    return torch.is_grad_enabled() and X.requires_grad


def _traced(X: Tensor) -> bool:
    """Whether X has to go through an operator: while a graph is made of it, or where it has no memory of its own."""
    return torch.compiler.is_compiling() or type(X) not in (Tensor, torch.nn.Parameter)


def _given(
    results: Sequence[Tensor], X: Tensor, kinds: Sequence[int], out: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    """Results of an operator, copied to `out` where that is given."""
    if out is None:
        return results
    if _needs_grad(X):
        fail("out", "an X that does not require grad", "one that does", "Detach it, or leave out= away.", RuntimeError)
    _out("out", X, kinds, out)
    for given, result in zip(out, results):
        given.copy_(result)
    return out
