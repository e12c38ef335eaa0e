"""The adversarial pairs and matrices on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from adversarial_checks import ORDERS, check_adamw, check_eigh, check_mean, check_polar, check_refactored, draw

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
    names, pairs = draw(torch.float32, seed=12, count=500)
    check_adamw(names, [(A.to(DEVICE), B.to(DEVICE)) for A, B in pairs], backend, reflora.RefLoRAAdamW, scalar=scalar)


@DTYPES
def test_linalg(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(13)
    for n in ORDERS:
        check_eigh(n, dtype, "triton", DEVICE)
        check_polar(n, dtype, "triton", generator, DEVICE)
        check_mean(n, dtype, "triton", generator, DEVICE)
