"""The public functions: arguments are checked here, once. The package's docstring says what they share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_backend, check_places, check_precision, check_shaped, check_there, check_writable, fail
from ..constants import STORAGE_DTYPES
from ..overlap import extent
from . import direct, operators
from .direct import MATRIX, VECTOR


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

    The component of largest magnitude of each eigenvector (of several, the first) is positive. On a GPU n > 128 goes
    through torch.linalg.eigh, which syncs. torch.linalg.eigh returns the same names, but reads only the lower triangle
    of X.

    Differentiable where eigenvalues are distinct. Between equal ones the gradient through V counts as 0; between nearly
    equal ones it is inaccurate, even for functions like `V f(w) V^T`, which have one: use `sqrtm` for those.

    Args:
        X: Symmetric, any floating dtype.
        V0: `[..., n, n]`, eigenvectors of a matrix near X, which save the Jacobi iteration of "triton" most of its
            sweeps; "cpp" and "torch" gain nothing from them and ignore them. Not used unless orthogonal to about 0.1.
        out: Tensors that results are copied to, of the shapes and dtype they would have.
        backend: None (the fastest that can serve the device), "triton", "cpp" or "torch".
        precision: "float64" or "float32"; None is the dtype of X.

    Raises:
        TypeError: Not a floating tensor.
        ValueError: Not `[..., n, n]`, or a V0 or `out` that does not match X.
        RuntimeError: An unavailable backend, or `out` with an X that requires grad.
    """
    precision = _own(X) if precision is None else precision
    _check("eigh", X, backend, precision, (VECTOR, MATRIX), out)
    if V0 is not None:
        _like("eigh, V0", V0, X)
    if _needs_grad(X) or _traced(X, V0):
        w, V = operators.eigh(_wide(X), None if V0 is None else _wide(V0), backend or "", precision)
        return Eigh(*_given((w.to(X.dtype), V.to(X.dtype)), out))
    return Eigh(*_given(direct.eigh(X, V0, backend, precision), out))


def eigvalsh(
    X: Tensor, *, out: Tensor | None = None, backend: str | None = None, precision: str | None = None
) -> Tensor:
    """The eigenvalues of `eigh`, to the bit, at lower cost. Raises as it does."""
    precision = _own(X) if precision is None else precision
    outs = _one(out)
    _check("eigvalsh", X, backend, precision, (VECTOR,), outs)
    if _needs_grad(X):
        w = operators.eigh(_wide(X), None, backend or "", precision)[0]
        return _given([w.to(X.dtype)], outs)[0]
    if _traced(X):
        return _given([operators.eigvalsh(X, backend or "", precision)], outs)[0]
    return _given(direct.eigvalsh(X, backend, precision), outs)[0]


def svd(
    X: Tensor, *, out: Sequence[Tensor] | None = None, backend: str | None = None, precision: str = "float64"
) -> SVD:
    """`X = U diag(S) Vh` of square X: S descending and not negative, U and Vh orthogonal however singular X is.

    The component of largest magnitude of each row of Vh (of several, the first) is positive. Not differentiable.
    Raises as `eigh`.
    """
    _check("svd", X, backend, precision, (MATRIX, VECTOR, MATRIX), out)
    if _traced(X):
        return SVD(*_given(operators.svd(X.detach(), backend or "", precision), out))
    return SVD(*_given(direct.svd(X, backend, precision), out))


def polar(
    X: Tensor, *, out: Sequence[Tensor] | None = None, backend: str | None = None, precision: str = "float64"
) -> Polar:
    """`X = Q H`: Q orthogonal, H symmetric positive semidefinite. Raises as `eigh`.

    Q is not unique where X is singular. Not differentiable.
    """
    _check("polar", X, backend, precision, (MATRIX, MATRIX), out)
    if _traced(X):
        return Polar(*_given(operators.polar(X.detach(), backend or "", precision), out))
    return Polar(*_given(direct.polar(X, backend, precision), out))


