"""The C++ step at the level of plan and table: schedule, storage of the state, rounding, and carried Grams."""

from __future__ import annotations

import pytest
import torch
from cpp_cases import BF16, DOUBLE, FLOAT, HALF, SIDES, Rows, check_step, grads_of, layouts, pair

from reflora import plan as col
from reflora.backends import cpp_backend
from reflora.contract import PLAIN, REFACTORED, SKIPPED, STORAGE_DTYPES, LoRAPair
from reflora.plan import A_SIDE, B_SIDE

pytestmark = pytest.mark.skipif(cpp_backend.unavailable(torch.device("cpu")) is not None, reason="no C++ core")


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("warmup, interval", [(0, 1), (2, 1), (0, 3), (3, 2)])
def test_every_row_follows_its_own_counter(scalar, warmup, interval):
    """Rows that are at different steps; one expert has missed two, and a pair sits out the fourth step."""
    moe = LoRAPair("moe", torch.randn(8, 40, dtype=DOUBLE), torch.randn(33, 8, dtype=DOUBLE), "experts(2)")
    rows = Rows([pair(), moe, pair(5)])
    rows.state[col.COUNT][0].fill_(4)
    rows.state[col.COUNT][1][1] = 2
    for k in range(7):
        grads = grads_of(rows.pairs)
        if k == 3:
            before = [t.clone() for t in rows.snapshot()]
            status = rows.step([(None, None)] * 3, scalar=scalar, warmup_steps=warmup, interval=interval)[:, 0]
            assert (status == PLAIN).all() and rows.unchanged(before)
        check_step(rows, grads, 1e-9, scalar=scalar, warmup_steps=warmup, interval=interval)


@pytest.mark.parametrize("scalar", [False, True])
def test_a_row_that_does_not_run_changes_nothing(scalar):
    rows = Rows([pair(), pair(), pair()])
    rows.step(grads_of(rows.pairs), scalar=scalar)
    before = rows.snapshot()
    found = rows.step(grads_of(rows.pairs), scalar=scalar, found_inf=torch.ones(()))
    assert (found[:, col.STATUS] == PLAIN).all() and rows.unchanged(before)
    grads = grads_of(rows.pairs)
    grads[0][1][3, 1] = torch.nan
    grads[2] = (None, grads[2][1])
    status = rows.step(grads, scalar=scalar, found_inf=torch.zeros(()))[:, col.STATUS]
    assert status.tolist() == [SKIPPED, REFACTORED, PLAIN]
    assert [float(c) for c in rows.state[col.COUNT]] == [1, 2, 1]
    number = len(rows.pairs) * 2
    for i, (t, old) in enumerate(zip(rows.tensors(), before)):
        owner = i // 2 if i < number else (i - number) % 3
        assert torch.equal(t, old) or owner == 1
    rows.pairs[0].B[0, 0] = torch.inf
    before = rows.snapshot()
    status = rows.step([grads[1], (None, None), (None, None)], scalar=scalar)[:, col.STATUS]
    assert status.tolist() == [SKIPPED, PLAIN, PLAIN] and rows.unchanged(before)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("fields", [{}, {"warmup_steps": 9}, {"scalar": True}, {"interval": 4}], ids=str)
def test_unchecked_gradients(dtype, fields):
    """The same bits for finite gradients; a bad one is saturated, and never reaches p, m or v as nan or inf."""
    start = [pair(dtype=dtype), pair(6, dtype=dtype)]
    checked, free = Rows(start), Rows(start)
    for k in range(4):
        grads = grads_of(start)
        if k == 3:
            for t in grads[0]:
                t[1, 2], t[0, 0], t[2, 1], t[3, 3] = torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max
        status = [rows.step(grads, check=rows is checked, **fields)[:, col.STATUS] for rows in (checked, free)]
        same = [torch.equal(x, y) for x, y in zip(checked.tensors(), free.tensors())]
        assert all(same) == (k < 3)
    assert status[0][0] == SKIPPED and status[1][0] != SKIPPED
    assert all(t.isfinite().all() for t in free.tensors())
    free.pairs[1].A[0, 0] = torch.nan
    assert free.step(grads_of(start), check=False, **fields)[1, col.STATUS] == SKIPPED


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"scalar": True}, {"scalar": True, "warmup_steps": 1}, {"interval": 2}],
    ids=str,
)
def test_state_in_float32(dtype, master, options):
    rows = Rows(list(layouts(5, dtype)), FLOAT, master, options.get("amsgrad", False))
    for _ in range(4):
        check_step(rows, grads_of(rows.pairs), 2e-5, torch.finfo(dtype).eps * 0.501, **options)
        if master:
            for side, factors in zip(SIDES, ([p.A for p in rows.pairs], [p.B for p in rows.pairs])):
                assert all(torch.equal(w.to(dtype), f) for w, f in zip(rows.state[side + col.W], factors))


