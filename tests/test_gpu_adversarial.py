"""The adversarial pairs and matrices on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from test_adversarial import check_refactored, draw
from test_adversarial_linalg import ORDERS, check_eigh, check_mean, check_polar

import reflora

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("scalar", [False, True], ids=["RefLoRA", "RefLoRA-S"])
@DTYPES
@BACKENDS
def test_refactor(backend: str, dtype: torch.dtype, scalar: bool) -> None:
    names, pairs = draw(dtype, seed=11)
    check_refactored(names, [(A.to(DEVICE), B.to(DEVICE)) for A, B in pairs], backend, scalar)


@pytest.mark.parametrize("scalar", [False, True], ids=["RefLoRA", "RefLoRA-S"])
@BACKENDS
def test_adamw(backend: str, scalar: bool) -> None:
    names, drawn = draw(torch.float32, seed=12, count=500)
    pairs = [(A.to(DEVICE).requires_grad_(), B.to(DEVICE).requires_grad_()) for A, B in drawn]
    optimizer = reflora.RefLoRAAdamW(pairs, lr=1e-3, scalar=scalar, backend=backend)
    for _ in range(3):
        for A, B in pairs:
            A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        optimizer.step()
    assert optimizer.diagnostics().skipped == 0
    for name, pair in zip(names, pairs):
        assert all(factor.isfinite().all() for factor in pair), name


@DTYPES
def test_linalg(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(13)
    for n in ORDERS:
        check_eigh(n, dtype, "triton", DEVICE)
        check_polar(n, dtype, "triton", generator, DEVICE)
        check_mean(n, dtype, "triton", generator, DEVICE)