def geometric_mean(
    X: Tensor, Y: Tensor, *, out: Tensor | None = None, backend: str | None = None, precision: str = "float64"
) -> Tensor:
    """`X # Y = X^(1/2) (X^(-1/2) Y X^(-1/2))^(1/2) X^(1/2)` of SPD X and Y (paper, Lemma 7).

    Not differentiable. Raises as `eigh`, and ValueError where X and Y differ in shape, dtype or device.
    """
    outs = _one(out)
    _check("geometric_mean", X, backend, precision, (MATRIX,), outs)
    _like("geometric_mean, Y", Y, X)
    if _traced(X, Y):
        return _given([operators.geometric_mean(X.detach(), Y.detach(), backend or "", precision)], outs)[0]
    return _given(direct.geometric_mean(X, Y, backend, precision), outs)[0]


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

    Eigenvalues that rounding has made negative, by no more than 4 sqrt(n) units of the largest, count as 0; the unit is
    the rounding of X's own dtype. NaN where `X + eps I` is not positive definite: give a singular X an eps. Not
    differentiable. Raises as `eigh`, ValueError for p <= 0 or eps < 0.
    """
    outs = _one(out)
    _check("inv_root", X, backend, precision, (MATRIX,), outs)
    remedies = {"p": "Shampoo's p is 4 for a matrix.", "eps": "It is added to the diagonal."}
    for what, value, least in (("p", p, "> 0"), ("eps", eps, ">= 0")):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not (0 < value < sys.float_info.max or (value == 0 and what == "eps")):
            fail(f"inv_root, {what}", f"a finite number {least}", repr(value), remedies[what])
    if _traced(X):
        return _given([operators.inv_root(X.detach(), float(p), float(eps), backend or "", precision)], outs)[0]
    return _given(direct.inv_root(X, float(p), float(eps), backend, precision), outs)[0]


def _sqrtm(what: str, X: Tensor, inverse: bool, out: Tensor | None, backend: str | None, precision: str) -> Tensor:
    outs = _one(out)
    _check(what, X, backend, precision, (MATRIX,), outs)
    if _needs_grad(X) or _traced(X):
        return _given([operators.sqrtm(_wide(X), inverse, backend or "", precision).to(X.dtype)], outs)[0]
    return _given(direct.sqrtm(X, inverse, backend, precision), outs)[0]


# ---- checks


def _own(X: Tensor) -> str:
    """The precision that the dtype of X stands for."""
    return "float64" if isinstance(X, Tensor) and X.dtype == torch.float64 else "float32"


def _check(
    what: str, X: Tensor, backend: str | None, precision: str, kinds: Sequence[int], out: Sequence[Tensor] | None
) -> None:
    """kinds: how many of the last dimensions of X each result has."""
    check_backend(backend)
    check_precision(precision)
    if isinstance(X, Tensor):
        check_shaped(what, X)
    if not isinstance(X, Tensor) or X.dtype not in STORAGE_DTYPES or X.layout != torch.strided or X.is_nested:
        got = f"{X.dtype} ({X.layout})" if isinstance(X, Tensor) else type(X).__name__
        fail(what, "a dense floating-point tensor", got, "Cast it to float32 or float64.", TypeError)
    if X.dim() < 2 or X.shape[-1] != X.shape[-2] or X.shape[-1] == 0:
        fail(what, "square matrices [..., n, n], n >= 1", tuple(X.shape), "Only square matrices have this function.")
    if not _traced(X):
        check_there(what, X)
    if out is not None:
        _check_out(f"{what}, out", X, kinds, out)


def _like(what: str, Y: Tensor, X: Tensor) -> None:
    _match(what, Y, X.shape, X, "like X", "Broadcast or cast it first.")


def _match(what: str, Y: Tensor, shape: torch.Size, X: Tensor, why: str, remedy: str) -> None:
    if not isinstance(Y, Tensor):
        fail(what, f"a tensor {why}", type(Y).__name__, remedy, TypeError)
    check_shaped(what, Y)
    if (Y.shape, Y.dtype, Y.device) != (shape, X.dtype, X.device):
        got = f"{tuple(Y.shape)} {Y.dtype} on {Y.device}"
        fail(what, f"{tuple(shape)} {X.dtype} on {X.device} {why}", got, remedy)
    if Y.layout != torch.strided or Y.is_nested:
        fail(what, f"a dense tensor {why}", f"{type(Y).__name__} ({Y.layout})", "Call .to_dense() first.")
    if not _traced(X, Y):
        check_there(what, Y)


def _check_out(what: str, X: Tensor, kinds: Sequence[int], out: Sequence[Tensor]) -> None:
    if not isinstance(out, (tuple, list)) or len(out) != len(kinds):
        got = f"{len(out)}" if isinstance(out, (tuple, list)) else type(out).__name__
        fail(what, f"{len(kinds)} tensors", got, "Pass a tuple, one per result.", TypeError)
    if _needs_grad(X):
        fail(what, "an X that does not require grad", "one that does", "Detach it, or omit out=.", RuntimeError)
    for place, (given, kind) in enumerate(zip(out, kinds)):
        shape = torch.Size((*X.shape[:-2], *X.shape[-kind:]))
        _match(f"{what}[{place}]", given, shape, X, "as the result", "Pass torch.empty of that shape.")
        if _needs_grad(given):
            remedy = "Detach it, or call under torch.no_grad."
            fail(f"{what}[{place}]", "a tensor that does not require grad", "one that does", remedy, RuntimeError)
        if not _traced(X, *out):
            check_places(f"{what}[{place}]", given)
            check_writable(f"{what}[{place}]", given)
            if any(_overlap(given, other) for other in out[:place]):
                fail(f"{what}[{place}]", "memory of its own", "that of another result", "Pass a tensor for each.")


def _overlap(one: Tensor, other: Tensor) -> bool:
    (a, b), (c, d) = extent(one), extent(other)
    return a < d and c < b


def _needs_grad(X: Tensor) -> bool:
    return torch.is_grad_enabled() and X.requires_grad


def _traced(*tensors: Tensor | None) -> bool:
    """Whether an operator must be called: while a graph is made, or where a tensor has no memory of its own."""
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return True
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def _wide(X: Tensor) -> Tensor:
    """X in the dtype that operators work in, so that what they keep for the backward is not rounded to 16 bits."""
    return X.to(direct.wide(X))


def _one(out: Tensor | None) -> Sequence[Tensor] | None:
    return None if out is None else (out,)


def _given(results: Sequence[Tensor], out: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The results, copied to `out` if given: it may overlap any input, and autograd must see the write."""
    if out is None:
        return results
    for given, result in zip(out, results):
        given.copy_(result)
    return out
