"""What RefLoRAAdamW keeps beside factors: master weights, moments in float32, random rounding, carried Grams."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from rows import BF16, FLOAT, OTHERS, PLAIN_ADAMW, STORED, WIDE, WITH_MASTER, Rows, grads_like, layers, pair, same
from test_rounding import plain_round

from reflora import columns as col
from reflora.optim.state import MASTER
from reflora.pairs import LoRAPair
from reflora.reference import Hypers

WIDER = "float64", "float16", "bfloat16, master"
SCALAR = pytest.mark.parametrize("scalar", [False, True], ids=["full", "scalar"])


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_master_weights_are_the_weights_of_a_float32_run(every_backend, dtype):
    """S is found from the rounded factors: where it is I, nothing tells the two apart."""
    start = layers(4, dtype)[:6]
    single = [LoRAPair(p.name, p.A.float(), p.B.float(), p.layout) for p in start]
    rows, exact = Rows(start, every_backend, OTHERS, WITH_MASTER), Rows(single, every_backend, OTHERS)
    for _ in range(4):
        grads = grads_like(start)
        rows.step(grads, **PLAIN_ADAMW)
        exact.step([tuple(g.float() for g in sides) for sides in grads], **PLAIN_ADAMW)
        for ours, theirs in zip(rows.state, exact.state):
            assert torch.equal(rows.state[ours][MASTER], theirs) and torch.equal(ours, theirs.to(dtype))


@SCALAR
def test_what_somebody_writes_into_a_factor_replaces_its_master_weights_there(every_backend, scalar):
    start = layers(4, BF16)[:6]
    rows, told = (Rows(start, every_backend, storage=WITH_MASTER) for _ in range(2))
    grads = [grads_like(start) for _ in range(2)]
    for run in (rows, told):
        run.step(grads[0], scalar=scalar)
        run.pairs[0].A[1:3, 4:7] = 0.375
        run.pairs[5].B[5] *= 2
    told.own("A", MASTER)[0][1:3, 4:7] = 0.375
    told.own("B", MASTER)[5][5] = told.pairs[5].B[5].float()
    for run in (rows, told):
        run.step(grads[1], scalar=scalar)
    assert same(rows, told)
    assert not torch.equal(rows.own("A", MASTER)[0], rows.pairs[0].A.float())


def test_stochastic_rounding_draws_the_agreed_bits(every_backend):
    """What is rounded is the very float32 that master weights keep."""
    start = [layers(5, BF16)[place] for place in (0, 3, 5)]
    for steps, seed in ((12, 2**62 + 5), (3, 2**64 - 1)):
        rows, exact = Rows(start, every_backend, storage=WIDE), Rows(start, every_backend, storage=WITH_MASTER)
        for run in (rows, exact):
            run.bind(grads_like(start))
            for t in run.state:
                run.state[t]["step"].fill_(steps)
            run.engine.plan.table[:, col.TAG] = torch.arange(len(run.rows)) * 1000003 + 7
        grads = grads_like(start)
        rows.step(grads, seed=seed), exact.step(grads, seed=seed)
        for number, (row, twin) in enumerate(zip(rows.rows, exact.rows)):
            p, (A, B) = exact.pairs[row.pair], exact.read(number)[2].master
            for side, (got, twins, w) in enumerate(((row.A, twin.A, A), (row.B.mT, twin.B.mT, B.mT))):
                assert torch.equal(twins.cpu(), w.to(BF16)), p.name  # master weights: to nearest
                for i in range(5):
                    for k in range(0, w.shape[1], 3):
                        want = plain_round(float(w[i, k]), seed, number * 1000003 + 7, side, steps, i + 5 * k)
                        assert float(got[i, k]) == want


def test_stochastic_rounding_leaves_exact_values_and_the_range(fast_backend):
    rows = Rows([pair(8, 64, 64, BF16)], fast_backend, storage=WIDE)
    grads, before = grads_like(rows.pairs), rows.snapshot()[:2]
    rows.table[:, col.LR] = 0.0
    rows.step(grads, seed=5)
    assert same(rows.snapshot()[:2], before)
    rows.pairs[0].A[0] = torch.finfo(BF16).max
    rows.table[:, col.LR], rows.table[:, col.WEIGHT_DECAY] = 1e36, 0.0
    rows.step(grads, seed=5, **PLAIN_ADAMW)
    assert all(t.isfinite().all() for t in rows.tensors())


@pytest.mark.parametrize("stored", ["float32", *(pytest.param(s, marks=pytest.mark.thorough) for s in WIDER)])
def test_other_rows_round_to_nearest(every_backend, stored):
    dtype, storage = STORED[stored]
    start = [pair(dtype=dtype)]
    plain, seeded = (Rows(start, every_backend, storage=storage) for _ in range(2))
    grads = grads_like(start)
    plain.step(grads), seeded.step(grads, seed=1)
    assert same(plain, seeded)


def test_stochastic_rounding_with_the_scalar_refactoring(every_backend):
    """Powers of two: what has been rounded by chance stays on the grid, and BA is that of the update."""
    start = [LoRAPair(p.name, p.A, 64 * p.B) for p in layers(4, BF16)[:3]]
    scalar, plain = (Rows(start, every_backend, storage=WIDE) for _ in range(2))
    grads, options = grads_like(start), {"seed": 3, "warmup_steps": 1}
    scalar.step(grads, scalar=True, **options), plain.step(grads, **options)
    for ours, theirs in zip(scalar.pairs, plain.pairs):
        assert torch.equal(ours.B.float() @ ours.A.float(), theirs.B.float() @ theirs.A.float())
        assert not torch.equal(ours.A, theirs.A)


# ---- carried Grams: the bits are those of a step without


def check_carried(backend, start, storage=None, scaled=True, **options):
    """Also past rows that sit a step out, are skipped, or whose factors somebody writes; scaled: and refused steps."""
    carried, fresh = (Rows(start, backend, storage=storage) for _ in range(2))
    for number in range(7):
        grads, extra = grads_like(start), {}
        if scaled:
            extra["found_inf"] = torch.tensor(float(number == 4), device=device_of(backend))
        if number == 2:
            grads[0] = (None, None)
        if number == 5:
            grads[2][0][0, 0] = torch.nan
        if number in (2, 3):
            for rows in (carried, fresh):
                rows.pairs[0].A.mul_(-1.5), rows.pairs[1].B.mul_(2)
        results = [rows.step(grads, carry=rows is carried, **extra, **options) for rows in (carried, fresh)]
        assert same(*([result] for result in results)) and same(carried, fresh), number


@pytest.mark.parametrize("dtype", [FLOAT, torch.float64], ids=str)
def test_carried_grams_are_the_fresh_ones(every_backend, dtype):
    check_carried(every_backend, layers(4, dtype), scaled=dtype == FLOAT)


def test_carried_grams_in_float32(every_backend):
    check_carried(every_backend, layers(4, FLOAT)[:3], scaled=False, precision="float32")


@pytest.mark.parametrize("r", [1, 7, 33])
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "bfloat16, master"])
def test_carried_grams_of_what_is_stored(fast_backend, name, r):
    dtype, storage = STORED[name]
    check_carried(fast_backend, layers(r, dtype)[:6], storage)


@pytest.mark.parametrize("options", [{"interval": 3}, {"warmup_steps": 2}, {"interval": 2, "warmup_steps": 2}], ids=str)
def test_carried_grams_follow_the_schedule(fast_backend, options):
    check_carried(fast_backend, layers(6, torch.float64), **options)


def test_carried_grams_of_factors_rounded_by_chance(fast_backend):
    check_carried(fast_backend, layers(9, BF16)[:6], WIDE, seed=4)


@pytest.mark.parametrize("scale", [1e-70, 1e70, 1e-300, 1e300])
def test_carried_grams_at_the_ends_of_the_range(fast_backend, scale):
    start = [LoRAPair(p.name, scale * p.A, scale * p.B) for p in layers(5, torch.float64)[:3]]
    start[0].B[:, 0] = 0
    carried, fresh = (Rows(start, fast_backend, [Hypers(lr=1e-3 * scale)] * 2) for _ in range(2))
    for _ in range(3):
        grads = grads_like(start)
        carried.step(grads, carry=True), fresh.step(grads)
        assert same(carried, fresh)


def test_carried_grams_are_used(every_backend):
    """A write that autograd does not see goes unseen until `invalidate`."""
    start = layers(4, FLOAT)[:2]
    unseen, told, fresh = (Rows(start, every_backend) for _ in range(3))
    grads = [grads_like(start) for _ in range(3)]
    for rows in (unseen, told, fresh):
        for own in grads[:2]:
            rows.step(own, carry=rows is not fresh)
        rows.pairs[0].B.data.mul_(torch.linspace(0.5, 2, 4, device=device_of(every_backend)))
    told.engine.invalidate()
    for rows in (unseen, told, fresh):
        rows.step(grads[2], carry=rows is not fresh)
    assert same(told, fresh) and not same(unseen, fresh)
