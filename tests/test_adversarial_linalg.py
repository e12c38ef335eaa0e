"""eigh, polar and geometric_mean of orders up to 130, on matrices that break solvers, several kinds a batch."""

from __future__ import annotations

from collections.abc import Sequence

import adversarial
import pytest
import spectra
import torch
from conftest import served
from torch import Tensor

from reflora import linalg

CPU = torch.device("cpu")
ORDERS = range(1, 131)


def orders(backend: str, dtype: torch.dtype) -> list[int]:
    """Vectors and blocks of the C++ core have up to 16 numbers: past 33 their ends, and every other remainder once."""
    if backend == "torch":  # which is LAPACK
        return [n for n in ORDERS if n <= 17 or n % 16 == 0 or n in (33, 65, 130)]
    first = 0 if dtype == torch.float32 else 2
    return [n for n in ORDERS if n <= 33 or n % 16 in (15, 0, 1) or n % 5 == first]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def factors(
    n: int,
    generator: torch.Generator,
    kinds: Sequence[str] = adversarial.KINDS,
    scales: Sequence[float] = tuple(adversarial.SCALES.values()),
    largest: float = 3e38,
) -> Tensor:
    """Float64 `[kinds, n, n]`, each at a scale of its own, with norms up to `largest`."""
    found = []
    for kind in kinds:
        X = adversarial.factor(kind, n, n, generator)
        scale = scales[int(torch.randint(len(scales), (1,), generator=generator))]
        found.append(X * min(scale, largest / max(float(X.norm()), 1.0)))
    return torch.stack(found)


def check_eigh(n: int, dtype: torch.dtype, backend: str, device: torch.device = CPU) -> None:
    scales = (1.0, *spectra.SCALES[dtype])
    X = torch.cat([spectra.matrices(k, 1, n, dtype, scales[i % len(scales)]) for i, k in enumerate(spectra.KINDS)])
    w, V = (part.cpu() for part in linalg.eigh(X.to(device), backend=backend))
    assert w.isfinite().all() and V.isfinite().all() and (w.diff(dim=-1) >= 0).all(), n
    residual, orthogonality = spectra.errors(X, w, V)
    assert residual < 4 + n and orthogonality < 8 + 4 * n, (n, residual, orthogonality)


def check_polar(
    n: int, dtype: torch.dtype, backend: str, generator: torch.Generator, device: torch.device = CPU
) -> None:
    X = factors(n, generator).to(dtype)
    Q, H = (part.cpu().double() for part in linalg.polar(X.to(device), backend=backend))
    assert Q.isfinite().all() and H.isfinite().all(), n
    unit, eye = torch.finfo(dtype), torch.eye(n, dtype=torch.float64)
    top = X.double().abs().amax((1, 2), keepdim=True).clamp_min(unit.tiny)
    norm = (X.double() / top).flatten(1).norm(dim=1).clamp_min(1.0)
    # subnormal numbers have no relative accuracy
    lost = n * (unit.tiny * unit.eps / top).flatten()
    residual = (Q @ (H / top) - X.double() / top).flatten(1).norm(dim=1)
    assert (residual < (100 + n) * unit.eps * norm + lost).all(), (n, residual / norm / unit.eps)
    orthogonality = (Q.mT @ Q - eye).flatten(1).norm(dim=1)
    assert (orthogonality < (100 + 4 * n) * unit.eps).all(), (n, orthogonality / unit.eps)
    least = torch.linalg.eigvalsh(H / top)[:, 0]
    assert torch.equal(H, H.mT) and (least > -(100 + n) * unit.eps * norm - lost).all(), n


def check_mean(
    n: int, dtype: torch.dtype, backend: str, generator: torch.Generator, device: torch.device = CPU
) -> tuple[int, int]:
    """NaN throughout where X or Y is singular in its type, right elsewhere; how many there were of either."""
    order = torch.randperm(len(adversarial.KINDS), generator=generator).tolist()
    hard, mild = [adversarial.KINDS[number] for number in order[:4]], list(adversarial.MILD[:4])
    sides = hard + mild, mild[2:] + hard[:2] + mild
    halves = [factors(n, generator, kinds, (1.0, 1e-12, 1e12), 1e18) for kinds in sides]
    X, Y = ((F @ F.mT).to(dtype) for F in halves)
    mean = linalg.geometric_mean(X.to(device), Y.to(device), backend=backend).cpu().double()
    whole, gone = (mean.isfinite().flatten(1).all(1), mean.isnan().flatten(1).all(1))
    assert (whole | gone).all(), n
    a, b = (torch.linalg.eigvalsh(M.double()) for M in (X, Y))
    limit = 30 * n * torch.finfo(dtype).eps
    definite = (a[:, 0] > limit * a[:, -1]) & (b[:, 0] > limit * b[:, -1])
    assert whole[definite].all(), n
    for M, A, B, k in zip(mean[definite], X[definite].double(), Y[definite].double(), (a[:, -1] / a[:, 0])[definite]):
        error = float((M @ torch.linalg.solve(A, M) - B).norm() / B.norm())
        assert error < (50 + 20 * n + 4 * float(k)) * torch.finfo(dtype).eps, (n, error, float(k))
    return int(definite.sum()), int(gone.sum())


@DTYPES
def test_eigh(fast_backend: str, dtype: torch.dtype) -> None:
    for n in orders(fast_backend, dtype):
        check_eigh(n, dtype, fast_backend)


@DTYPES
def test_polar(fast_backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for n in orders(fast_backend, dtype):
        check_polar(n, dtype, fast_backend, generator)


@DTYPES
def test_geometric_mean(fast_backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    # torch takes ten times as long
    chosen = [n for n in orders(fast_backend, dtype) if fast_backend == "cpp" or n < 100]
    found = [check_mean(n, dtype, fast_backend, generator) for n in chosen]
    definite, gone = (sum(counts) for counts in zip(*found))
    assert min(definite, gone) > len(chosen), (definite, gone)


@pytest.mark.kernels
@pytest.mark.skipif(not served("triton"), reason="make emulate runs it")
def test_by_kernels() -> None:
    generator = torch.Generator().manual_seed(3)
    for n in range(1, 14, 3):
        check_eigh(n, torch.float32, "triton")
        check_polar(n, torch.float32, "triton", generator)
        check_mean(n, torch.float32, "triton", generator)
