"""Where tests of kernels run, and the pairs they use."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of, served, spectrum_pair

from reflora import reference
from reflora.backends import triton_backend
from reflora.columns import DEGENERATE, SKIPPED
from reflora.pairs import LoRAPair
from reflora.plan import Plan

DOUBLE = torch.float64
# a GPU runs the kernels under `pytest -m gpu`, tools/ptxsim without one, under `make emulate`
DEVICE = device_of("triton")
EMULATED = [pytest.mark.kernels, pytest.mark.skipif(not served("triton"), reason="make emulate runs it")]
MARKS = [pytest.mark.gpu] if torch.cuda.is_available() else EMULATED


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=DOUBLE).to(DEVICE, dtype)


def pair(r, k_A=3.0, k_B=1e3, dtype=torch.float32, n_in=150, n_out=173, scale_A=1.0, scale_B=1.0):
    """A pair with log-spaced spectra of the given condition."""
    A, B = spectrum_pair(r, n_in, n_out, k_A, k_B)
    return LoRAPair("pair", (scale_A * A).to(DEVICE, dtype), (scale_B * B).to(DEVICE, dtype))


def precondition(pairs, grads, scalar=False, precision="float64"):
    """The kernels over these gradients. Returns the result rows."""
    plan = Plan(pairs)
    plan.bind_grads(grads)
    return triton_backend.precondition(plan, scalar, precision)


def refactor(pairs, scalar=False, precision="float64"):
    return triton_backend.refactor(Plan(pairs), scalar, precision)


def preconditioned(pairs, grads):
    """(gA, gB) of each pair by the reference."""
    return [reference.precondition(*(t.cpu() for t in (p.A, p.B, *sides))) for p, sides in zip(pairs, grads)]


def degenerate_pairs():
    """(name, pair, status, scale or None for the balance scalar)"""
    row = torch.tensor([7], device=DEVICE)
    yield "zero B", LoRAPair("", randn(4, 30), 0 * randn(20, 4)), DEGENERATE, 1.0
    yield "all zero", LoRAPair("", 0 * randn(4, 30), 0 * randn(20, 4)), DEGENERATE, 1.0
    yield "rank 1", LoRAPair("", randn(4, 30), randn(20, 1) @ randn(1, 4)), DEGENERATE, None
    yield "k = 1e12", pair(6, 3, 1e12, DOUBLE), DEGENERATE, None
    yield "n < r", LoRAPair("", randn(6, 4), randn(20, 6)), DEGENERATE, None
    yield "far scales", LoRAPair("", 1e30 * randn(3, 40), 1e-30 * randn(20, 3)), DEGENERATE, 1.0
    yield "nan", LoRAPair("", torch.nan * randn(3, 40), randn(20, 3)), SKIPPED, None
    yield "inf", LoRAPair("", randn(3, 40), randn(20, 3).index_fill(0, row, torch.inf)), SKIPPED, None
