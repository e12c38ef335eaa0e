"""InvariantAdamW's step on every backend, against the float64 reference."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from conftest import device_of
from rows import DOUBLE, FLOAT, STORED, InvariantRows, check_step, grads_like, layers, pair, same

from reflora import columns as col
from reflora.columns import REFACTORED, SKIPPED
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


# ---- second moments a step late, and carried Grams


def with_a_bad_element(grads):
    grads[0][0][0, 0], grads[1][1][0, 1], grads[2][0][0, 0], grads[2][1][0, 0] = nan, inf, -inf, nan
    return grads


@pytest.mark.as_launched
@pytest.mark.parametrize("metric, moments", KINDS)
def test_late_second_moments_and_elements_that_are_not_finite(every_backend, metric, moments):
    rows = InvariantRows(layers(4, FLOAT), every_backend)
    for number in range(4):
        grads = grads_like(rows.pairs)
        results = check_step(
            rows, with_a_bad_element(grads) if number in (0, 2) else grads, metric=metric, moments=moments, late=True,
            carry=True,
        )  # fmt: skip
        assert (results[:3, col.STATUS] == SKIPPED).all() == (number in (0, 2))


@pytest.mark.as_launched
@pytest.mark.parametrize("stored", cases([(name,) for name in STORED], [("bfloat16, master",), ("float64",)]))
def test_late_second_moments_of_every_storage_type(every_backend, stored):
    dtype, storage = STORED[stored]
    rows = InvariantRows(layers(5, dtype), every_backend, storage=storage)
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs), late=True, carry=True)


@pytest.mark.as_launched
@pytest.mark.parametrize("r", cases([(r,) for r in (1, 16, 20, 48, 100)], [(20,), (48,)]))
def test_late_second_moments_of_every_rank_class(every_backend, r):
    rows = InvariantRows([pair(r, 2 * r + 36, 3 * r + 21, FLOAT), pair(r, 150, 133, FLOAT)], every_backend)
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs), late=True, carry=True)


@pytest.mark.as_launched
@pytest.mark.parametrize("moments", MOMENTS)
def test_carried_grams_are_the_fresh_ones(every_backend, moments):
    """Also past rows that sit a step out, are skipped, or whose factors somebody writes, and refused steps."""
    start = layers(4, FLOAT)
    carried, fresh = (InvariantRows(start, every_backend) for _ in range(2))
    for number in range(7):
        grads, found_inf = grads_like(start), torch.tensor(float(number == 4), device=device_of(every_backend))
        if number == 2:
            grads[0] = (None, None)
        if number == 5:
            grads[2][0][0, 0] = nan
        if number in (2, 3):
            for rows in (carried, fresh):
                rows.pairs[0].A.mul_(-1.5), rows.pairs[1].B.mul_(2)
        results = [
            rows.step(grads, carry=rows is carried, found_inf=found_inf, late=True, moments=moments)
            for rows in (carried, fresh)
        ]
        assert same(*([result] for result in results)) and same(carried, fresh), number
