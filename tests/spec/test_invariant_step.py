"""InvariantAdamW's step on every backend, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from rows import DOUBLE, FLOAT, STORED, InvariantRows, check_step, grads_like, layers, pair

from reflora import columns as col
from reflora.columns import REFACTORED
from reflora.constants import METRICS, MOMENTS
from reflora.optim.state import MASTER
from reflora.reference import Hypers


def cases(found, quick):
    """Cases, those that are not quick by `make emulate` alone."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.thorough) for case in found]


KINDS = cases(
    [(metric, moments) for metric in METRICS for moments in MOMENTS], [("reflora", "gradients"), ("scaled", "momentum")]
)
OTHERS = (Hypers(lr=1e-2, maximize=True), Hypers(lr=2e-2, eps=1e-3))


@pytest.mark.as_launched
@pytest.mark.parametrize("metric, moments", KINDS)
def test_every_layout_and_degenerate_layers(every_backend, metric, moments):
    rows = InvariantRows(layers(4, FLOAT), every_backend)
    for _ in range(4):
        check_step(rows, grads_like(rows.pairs), metric=metric, moments=moments)


@pytest.mark.as_launched
@pytest.mark.parametrize("stored", cases([(name,) for name in STORED], [("bfloat16, master",)]))
def test_every_storage_type(every_backend, stored):
    dtype, storage = STORED[stored]
    rows = InvariantRows(layers(5, dtype), every_backend, storage=storage)
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs))
        if storage.master:
            assert all(torch.equal(rows.state[t][MASTER].to(dtype), t) for t in rows.state)


@pytest.mark.as_launched
@pytest.mark.parametrize("r", cases([(r,) for r in (1, 7, 16, 20, 48, 100)], [(7,), (20,), (100,)]))
def test_every_rank_class(every_backend, r):
    rows = InvariantRows([pair(r, 2 * r + 36, 3 * r + 21, FLOAT), pair(r, 150, 133, FLOAT)], every_backend)
    for _ in range(2):
        assert (check_step(rows, grads_like(rows.pairs))[:, col.STATUS] == REFACTORED).all()


@pytest.mark.parametrize("metric", cases([(metric,) for metric in METRICS], [("identity",)]))
def test_maximize_eps_and_a_scaled_gradient(every_backend, metric):
    rows = InvariantRows(layers(4, DOUBLE)[:6], every_backend, OTHERS)
    scale = {n: torch.tensor(v, device=device_of(every_backend)) for n, v in (("grad_scale", 8.0), ("found_inf", 0.0))}
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs, 8e-3), **scale, metric=metric, damping=1e-2)
