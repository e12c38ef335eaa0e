"""RefLoRA's start from B = 0: no collapse, its mathematics, and every backend against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import BACKENDS, spectrum_pair
from kernel_cases import pair, randn
from rows import Rows, check_step, grads_like
from start_cases import crossing_pairs, drifting

from reflora import LoRAPair, RefLoRAAdamW, reference
from reflora import columns as col
from reflora.constants import START_STEPS
from reflora.optim import state as keys
from reflora.optim.pairs import PairOps
from reflora.reference import Hypers

DOUBLE = torch.float64
RANK, WIDTHS, STEPS, RATE = 8, (48, 64), 200, 1e-2


# ---- the collapse, and that it is gone


@functools.cache
def fine_tune(seed: int, backend: str | None = None, **options) -> tuple[float, float]:
    """(held-out loss over that of no training, stable rank of B A) after 200 steps from B = 0; AdamW's of no backend.

    A linear layer learns a map of 16 equal singular values from inputs with a common mean, as tokens have: the first
    gradient is nearly of rank one.
    """
    draw = torch.Generator().manual_seed(seed)
    (n_out, n_in), rank = WIDTHS, RANK
    left, right = (torch.linalg.qr(torch.randn(n, 16, generator=draw)).Q for n in WIDTHS)
    goal, mean = left @ right.mT, 2 * torch.randn(n_in, 1, generator=draw)
    A = ((2 * torch.rand(rank, n_in, generator=draw) - 1) / n_in**0.5).requires_grad_()
    B = torch.zeros(n_out, rank, requires_grad=True)
    made = RefLoRAAdamW([(A, B)], lr=RATE, backend=backend, **options) if backend else None
    optimizer = made or torch.optim.AdamW([A, B], lr=RATE)
    for step in range(STEPS):
        inputs = torch.randn(n_in, 32, generator=draw) + mean
        ((B @ A - goal) @ inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
    inputs = torch.randn(n_in, 4096, generator=draw) + mean
    values = torch.linalg.svdvals((B @ A).detach())
    loss = ((B @ A - goal) @ inputs).square().mean() / (goal @ inputs).square().mean()
    return float(loss.detach()), float(values.square().sum() / values[0].square())


SEEDED = [*((seed, "cpp") for seed in range(3)), (0, "torch")]
SEEDED = [pytest.param(seed, name, id=f"{name}-{seed}") for seed, name in SEEDED if name in BACKENDS]


@pytest.mark.xdist_group("trainings from B = 0")  # which share what is trained
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("seed, backend", SEEDED)
def test_the_exact_S_collapses_from_B_0_and_the_default_does_not(seed, backend, scalar):
    lora, rank_of_lora = fine_tune(seed)
    exact, rank_of_exact = fine_tune(seed, backend, scalar=scalar, warmup_steps=0)
    gentle, rank = fine_tune(seed, backend, scalar=scalar)
    assert exact > 1.1 * lora and rank_of_exact < 0.75 * rank_of_lora
    assert gentle < 1.005 * lora and rank > 0.97 * rank_of_lora


@pytest.mark.xdist_group("trainings from B = 0")
@pytest.mark.parametrize("seed, backend", SEEDED)
def test_it_is_no_worse_than_100_plain_steps(seed, backend):
    plain, _ = fine_tune(seed, backend, scalar=False, warmup_steps=100)
    gentle, _ = fine_tune(seed, backend, scalar=False)
    assert gentle < 1.01 * plain


# ---- the mathematics


@pytest.mark.parametrize("weight", [0.0, 0.06, 0.5, 0.99, 1.0])
def test_shrunk_grams_are_means_of_the_gram_and_a_multiple_of_I(weight):
    A, B = spectrum_pair(5, 20, 31, 3.0, 1e3)
    own_A, own_B = reference.shrunk(A, B, weight)
    for G, own in ((A @ A.mT, own_A @ own_A.mT), (B.mT @ B, own_B.mT @ own_B)):
        eye = torch.eye(5, dtype=DOUBLE)
        torch.testing.assert_close(own, weight * G + (1 - weight) * torch.trace(G) / 5 * eye, rtol=1e-12, atol=1e-14)


def test_the_weight_rises_from_0_to_1():
    assert reference.shrink_weight(0, 400) == 0.0 and reference.shrink_weight(400, 400) == 0.5
    assert reference.shrink_weight(40_000, 400) > 0.9998


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.8, 1.0])
def test_the_shrunk_S_has_the_symmetries_of_S(weight):
    """Swapping the factors inverts it, an orthogonal change of basis carries it along, and no scale matters."""
    A, B = spectrum_pair(6, 20, 31, 3.0, 50.0)
    S, S_inv, _ = reference.choose(A, B, weight=weight)
    eye = torch.eye(6, dtype=DOUBLE)
    torch.testing.assert_close(S @ S_inv, eye, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference.choose(B.mT, A.mT, weight=weight)[0], S_inv, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference.choose(3 * A, B / 7, weight=weight)[0], S, rtol=1e-9, atol=1e-9)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    torch.testing.assert_close(reference.choose(Q.mT @ A, B @ Q, weight=weight)[0], Q.mT @ S @ Q, rtol=1e-9, atol=1e-9)
    if weight == 0:
        torch.testing.assert_close(S, eye, rtol=0, atol=1e-12)
    if weight == 1:
        torch.testing.assert_close(S * reference.balance_scalar(A, B), reference.refactoring(A, B).S)


def test_S_of_a_B_of_rank_one_is_bounded():
    """Where the exact S does not exist: its condition is at most sqrt(1 + r w / (1 - w)) of either Gram."""
    A, _ = spectrum_pair(8, 40, 30, 2.0, 2.0)
    B = torch.randn(30, 1, dtype=DOUBLE) @ torch.randn(1, 8, dtype=DOUBLE)
    for weight in (0.0, 0.1, 0.5):
        S, _, why = reference.choose(A, B, weight=weight)
        values = torch.linalg.eigvalsh(S)
        assert why == "refactored" and values[-1] / values[0] <= 1 + 8 * weight / (1 - weight) + 1e-9


# ---- every backend against the reference


def start_pairs(dtype):
    return [
        pair(4, 3, 30, dtype, 50, 61),
        pair(9, 3, 1e3, dtype, 33, 20),
        LoRAPair("zero B", randn(3, 40, dtype=dtype), 0 * randn(30, 3, dtype=dtype)),
        LoRAPair("rank 1", randn(4, 30, dtype=dtype), randn(20, 1, dtype=dtype) @ randn(1, 4, dtype=dtype)),
        LoRAPair("n < r", randn(6, 4, dtype=dtype), randn(25, 6, dtype=dtype)),
        LoRAPair("experts", randn(2 * 3, 21, dtype=dtype), randn(17, 3 * 2, dtype=dtype), "experts(2)"),
    ]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("count", [0, 60, 5000])
def test_a_step_of_the_start(every_backend, dtype, count):
    rows = Rows(start_pairs(dtype), every_backend)
    for steps in rows.own("A", keys.STEPS):
        steps.fill_(count)
    for _ in range(2):
        check_step(rows, grads_like(rows.pairs), start=START_STEPS)


@pytest.mark.parametrize("count", [0, 250, 12_000])
def test_preconditioning_counts_the_steps_of_every_row(backend, count):
    pairs = start_pairs(torch.float32)
    counts = [torch.arange(p.experts, dtype=torch.float32, device=p.A.device) + n + count for n, p in enumerate(pairs)]
    grads = [(torch.randn_like(p.A), torch.randn_like(p.B)) for p in pairs]
    wanted = []
    for p, (gA, gB), steps in zip(pairs, grads, counts):
        views = zip(p.views_A(p.A), p.views_B(p.B), p.views_A(gA.clone()), p.views_B(gB.clone()))
        weights = [reference.shrink_weight(int(n), START_STEPS) for n in steps]
        wanted.append([reference.precondition(*(t.cpu() for t in view), weight=w) for view, w in zip(views, weights)])
    for p, (gA, gB) in zip(pairs, grads):
        p.A.grad, p.B.grad = gA, gB
    PairOps(pairs, backend).precondition([True] * len(pairs), counts=dict(enumerate(counts)))
    for p, (gA, gB), each in zip(pairs, grads, wanted):
        for view_A, view_B, (want_A, want_B) in zip(p.views_A(gA), p.views_B(gB), each):
            for got, want in ((view_A, want_A), (view_B, want_B)):
                assert (got.double().cpu() - want).norm() <= 2e-5 * want.norm(), p.name


@pytest.mark.parametrize("interval", [1, 3])
def test_refloras_begins_where_the_norms_meet(every_backend, interval):
    """A pair stays balanced once it has begun."""
    hypers = Hypers(lr=2e-2)
    rows = Rows(crossing_pairs(DOUBLE), every_backend, (hypers, hypers))
    for _ in range(9):
        check_step(rows, drifting(rows.pairs), scalar=True, start=START_STEPS, interval=interval)
    begun = [float(phases[0]) == col.BALANCED for phases in rows.own("A", keys.PHASE)]
    assert begun[:4] == [True, True, True, False]
    for p, on in list(zip(rows.pairs, begun))[:3]:
        assert not on or interval > 1 or abs(float(p.A.norm() / p.B.norm()) - 1) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refloras_begins_in_16_bits_too(fast_backend, dtype):
    A, B = (0.05 * torch.randn(4, 40)).to(dtype), torch.zeros(30, 4, dtype=dtype)
    optimizer = RefLoRAAdamW([(A.requires_grad_(), B.requires_grad_())], lr=1e-2, scalar=True, backend=fast_backend)
    for _ in range(60):
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B) + 1
        optimizer.step()
    assert float(optimizer.state[A]["reflora_phase"]) == col.BALANCED
    assert 0.45 < float((B.float().norm() / A.float().norm()).detach()) < 2.2