def test_master_weights_hold_what_bfloat16_cannot():
    rows = Rows([pair(dtype=BF16)], FLOAT, True)
    rows.hypers[0, 0] = 1e-5
    before = rows.pairs[0].A.clone()
    grads = grads_of(rows.pairs)
    for _ in range(3):
        rows.step(grads)
    moved = rows.state[A_SIDE + col.W][0] - before.float()
    still = torch.eq(rows.pairs[0].A, before)
    assert still.float().mean() > 0.9 and ((moved.abs() - 3e-5).abs() < 1e-5).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_a_written_element_starts_its_master_weight_again(dtype):
    start = [pair(dtype=dtype)]
    rows, reset = Rows(start, FLOAT, True), Rows(start, FLOAT, True)
    grads = grads_of(start)
    for r in (rows, reset):
        r.step(grads)
    for r in (rows, reset):
        r.pairs[0].A[1, 5] = 2.5
        r.pairs[0].B[7, 2] *= -1
    reset.state[A_SIDE + col.W][0][1, 5] = 2.5
    reset.state[B_SIDE + col.W][0][7, 2] = float(reset.pairs[0].B[7, 2])
    for r in (rows, reset):
        r.step(grads)
    assert all(torch.equal(x, y) for x, y in zip(rows.tensors(), reset.tensors()))


# stochastic rounding, in Python's integers


def mix64(z):
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def fmix32(h):
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def rounded(values, seed, tag, side, steps):
    """float32 `[r, n]` to bfloat16, with the bits every backend draws."""
    key = mix64((mix64((mix64(seed) + 2 * tag + side) % 2**64) + steps) % 2**64)
    r = values.shape[0]
    bits = values.contiguous().view(torch.int32).tolist()
    out = torch.empty(values.shape, dtype=torch.int32)
    for i, line in enumerate(bits):
        for k, b in enumerate(line):
            h = fmix32((fmix32((i + r * k) % 2**32 ^ key % 2**32) + (key >> 32)) % 2**32)
            b = ((b % 2**32 + (h >> 16)) >> 16) << 16
            out[i, k] = b - 2**32 if b >= 2**31 else b
    return out.view(FLOAT).to(BF16)


def test_stochastic_rounding_draws_the_agreed_bits():
    """What would have been stored is read from a run with master weights, that starts from the same state."""
    start = [pair for r in (1, 5, 8) for pair in layouts(r, BF16)]
    rows = Rows(start, FLOAT)
    rows.plan.table[:, col.TAG] = torch.arange(len(rows.plan.rows)) * 1000003 + 7
    for steps, seed in enumerate((3, 2**64 - 1)):
        exact = Rows(rows.pairs, FLOAT, True)
        for column, tensors in rows.state.items():
            for mine, theirs in zip(exact.state[column], tensors):
                mine.copy_(theirs)
        grads = grads_of(start)
        rows.step(grads, seed=seed)
        exact.step(grads)
        for number in range(len(rows.plan.rows)):
            for side, (have, want) in enumerate(zip(rows.read(number)[0], exact.read(number)[0])):
                tag = int(rows.plan.table[number, col.TAG])
                assert torch.equal(have["p"].to(BF16), rounded(want["w"].float(), seed, tag, side, steps))
                assert torch.equal(have["v"], want["v"])


def test_stochastic_rounding_is_unbiased_and_leaves_exact_values():
    start = [pair(8, 64, 64, BF16)]
    grads = grads_of(start)
    master = Rows(start, FLOAT, True)
    master.step(grads)
    total = torch.zeros(8, 64)
    for seed in range(300):
        rows = Rows(start, FLOAT)
        rows.step(grads, seed=seed)
        total += rows.pairs[0].A.float()
    want = master.state[A_SIDE + col.W][0]
    ulp = 2.0 ** (want.abs().log2().floor() - 7)
    off = (total / 300 - want) / ulp  # its deviation is at most 0.5 / sqrt(300) = 0.029 in each element
    assert off.abs().max() < 0.15 and off.mean().abs() < 0.005
    rows.hypers[0, 0] = 0.0
    before = [t.clone() for t in (rows.pairs[0].A, rows.pairs[0].B)]
    rows.step(grads, seed=5)
    assert torch.equal(rows.pairs[0].A, before[0]) and torch.equal(rows.pairs[0].B, before[1])
    rows.pairs[0].A[0] = torch.finfo(BF16).max
    rows.hypers[0, 0], rows.hypers[0, 4] = 1e36, 0.0
    rows.step(grads, seed=5, warmup_steps=9)
    assert all(t.isfinite().all() for t in rows.tensors())


@pytest.mark.parametrize("dtype, master", [(FLOAT, False), (DOUBLE, False), (HALF, False), (BF16, True)])
def test_other_rows_round_to_nearest(dtype, master):
    start = [pair(dtype=dtype)]
    state = FLOAT if master else None
    runs = [Rows(start, state, master), Rows(start, state, master)]
    grads = grads_of(start)
    for rows, seed in zip(runs, (None, 1)):
        rows.step(grads, seed=seed)
    assert all(torch.equal(x, y) for x, y in zip(runs[0].tensors(), runs[1].tensors()))


# carried Grams: the bits of a step are those of the step without


