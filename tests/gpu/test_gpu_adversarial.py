"""The adversarial pairs and matrices on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from adversarial_checks import (
    ORDERS,
    check_adamw,
    check_eigh,
    check_invariant,
    check_mean,
    check_polar,
    check_refactored,
    draw,
)

import reflora
from reflora.constants import METRICS

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


@pytest.mark.parametrize("reg", [1e-2, 1e-12])
@BACKENDS
def test_riemannian(backend: str, reg: float) -> None:
    names, pairs = draw(torch.float32, seed=14, count=250)
    check_adamw(names, [(A.to(DEVICE), B.to(DEVICE)) for A, B in pairs], backend, reflora.RiemannianAdamW, reg=reg)


@pytest.mark.parametrize("metric, moments", [*zip(METRICS, ["gradients"] * 3), ("scaled", "momentum")])
@pytest.mark.parametrize("carry", [False, True])
def test_invariant(metric: str, moments: str, carry: bool) -> None:
    names, pairs = draw(torch.float32, seed=15, count=250)
    on_device = [(A.to(DEVICE), B.to(DEVICE)) for A, B in pairs]
    check_invariant(names, on_device, "triton", metric, moments, carry_grams=carry)


@DTYPES
def test_linalg(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(13)
    for n in ORDERS:
        check_eigh(n, dtype, "triton", DEVICE)
        check_polar(n, dtype, "triton", generator, DEVICE)
        check_mean(n, dtype, "triton", generator, DEVICE)
