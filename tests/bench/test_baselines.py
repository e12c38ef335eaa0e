"""The baselines do what their papers and their authors' codes do: benchmarks/baselines/README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_cases import SCALING, STEPS, Pair, pairs_and_targets, set_gradients
from conftest import spectrum_pair
from torch import Tensor

from benchmarks.baselines import balora, lora_muon, lora_pro, lora_rite, nora, preclora, published_reflora

ROOT = Path(__file__).parents[2]
AUTHORS = json.loads((ROOT / "tests" / "data" / "baseline_weights.json").read_text())
# on weights of size 1, ten steps; float64 figures also bear an epsilon that torch's Adam places elsewhere (1e-12)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}
Build = Callable[[list[Tensor], list[Pair]], Any]


def projected(parameters: list[Tensor], pairs: list[Pair]) -> torch.optim.Optimizer:
    """The projection of BaLoRA behind gradient descent, where the signs of singular vectors leave the product alone."""
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: balora.project_(pairs))
    return optimizer


def published(parameters: list[Tensor], pairs: list[Pair], scalar: bool) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    published_reflora.attach(optimizer, pairs, scalar=scalar)
    return optimizer


PLAIN = {"lr": 1e-2, "weight_decay": 0.0}
BUILDS: dict[str, Build] = {
    "lora-pro": lambda p, pairs: lora_pro.LoRAPro(p, pairs, SCALING, **PLAIN),
    "lora-pro-full": lambda p, pairs: lora_pro.LoRAProFull(p, pairs, SCALING, lr=1e-3, weight_decay=0.0),
    "lora-rite": lambda p, pairs: lora_rite.LoRARITE(p, pairs, **PLAIN),
    "preclora": lambda p, pairs: preclora.PrecLoRA(p, pairs, eps=1e-12, **PLAIN),
    "scaledgd": lambda p, pairs: preclora.ScaledGD(p, pairs, lr=1e-2),
    "nora+": lambda p, pairs: nora.NoRAPlus(p, pairs, **PLAIN),
    "balora": projected,
    "reflora": lambda p, pairs: published(p, pairs, False),
    "reflora-s": lambda p, pairs: published(p, pairs, True),
}
OPTIMIZERS: dict[str, Build] = {
    **{name: BUILDS[name] for name in ("lora-pro", "lora-pro-full", "lora-rite", "nora+")},
    "preclora": lambda p, pairs: preclora.PrecLoRA(p, pairs, **PLAIN),
    "balora": lambda p, pairs: balora.BaLoRA(p, pairs, **PLAIN),
    "lora-muon": lambda p, pairs: lora_muon.LoRAMuon(p, pairs, **PLAIN),
}


def flat(pairs: list[Pair]) -> list[Tensor]:
    return [factor for pair in pairs for factor in pair]


# ---- the authors' figures


def signed(pair: Pair) -> Pair:
    """The pair with the largest entry of every row of A positive."""
    A, B = pair
    signs = A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
    return signs * A, B * signs.T


@pytest.mark.parametrize("name, case", [(name, case) for name in AUTHORS for case in AUTHORS[name] if case != "source"])
def test_ten_steps_are_those_of_the_authors_code(name: str, case: str) -> None:
    dtype = getattr(torch, case.split()[0])
    pairs, targets = pairs_and_targets(dtype, case.split()[1])
    start = [factor.detach().clone() for factor in flat(pairs)]
    optimizer = BUILDS[name](flat(pairs), pairs)
    for _ in range(STEPS):
        set_gradients(pairs, targets)
        optimizer.step()
    for pair, figures in zip(pairs, AUTHORS[name][case]):
        expected = tuple(torch.tensor(f, dtype=dtype).reshape(w.shape) for f, w in zip(figures, pair))
        found = tuple(factor.detach() for factor in pair)
        if name == "balora":
            found, expected = signed(found), signed(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1, expected[1].abs().max()))
    moved = max((factor - old).abs().max() for factor, old in zip(flat(pairs), start))
    assert moved > 1e3 * TOLERANCE[dtype]


# ---- what all have in common


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_parameters_get_adamw_and_ranks_may_differ(name: str) -> None:
    pairs = [tuple(f.requires_grad_() for f in spectrum_pair(r, 20, 15, 3.0, 5.0, torch.float64)) for r in (2, 5, 2)]
    other, twin = (torch.ones(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = OPTIMIZERS[name]([*flat(pairs), other], pairs)
    adamw = torch.optim.AdamW([twin], lr=optimizer.param_groups[0]["lr"], weight_decay=0.0)
    old = [factor.detach().clone() for factor in flat(pairs)]
    for _ in range(3):
        for factor in flat(pairs):
            factor.grad = 1e-2 * torch.randn_like(factor)
        other.grad = twin.grad = torch.randn_like(other)
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(other, twin, rtol=1e-12, atol=0)
    for factor, before in zip(flat(pairs), old):
        assert factor.isfinite().all() and not torch.equal(factor, before)
    with torch.no_grad():
        assert optimizer.step(closure=lambda: 3.0) == 3.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_they_train_from_pefts_start(name: str) -> None:
    pairs, targets = pairs_and_targets(torch.float32, "zero")

    def error() -> float:
        return sum((SCALING * B @ A - W).square().sum().item() for (A, B), W in zip(pairs, targets))

    optimizer, before = OPTIMIZERS[name](flat(pairs), pairs), error()
    for _ in range(100):
        set_gradients(pairs, targets)
        optimizer.step()
    assert error() < 0.9 * before


# ---- each one's own property


def full_gradient(A: Tensor, B: Tensor) -> Tensor:
    """A random gradient of W, and those of the factors that follow from it, set."""
    G = torch.randn(B.shape[0], A.shape[1], dtype=A.dtype)
    A.grad, B.grad = SCALING * B.detach().T @ G, SCALING * G @ A.detach().T
    return G


def test_lora_pro_comes_closest_to_the_full_gradient() -> None:
    """s B gA + s gB A is the projection of the full gradient onto what a step of the factors can reach; the X of the
    Sylvester equation chooses among equal ones."""
    A, B = (factor.requires_grad_() for factor in spectrum_pair(4, 30, 20, 2.0, 3.0))
    G = full_gradient(A, B)
    gA, gB = A.grad, B.grad
    spectra = tuple(lora_pro.Spectrum.of(gram[None]) for gram in ((A @ A.T).detach(), (B.T @ B).detach()))
    [(new_A, new_B)] = lora_pro.adjusted([(A.detach(), B.detach())], [(gA, gB)], spectra, SCALING)
    of_rows, of_columns = (torch.linalg.qr(f.detach()).Q for f in (A.T, B))
    reach = of_columns @ (of_columns.T @ G)
    reach = reach + (G - reach) @ of_rows @ of_rows.T
    torch.testing.assert_close(SCALING * (B @ new_A + new_B @ A).detach(), reach, rtol=1e-6, atol=1e-6)

    right_hand = -(torch.linalg.inv(B.T @ B) @ gA @ A.T) / SCALING**2
    X = (new_A - torch.linalg.inv(B.T @ B) @ gA / SCALING**2) @ torch.linalg.pinv(A)
    torch.testing.assert_close(B.T @ B @ X + X @ A @ A.T, right_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda p, pairs: lora_rite.LoRARITE(p, pairs, eps=0.0, **PLAIN),
        lambda p, pairs: lora_muon.LoRAMuon(p, pairs, lr=1e-2, weight_decay=0.1),
        lambda p, pairs: preclora.ScaledGD(p, pairs, damping=0.0, lr=1e-2),
    ],
    ids=["lora-rite", "lora-muon", "scaledgd"],
)
def test_step_does_not_depend_on_the_factorisation(build: Build) -> None:
    A, B = spectrum_pair(4, 30, 20, 2.0, 3.0)
    Q = torch.randn(4, 4, dtype=torch.float64)
    targets = [torch.randn(B.shape[0], A.shape[1], dtype=torch.float64)]
    products = []
    for pair in ((A, B), (Q @ A, B @ torch.linalg.inv(Q))):
        pairs = [tuple(factor.clone().requires_grad_() for factor in pair)]
        optimizer = build(flat(pairs), pairs)
        set_gradients(pairs, targets)
        optimizer.step()
        products.append((pairs[0][1] @ pairs[0][0]).detach())
    torch.testing.assert_close(products[1], products[0], rtol=1e-8, atol=1e-10)
    assert (products[0] - B @ A).abs().max() > 1e-4


def test_lora_muon_moves_each_half_by_half_the_step() -> None:
    A, B = spectrum_pair(4, 30, 20, 2.0, 50.0)
    factors = [factor.clone().requires_grad_() for factor in (A, B)]
    optimizer = lora_muon.LoRAMuon(factors, [tuple(factors)], lr=1e-2, weight_decay=0.0, momentum=0.0)
    full_gradient(*factors)
    gA, gB = (factor.grad for factor in factors)
    optimizer.step()
    dA, dB = factors[0].detach() - A, factors[1].detach() - B
    for half in (B @ dA, dB @ A):
        values = torch.linalg.svdvals(half)[:4]
        torch.testing.assert_close(values, torch.full_like(values, 0.5e-2), rtol=1e-8, atol=0)
    assert (gA * dA).sum() < 0 and (gB * dB).sum() < 0


def test_balora_leaves_the_balanced_pair_of_the_same_product() -> None:
    A, B = spectrum_pair(5, 30, 20, 3.0, 1e3)
    pair = [factor.clone() for factor in (A, B)]
    balora.project_([tuple(pair)])
    torch.testing.assert_close(pair[1] @ pair[0], B @ A, rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(B @ A)[:5].diag()
    torch.testing.assert_close((pair[0] @ pair[0].T, pair[1].T @ pair[1]), (values, values), rtol=1e-10, atol=1e-12)


def test_nora_starts_from_a_sketch_of_the_weight() -> None:
    W = torch.randn(40, 3) @ torch.randn(3, 30)
    A, B = torch.randn(2, 30), torch.randn(40, 2)
    nora.start_([(A, B)], [W], scaling=2.0, sigma=0.1, seed=3)
    omega = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(A, 0.05 * omega @ W)
    assert not B.any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_what_gradients_leave_alone(name: str) -> None:
    A, B = (factor.requires_grad_() for factor in spectrum_pair(3, 20, 15, 2.0, 2.0))
    before = (B @ A).detach()
    optimizer = OPTIMIZERS[name]([A, B], [(A, B)])
    for group in optimizer.param_groups:
        group.update(lr=0.1, weight_decay=0.5)
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    optimizer.step()
    # each factor by 1 - lr wd; LoRA-Pro's full form and LoRA-Muon decay the product
    expected = 0.95 if name in ("lora-pro-full", "lora-muon") else 0.95**2
    torch.testing.assert_close((B @ A).detach(), expected * before, rtol=1e-9, atol=1e-12)