def same(x, y):
    return all(torch.equal(s, t) for s, t in zip(x.tensors(), y.tensors()))


def both(carried, fresh, grads, kept=1, **fields):
    """The same step of both; whether results and everything they hold agree to the last bit."""
    ours, theirs = carried.step(grads, kept, carry=True, **fields), fresh.step(grads, **fields)
    return torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0)) and same(carried, fresh)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 2, 7, 8, 12, 33, 70])
def test_carried_grams_are_the_fresh_ones(r, dtype):
    start = list(layouts(r, dtype))
    carried, fresh = Rows(start), Rows(start)
    for k in range(4):
        assert both(carried, fresh, grads_of(start)), k
    entry = carried.plan.memory["cpp"]
    assert entry[0] == 1
    entry[8:] *= 1.5
    entry[8] *= 1.5
    assert not both(carried, fresh, grads_of(start))  # it is read


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("master, seed", [(True, None), (False, 4)])
def test_carried_grams_are_those_of_the_stored_values(dtype, master, seed):
    start = list(layouts(9, dtype))
    carried, fresh = Rows(start, FLOAT, master), Rows(start, FLOAT, master)
    for _ in range(4):
        assert both(carried, fresh, grads_of(start), seed=seed)


@pytest.mark.parametrize("warmup, interval", [(0, 3), (2, 1), (2, 2)])
def test_carried_grams_follow_the_schedule(warmup, interval):
    start = list(layouts(6, DOUBLE))
    carried, fresh = Rows(start, amsgrad=True), Rows(start, amsgrad=True)
    for k in range(7):
        assert both(carried, fresh, grads_of(start), warmup_steps=warmup, interval=interval)
        next_is_fresh = k + 1 >= warmup and (k + 1 - warmup) % interval == 0
        assert carried.plan.memory["cpp"][0] == float(next_is_fresh)


@pytest.mark.parametrize("scale", [1e-70, 1e70, 1e-300, 1e300])
def test_float64_at_the_ends_of_its_range(scale):
    """Where the power of two that a fresh Gram is scaled by could cost digits, nothing is kept."""
    start = [LoRAPair("far", scale * torch.randn(5, 80, dtype=DOUBLE), scale * torch.randn(66, 5, dtype=DOUBLE))]
    start[0].B[:, 0] = 0
    carried, fresh = Rows(start), Rows(start)
    for rows in (carried, fresh):
        rows.hypers[0, 0] = 1e-3 * scale
    for _ in range(3):
        assert both(carried, fresh, grads_of(start))
        assert carried.plan.memory["cpp"][0] == 0
    start = [LoRAPair("near", 1e-9 * torch.randn(5, 80, dtype=DOUBLE), 1e9 * torch.randn(66, 5, dtype=DOUBLE))]
    carried, fresh = Rows(start), Rows(start)
    for _ in range(3):
        assert both(carried, fresh, grads_of(start))
        assert carried.plan.memory["cpp"][0] == 1


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_carried_grams_of_rows_that_do_not_run(dtype):
    start = [pair(dtype=dtype), pair(6, dtype=dtype), pair(3, dtype=dtype)]
    carried, fresh = Rows(start), Rows(start)
    size = [8 + 2 * 8 * 8] * 3
    flags = [0, size[0], size[0] + size[1]]
    grads = grads_of(start)
    assert both(carried, fresh, grads)
    kept = carried.plan.memory["cpp"]
    before = kept.clone()
    bad = grads_of(start)
    bad[0][0][0, 0] = torch.inf
    bad[1] = (None, None)
    assert both(carried, fresh, bad)
    assert torch.equal(kept[: flags[2]], before[: flags[2]]) and not torch.equal(kept[flags[2] :], before[flags[2] :])
    assert carried.step(grads, carry=True, found_inf=torch.ones(1))[0, 0] == PLAIN
    assert both(carried, fresh, grads)
    # a factor is written while its row sits out: what was kept is forgotten, for good
    for rows in (carried, fresh):
        rows.pairs[1].A.mul_(-1.5)
    idle = [grads[0], (None, None), grads[2]]
    assert both(carried, fresh, idle, kept=[1, 0, 1]) and kept[flags].tolist() == [1, 0, 1]
    assert both(carried, fresh, grads)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_written_factors_are_read_again(dtype):
    start = [pair(dtype=dtype), pair(6, dtype=dtype)]
    carried, fresh, stale = Rows(start), Rows(start), Rows(start)
    grads = grads_of(start)
    for rows in (carried, fresh, stale):
        rows.step(grads, carry=rows is not fresh)
        rows.pairs[0].A.mul_(-1.5)
    stale.step(grads, carry=True)
    assert both(carried, fresh, grads, kept=[0, 1])
    assert not same(carried, stale)
    # a step that does not carry leaves nothing behind
    for rows in (carried, fresh):
        rows.step(grads)
    assert "cpp" not in carried.plan.memory and both(carried, fresh, grads)
    for rows in (carried, fresh):
        rows.step(grads, scalar=True, carry=rows is carried)
    assert "cpp" not in carried.plan.memory and both(carried, fresh, grads)
