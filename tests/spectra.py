"""Symmetric matrices that are hard on eigensolvers, by kind, and how far off a decomposition is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DOUBLE = torch.float64
DTYPES = [torch.float32, DOUBLE]
# 1000 matrices a kind
SIZES = {1: 40, 2: 100, 3: 100, 5: 100, 8: 100, 12: 100, 16: 100, 17: 80, 32: 100, 33: 60, 64: 60, 100: 30, 128: 30}
# a residual or an orthogonality may be so many times that of LAPACK
BAR = 4.0


def rotated(w: Tensor) -> Tensor:
    """`Q diag(w) Q^T` for eigenvalues w `[batch, n]` and random orthogonal Q."""
    Q = torch.linalg.qr(torch.randn(*w.shape, w.shape[-1], dtype=DOUBLE)).Q
    return (Q * w.unsqueeze(-2)) @ Q.mT


def _gauss(b: int, n: int) -> Tensor:
    X = torch.randn(b, n, n, dtype=DOUBLE)
    return X + X.mT


def _spaced(b: int, n: int) -> Tensor:
    return torch.linspace(1, 1e-16, n, dtype=DOUBLE).expand(b, n)


def _graded(b: int, n: int, orders: float = 12) -> Tensor:
    return torch.logspace(0, -orders, n, dtype=DOUBLE).expand(b, n)


def _clustered(b: int, n: int) -> Tensor:
    return torch.cat([torch.ones(b, 1, dtype=DOUBLE), torch.full((b, n - 1), 1e-16, dtype=DOUBLE)], 1)


def _signs(w: Tensor) -> Tensor:
    return w * torch.randint(0, 2, w.shape).mul(2).sub(1)


def _close(b: int, n: int) -> Tensor:
    return 1 + 1e-9 * torch.randn(b, n, dtype=DOUBLE)


def _repeated(b: int, n: int) -> Tensor:
    return torch.randint(-1, 2, (b, n)).double()


def _wilkinson(b: int, n: int) -> Tensor:
    d = (torch.arange(n, dtype=DOUBLE) - (n - 1) / 2).abs()
    T = torch.diag(d) + torch.diag(torch.ones(n - 1, dtype=DOUBLE), 1) + torch.diag(torch.ones(n - 1, dtype=DOUBLE), -1)
    return T.expand(b, n, n).clone()


def _glued(b: int, n: int) -> Tensor:
    """Wilkinson's matrices joined by tiny elements: clusters of clusters."""
    X = torch.zeros(b, n, n, dtype=DOUBLE)
    for start in range(0, n, 7):
        size = min(7, n - start)
        X[:, start : start + size, start : start + size] = _wilkinson(b, size)
        if start:
            X[:, start, start - 1] = X[:, start - 1, start] = 1e-10
    return X


def _arrow(b: int, n: int) -> Tensor:
    X = torch.diag_embed(torch.randn(b, n, dtype=DOUBLE))
    X[:, 0, :] = X[:, :, 0] = torch.randn(b, n, dtype=DOUBLE)
    return X


def _permuted_diagonal(b: int, n: int) -> Tensor:
    return torch.diag_embed(torch.stack([torch.randperm(n).double() for _ in range(b)]) - n / 3)


