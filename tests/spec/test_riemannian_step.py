"""RiemannianAdamW's step on every backend, against the float64 reference and PEFT's own optimizer."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from rows import DOUBLE, FLOAT, OTHERS, STORED, Rows, check_step, grads_like, layers, pair, same
from torch import nn
from toys import clones, factors, leaf_pairs, random_grads, step_alike

import reflora
from reflora import columns as col
from reflora.columns import DEGENERATE, REFACTORED, SKIPPED
from reflora.pairs import LoRAPair
from reflora.reference import damped_inverses


def cases(found, quick):
    """Cases, those that are not quick by `make emulate` alone."""
    return [pytest.param(case, marks=() if case in quick else pytest.mark.thorough) for case in found]


@pytest.mark.as_launched
@pytest.mark.parametrize("reg", [1e-6, 1e-2, 30.0])
def test_every_layout(every_backend, reg):
    rows = Rows(layers(4, FLOAT), every_backend)
    for _ in range(3):
        status = check_step(rows, grads_like(rows.pairs), reg=reg)[:, col.STATUS]
        assert (status == REFACTORED).all()


@pytest.mark.as_launched
@pytest.mark.parametrize("stored", cases(STORED, ["bfloat16, master", "float64"]))
def test_every_storage_type(every_backend, stored):
    dtype, storage = STORED[stored]
    rows = Rows(layers(5, dtype), every_backend, storage=storage)
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs), reg=1e-2)


@pytest.mark.as_launched
@pytest.mark.parametrize("r", cases([1, 7, 16, 20, 48, 100, 130], [7, 20, 100, 130]))
def test_every_rank(every_backend, r):
    rows = Rows([pair(r, 2 * r + 36, 3 * r + 21, FLOAT), pair(r, 150, 133, FLOAT)], every_backend)
    for _ in range(2):
        check_step(rows, grads_like(rows.pairs), reg=1e-2)


def test_amsgrad_and_maximize(every_backend):
    rows = Rows(layers(4, DOUBLE)[:6], every_backend, OTHERS)
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs), reg=1e-2)


@pytest.mark.as_launched
def test_carried_grams_give_the_same_bits(every_backend):
    start = layers(4, FLOAT)
    carried, fresh = (Rows(start, every_backend) for _ in range(2))
    for _ in range(4):
        grads = grads_like(carried.pairs)
        carried.step(grads, reg=1e-2, carry=True), fresh.step(grads, reg=1e-2)
        assert same(carried, fresh)


def test_float32_grams(every_backend):
    start = layers(6, FLOAT)[:6]
    rows, exact = (Rows(start, every_backend) for _ in range(2))
    for _ in range(3):
        grads = grads_like(rows.pairs)
        rows.step(grads, reg=1e-2, precision="float32"), exact.step(grads, reg=1e-2)
    for ours, theirs in zip(rows.tensors(), exact.tensors()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# ---- at the edges


def edges(dtype: torch.dtype) -> list[LoRAPair]:
    """Singular up to reg; norms whose squares leave the range; A = 0 and B = 0; one that is not finite."""
    p = pair(4, dtype=dtype)
    top = 1e18 if dtype == FLOAT else 1e150
    found = [(1e5 * p.A, p.B), (top * p.A, p.B), (p.A, p.B / top), (0 * p.A, 0 * p.B), (p.A, p.B.clone())]
    found[4][1][0, 0] = torch.nan
    found[0][0][1] = found[0][0][0]
    return [LoRAPair(str(number), A.clone(), B.clone()) for number, (A, B) in enumerate(found)]


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_degenerate_rows_and_far_scales(every_backend, dtype):
    start = edges(dtype)
    rows = Rows(start, every_backend)
    wanted = [damped_inverses(p.A, p.B, 1e-6)[2] for p in start[:4]]
    results = rows.step(grads_like(start), reg=1e-6)
    assert wanted[0] == "degenerate" and results[0, col.STATUS] == DEGENERATE
    assert results[3, col.STATUS] == REFACTORED and results[4, col.STATUS] == SKIPPED
    for number in range(4):
        rows.step(grads_like(start), reg=1e-6)
        assert all(t.isfinite().all() for t in rows.tensors(number))


def test_a_state_of_RefLoRAs_goes_on(every_backend):
    """Moments in units of S come back to those of I, as for a warm-up."""
    rows = Rows([pair(dtype=FLOAT)], every_backend)
    for options in ({}, {}, {"reg": 1e-2}, {"reg": 1e-2}, {}):
        check_step(rows, grads_like(rows.pairs), **options)


# ---- the optimizer


class Model(nn.Module):
    """Two linear layers, the names being PEFT's."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(3)
        for name in ("first", "second"):
            layer = nn.Module()
            layer.lora_A = nn.ModuleDict({"default": nn.Linear(30, 6, bias=False, dtype=dtype)})
            layer.lora_B = nn.ModuleDict({"default": nn.Linear(6, 30, bias=False, dtype=dtype)})
            nn.init.zeros_(layer.lora_B["default"].weight)
            setattr(self, name, layer)
        self.head = nn.Linear(30, 5, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            x = x + layer.lora_B["default"](layer.lora_A["default"](x))
        return self.head(x)

    @property
    def lora(self) -> list[tuple[Any, Any]]:
        return [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in (self.first, self.second)]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("options", [{}, {"reg": 1e-4, "amsgrad": True, "weight_decay": 0.1}], ids=str)
def test_it_is_PEFTs_optimizer(backend, options):
    """From B = 0 on, parameters outside of pairs included."""
    peft = pytest.importorskip("peft.optimizers", reason="a PEFT without create_riemannian_optimizer")
    if not hasattr(peft, "create_riemannian_optimizer"):
        pytest.skip("a PEFT without create_riemannian_optimizer")
    ours, theirs = Model(DOUBLE), Model(DOUBLE)
    mine = reflora.RiemannianAdamW(ours.parameters(), pairs=ours.lora, lr=1e-2, backend=backend, **options)
    own = peft.create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=1e-2, **options)
    for number in range(12):
        x, y = torch.randn(16, 30, dtype=DOUBLE), torch.randn(16, 5, dtype=DOUBLE)
        for model, optimizer in ((ours, mine), (theirs, own)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            if number == 0:  # eps is all that the step of A divides 0 by
                assert all(not A.grad.any() for A, _ in model.lora)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_gradients_stay_as_they_are():
    (p,) = layers(4, FLOAT)[:1]
    A, B = p.A.requires_grad_(), p.B.requires_grad_()
    A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    before = A.grad.clone(), B.grad.clone()
    reflora.RiemannianAdamW([(A, B)], lr=1e-2).step()
    assert torch.equal(A.grad, before[0]) and torch.equal(B.grad, before[1])


@pytest.mark.parametrize("carry", [False, True])
def test_resume_is_exact(fast_backend, carry):
    """From a file, into one with other rates, and a copy by pickle keeps its damping."""
    pairs = leaf_pairs([(4, 30, 21), (6, 25, 40)], FLOAT)
    options: dict[str, Any] = {"reg": 1e-3, "carry_grams": carry, "backend": fast_backend}
    optimizer = reflora.RiemannianAdamW(pairs, lr=1e-2, amsgrad=True, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        random_grads(factors(pairs), generator)
        optimizer.step()
    others, file = clones(pairs), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = reflora.RiemannianAdamW(others, lr=3e-2, **options)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    for _ in range(3):
        step_alike(pairs, optimizer, others, resumed, generator)
    assert all(torch.equal(p, q) for p, q in zip(factors(pairs), factors(others)))
    copied = pickle.loads(pickle.dumps(resumed))
    assert copied.options == resumed.options and copied.reg == 1e-3


@pytest.mark.parametrize("reg", [0, -1.0, float("nan"), 1e40, "1e-2", None], ids=repr)
def test_a_bad_reg_is_refused(reg):
    (p,) = layers(4, FLOAT)[:1]
    with pytest.raises((ValueError, TypeError), match="reg: expected a number"):
        reflora.RiemannianAdamW([(p.A.requires_grad_(), p.B.requires_grad_())], reg=reg)


@pytest.mark.parametrize(
    "cls, options", [(reflora.RiemannianAdamW, {}), (reflora.InvariantAdamW, {"metric": "identity"})]
)
def test_a_rank_past_both_sides_is_no_reason_for_plain_steps(cls, options):
    """There is no S, and none is needed; the order of the factors is asked about."""
    A, B = (torch.randn(*shape).requires_grad_() for shape in ((8, 3), (5, 8)))
    with pytest.warns(
        UserWarning, match=r"^r is larger than both n_in and n_out in LoRA pair\(s\) pair 0\. Is B given"
    ):
        optimizer = cls([(A, B)], lr=1e-2, **options)
    A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    optimizer.step()
    assert optimizer.diagnostics().status.tolist() == [REFACTORED]
