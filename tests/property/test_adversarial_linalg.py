"""eigh, polar and geometric_mean of orders up to 130, on matrices that break solvers, several kinds a batch."""

from __future__ import annotations

import pytest
import torch
from adversarial_checks import ORDERS, check_eigh, check_mean, check_polar
from conftest import served


def orders(backend: str, dtype: torch.dtype) -> list[int]:
    """Vectors and blocks of the C++ core have up to 16 numbers: past 33 their ends, and every other remainder once."""
    if backend == "torch":  # which is LAPACK
        return [n for n in ORDERS if n <= 17 or n % 16 == 0 or n in (33, 65, 130)]
    first = 0 if dtype == torch.float32 else 2
    return [n for n in ORDERS if n <= 33 or n % 16 in (15, 0, 1) or n % 5 == first]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


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