def _permutation(b: int, n: int) -> Tensor:
    """Symmetric permutations: eigenvalues 1 and -1."""
    X = torch.zeros(b, n, n, dtype=DOUBLE)
    for matrix in X:
        order = torch.randperm(n)
        pairs = order[: n // 2 * 2].view(2, -1)
        matrix[pairs[0], pairs[1]] = matrix[pairs[1], pairs[0]] = 1
        if n % 2:
            matrix[order[-1], order[-1]] = 1
    return X


def _graded_rows(b: int, n: int) -> Tensor:
    g = torch.logspace(0, -12, n, dtype=DOUBLE)
    return _gauss(b, n) * g * g[:, None]


def _outlier(b: int, n: int, value: float) -> Tensor:
    X = _gauss(b, n)
    X[:, n // 2, n // 2] *= value
    return X


def _rank_one(b: int, n: int) -> Tensor:
    x = torch.randn(b, n, 1, dtype=DOUBLE)
    return x @ x.mT


# one entry per kind: (batch, n) -> [batch, n, n]; "lapack ..." are those of LAPACK's driver tests (dchkst)
KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": _gauss,
    "lapack zero": lambda b, n: torch.zeros(b, n, n, dtype=DOUBLE),
    "lapack identity": lambda b, n: torch.eye(n, dtype=DOUBLE).expand(b, n, n).clone(),
    "lapack diagonal, even": lambda b, n: torch.diag_embed(_signs(_spaced(b, n))),
    "lapack diagonal, geometric": lambda b, n: torch.diag_embed(_signs(_graded(b, n, 16))),
    "lapack diagonal, clustered": lambda b, n: torch.diag_embed(_signs(_clustered(b, n))),
    "lapack even": lambda b, n: rotated(_signs(_spaced(b, n))),
    "lapack geometric": lambda b, n: rotated(_signs(_graded(b, n, 16))),
    "lapack clustered": lambda b, n: rotated(_signs(_clustered(b, n))),
    "graded over 1e12": lambda b, n: rotated(_graded(b, n)),
    "graded rows": _graded_rows,
    "graded rows, reversed": lambda b, n: _graded_rows(b, n).flip(1, 2),
    "close to I": lambda b, n: rotated(_close(b, n)),
    "repeated": lambda b, n: rotated(_repeated(b, n)),
    "orthogonal": lambda b, n: rotated(_signs(torch.ones(b, n, dtype=DOUBLE))),
    "rank 1": _rank_one,
    "projector": lambda b, n: rotated((torch.arange(n) < n / 2).double().expand(b, n)),
    "wilkinson": _wilkinson,
    "glued wilkinson": _glued,
    "arrow": _arrow,
    "permuted diagonal": _permuted_diagonal,
    "permutation": _permutation,
    "ones": lambda b, n: torch.ones(b, n, n, dtype=DOUBLE),
    "one huge element": lambda b, n: _outlier(b, n, 1e8),
    "one tiny element": lambda b, n: _outlier(b, n, 1e-30),
}
# by dtype: scales near the ends of its range, and inside its subnormals
SCALES = {torch.float32: (1e30, 1e-30, 1e-41), DOUBLE: (1e300, 1e-300, 1e-316)}


def matrices(kind: str, batch: int, n: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    X = KINDS[kind](batch, n)
    return (scale * (X + X.mT) / 2).to(dtype)


def errors(X: Tensor, w: Tensor, V: Tensor) -> tuple[float, float]:
    """Worst `||X V - V diag(w)||_F / ||X||_F` and `||V^T V - I||_F` of a batch, in units of the dtype's rounding.

    In float64; never less than 1: half a rounding in w alone is within that. A subnormal X is measured by its spacing.
    """
    eps, tiny = torch.finfo(X.dtype).eps, torch.finfo(X.dtype).smallest_normal
    top = X.abs().amax((1, 2), keepdim=True).double().clamp_min(tiny)
    X, w, V = X.double() / top, w.double() / top.squeeze(-1), V.double()
    residual = (X @ V - V * w.unsqueeze(-2)).flatten(1).norm(dim=1) / X.flatten(1).norm(dim=1).clamp_min(1.0)
    orthogonality = (V.mT @ V - torch.eye(X.shape[-1], dtype=DOUBLE, device=X.device)).flatten(1).norm(dim=1)
    return max(float(residual.max()) / eps, 1.0), max(float(orthogonality.max()) / eps, 1.0)


def eigenvalue_error(X: Tensor, w: Tensor) -> float:
    """Worst `max |w - w_exact| / ||X||_2`, in roundings, against float64 LAPACK; never less than 4, a few roundings."""
    exact = torch.linalg.eigvalsh(X.double())
    size = exact.abs().amax(1).clamp_min(torch.finfo(X.dtype).smallest_normal)
    return max(float(((w.double() - exact).abs().amax(1) / size).max()) / torch.finfo(X.dtype).eps, 4.0)
