"""Ranks that are 0 in A and in B, as padding to a common rank leaves them: the layer has the rank that is there."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, TOLERANCE, spectrum_pair
from torch import Tensor

import reflora
from reflora import reference
from reflora.columns import DEGENERATE, REFACTORED
from reflora.optim.sharded import ShardedOps

# which of r ranks are there
PLACES = {
    "trailing": [1, 1, 1, 0, 0], "leading": [0, 1, 1], "between": [1, 0, 1, 0, 0, 1, 0], "one": [0, 1, 0, 0],
    "most": [1] * 15 + [0] * 2, "class 32": [1, 0] * 12, "class 64": [1] * 30 + [0] * 10,
}  # fmt: skip
# as compiled: one that is solved in registers and one that is not
COMPILED = ("between", "class 32")
places = pytest.mark.parametrize("there", PLACES.values(), ids=PLACES)
each = pytest.mark.parametrize(
    "there, backend",
    [
        pytest.param(there, backend, id=f"{name}-{backend}", marks=pytest.mark.kernels if backend == "triton" else ())
        for name, there in PLACES.items() for backend in BACKENDS if backend != "triton" or name in COMPILED
    ],
)  # fmt: skip


def padded(there: list[int], k: float, dtype: torch.dtype, n_in: int = 70, n_out: int = 45) -> tuple[Tensor, ...]:
    """(A, B, the same without what is 0, which ranks are there)."""
    mask = torch.tensor(there, dtype=torch.bool)
    a, b = spectrum_pair(sum(there), n_in, n_out, k, k, dtype)
    A, B = torch.zeros(len(there), n_in, dtype=dtype), torch.zeros(n_out, len(there), dtype=dtype)
    A[mask], B[:, mask] = a, b
    return A, B, a, b, mask


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_padded_layer_is_the_layer_without_its_padding(there: list[int], dtype: torch.dtype, backend: str) -> None:
    k = 10.0
    A, B, a, b, mask = padded(there, k, dtype)
    gA, gB = torch.randn_like(A), torch.randn_like(B)
    wanted_A, wanted_B = reference.precondition(A, B, gA, gB)
    small_A, small_B = reference.precondition(a, b, gA[mask], gB[:, mask])
    torch.testing.assert_close(wanted_A[mask], small_A)
    report = reflora.precondition_([(A, B), (a, b)], [(gA, gB), (gA[mask], gB[:, mask].contiguous())], backend=backend)
    assert report.status.tolist() == [REFACTORED] * 2
    tolerance = 10 * TOLERANCE[dtype, k]
    for found, wanted in ((gA, wanted_A), (gB, wanted_B)):
        assert float((found - wanted).norm() / wanted.norm()) < tolerance
    for column in (report.condition_A, report.condition_B, report.balance, report.scale):
        torch.testing.assert_close(column[0], column[1], rtol=1e-4, atol=1e-12)  # of rank one the imbalance is rounding


@each
def test_refactor(there: list[int], backend: str) -> None:
    A, B, *_, mask = padded(there, 10.0, torch.float64)
    product = B @ A
    report = reflora.refactor_([(A, B)], backend=backend)
    assert report.status.tolist() == [REFACTORED]
    torch.testing.assert_close(B @ A, product)
    torch.testing.assert_close(A @ A.mT, B.mT @ B)
    assert not A[~mask].any() and not B[:, ~mask].any()


@each
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 0}, {"interval": 2}, {"precision": "float32"}], ids=str)
def test_adamw(there: list[int], options: dict[str, object], backend: str) -> None:
    """Trained beside the layer without its padding; what is 0 stays 0, and the layer is never degenerate."""
    if backend == "triton" and options.keys() & {"warmup_steps", "interval"}:
        pytest.skip("the same kernels")
    A, B, a, b, mask = padded(there, 3.0, torch.float32)
    pairs = [tuple(t.requires_grad_() for t in both) for both in ((A, B), (a.contiguous(), b.contiguous()))]
    optimizer = reflora.RefLoRAAdamW(pairs, lr=1e-2, backend=backend, **options)  # type: ignore[arg-type]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gA, gB = (torch.randn(t.shape, generator=generator) for t in pairs[1])
        for (A, B), own in zip(pairs, (mask, torch.ones(len(a), dtype=torch.bool))):
            A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
            A.grad[own], B.grad[:, own] = gA, gB
        optimizer.step()
        assert optimizer.diagnostics().status.tolist() == [REFACTORED] * 2
    (A, B), (a, b) = pairs
    assert not A[~mask].any() and not B[:, ~mask].any()
    torch.testing.assert_close(A[mask], a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(B[:, mask], b, rtol=1e-4, atol=1e-4)


def test_a_layer_of_few_columns_needs_as_many_as_there_are_ranks(backend: str) -> None:
    A, B, *_ = padded([1, 1, 0, 0, 0, 0], 3.0, torch.float64, n_in=3, n_out=2)
    gA, gB = torch.randn_like(A), torch.randn_like(B)
    wanted = reference.precondition(A, B, gA, gB)
    assert reflora.precondition_([(A, B)], [(gA, gB)], backend=backend).status.tolist() == [REFACTORED]
    torch.testing.assert_close((gA, gB), wanted)


def test_ranks_that_are_0_in_one_factor_alone_are_there(backend: str) -> None:
    """Their gradients are not 0: at the start B is."""
    A, B, *_ = padded([1, 1, 1, 0], 3.0, torch.float64)
    B[:, 3] = 1.0
    report = reflora.precondition_([(A, B)], [(A.clone(), B.clone())], backend=backend)
    assert report.status.tolist() == [DEGENERATE] and report.condition_A.isinf().all()


@places
def test_sharded(there: list[int]) -> None:
    """By way of the Grams alone."""
    A, B, *_, mask = padded(there, 3.0, torch.float64)
    S, S_inv = ShardedOps([reflora.LoRAPair("layer", A, B)]).solve([0])[0][0]
    wanted, wanted_inv, _ = reference.choose(A, B)
    torch.testing.assert_close((S, S_inv), (wanted, wanted_inv))


def test_experts_of_unlike_ranks(backend: str) -> None:
    """One layer of three experts, each padded to the largest rank."""
    ranks, n_in, n_out, r = (1, 4, 2), 30, 21, 4
    A, B = torch.zeros(3, r, n_in, dtype=torch.float64), torch.zeros(n_out, r, 3, dtype=torch.float64)
    for expert, rank in enumerate(ranks):
        A[expert, :rank], B[:, :rank, expert] = spectrum_pair(rank, n_in, n_out, 3.0, 3.0)
    pair = reflora.LoRAPair("experts", A, B, "experts(3)")
    gA, gB = torch.randn_like(A), torch.randn_like(B)
    wanted = [reference.precondition(A[e], B[:, :, e], gA[e], gB[:, :, e]) for e in range(3)]
    assert reflora.precondition_([pair], [(gA, gB)], backend=backend).status.tolist() == [REFACTORED] * 3
    for expert, (wanted_A, wanted_B) in enumerate(wanted):
        torch.testing.assert_close(gA[expert], wanted_A)
        torch.testing.assert_close(gB[:, :, expert], wanted_B)
