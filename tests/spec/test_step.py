"""RefLoRAAdamW's step on every backend, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from conftest import device_of
from rows import BF16, DOUBLE, FLOAT, OTHERS, PLAIN_ADAMW, STORED, Rows, check_step, grads_like, layers, pair, same
from torch.utils._python_dispatch import TorchDispatchMode

from reflora import columns as col
from reflora.backends import AdamWStep, load
from reflora.columns import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from reflora.constants import START_STEPS
from reflora.optim.state import MASTER, PHASE, SAVED, STEPS, Storage
from reflora.pairs import LoRAPair
from reflora.reference import Hypers

MODES = {
    "exact": {},
    "start": {"start": START_STEPS},
    "warm-up": {"warmup_steps": 2},
    "interval": {"interval": 3},
    "interval and warm-up": {"interval": 2, "warmup_steps": 3},
    "scalar": {"scalar": True},
    "scalar, start": {"scalar": True, "start": START_STEPS},
    "scalar, interval and warm-up": {"scalar": True, "interval": 2, "warmup_steps": 1},
    "scalar, start and interval": {"scalar": True, "start": START_STEPS, "interval": 2},
}
SCALAR = pytest.mark.parametrize("scalar", [False, True], ids=["full", "scalar"])


def cases(firsts, seconds, thorough):
    """Every two, and whether they are among those that only `make emulate` has compiled, by `thorough`."""
    marks = pytest.mark.thorough
    return [pytest.param(a, b, marks=marks if thorough(a, b) else ()) for a in firsts for b in seconds]


# a schedule and RefLoRA-S compile kernels of their own for each type
STORED_MODES = cases(
    ["exact", "start", "interval and warm-up", "scalar", "scalar, start"], STORED,
    lambda name, stored: name not in ("exact", "start") and stored not in ("float32", "bfloat16"),
)  # fmt: skip
KINDS = ["full", "scalar"]
RANKS = cases(KINDS, [1, 7, 16, 20, 48, 100], lambda kind, r: r == 48 or (kind, r) == ("scalar", 20))
NUMBERS = cases(KINDS, ["float32", "float64", "bfloat16, master"], lambda kind, stored: stored != "float32")


def by_name(found):
    return pytest.mark.parametrize("name", found)


def staggered(rows):
    """Rows at steps of their own, one with moments of an earlier S, in units of that."""
    for number, p in enumerate(rows.pairs):
        own = rows.state[p.A]
        own[STEPS].copy_(torch.arange(p.experts) * 2 + number % 4)
        if p.name == "more rows":
            own[PHASE].fill_(1)
            for t in (p.A, p.B):
                rows.state[t]["exp_avg"].copy_(torch.randn(t.shape))
                rows.state[t]["exp_avg_sq"].copy_(torch.rand(t.shape) + 0.5)
                rows.state[t]["step"].fill_(3)


@pytest.mark.as_launched
@by_name(MODES)
def test_every_row_follows_its_own_counter(every_backend, name):
    rows = Rows(layers(4, FLOAT), every_backend)
    rows.bind(grads_like(rows.pairs), MODES[name].get("interval", 1))
    staggered(rows)
    for _ in range(4):
        check_step(rows, grads_like(rows.pairs), **MODES[name])


@pytest.mark.as_launched
@pytest.mark.parametrize("name, stored", STORED_MODES)
def test_every_storage_type(every_backend, name, stored):
    dtype, storage = STORED[stored]
    rows = Rows(layers(5, dtype), every_backend, storage=storage)
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs), **MODES[name])
        if storage.master and not MODES[name].get("scalar"):
            assert all(torch.equal(rows.state[t][MASTER].to(dtype), t) for t in rows.state)


@pytest.mark.as_launched
@pytest.mark.parametrize("kind, r", RANKS)
def test_every_rank_class(every_backend, kind, r):
    rows = Rows([pair(r, 2 * r + 36, 3 * r + 21, FLOAT), pair(r, 150, 133, FLOAT)], every_backend)
    for _ in range(2):
        assert (check_step(rows, grads_like(rows.pairs), scalar=kind == "scalar")[:, col.STATUS] == REFACTORED).all()


@by_name(["exact", "start", pytest.param("interval and warm-up", marks=pytest.mark.thorough), "scalar, start"])
def test_amsgrad_maximize_and_a_scaled_gradient(every_backend, name):
    rows = Rows(layers(4, DOUBLE)[:6], every_backend, OTHERS)
    scale = {n: torch.tensor(v, device=device_of(every_backend)) for n, v in (("grad_scale", 8.0), ("found_inf", 0.0))}
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs, 8.0), **scale, **MODES[name])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_where_S_is_I_it_is_torchs_adamw(every_backend, amsgrad):
    hypers = Hypers(lr=1e-2, amsgrad=amsgrad)
    # torch's fused step reads the gradients of a column-major parameter row by row
    start = [p for p in layers(4, FLOAT) if p.name != "columns"]
    rows = Rows(start, every_backend, (hypers, hypers))
    params = [torch.nn.Parameter(t.clone()) for t in rows.state]
    adamw = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01, amsgrad=amsgrad, fused=True)
    for _ in range(8):
        grads = grads_like(rows.pairs)
        rows.step(grads, **PLAIN_ADAMW)
        for param, grad in zip(params, (g for sides in grads for g in sides)):
            param.grad = grad.to(param.device)
        adamw.step()
    for param, ours in zip(params, rows.state):
        torch.testing.assert_close(ours, param.detach(), rtol=1e-5, atol=1e-6)


# ---- rows that take no step


@pytest.mark.as_launched
@SCALAR
@pytest.mark.parametrize("bad", ["gradient", "factor", "found_inf", "no gradients"])
def test_a_row_that_does_not_run_changes_nothing(every_backend, scalar, bad):
    start = layers(4, FLOAT)[:3]
    if bad == "factor":
        start[1].A[2, 3] = torch.inf
    rows, options = Rows(start, every_backend), {"scalar": scalar, "interval": 2}
    if bad == "found_inf":
        options["found_inf"] = torch.zeros((), device=device_of(every_backend))
    for _ in range(2):  # the next S is due
        rows.step(grads_like(start), **options)
    before, grads = [rows.snapshot(number) for number in range(3)], grads_like(start)
    if bad == "gradient":
        grads[1][1][2, 3] = torch.inf
    if bad == "no gradients":
        grads[1] = (None, None)
    if bad == "found_inf":
        options["found_inf"].fill_(1.0)
    result = rows.step(grads, **options)
    changed = [not same(rows.tensors(number), old) for number, old in enumerate(before)]
    assert changed == [bad != "found_inf", False, bad != "found_inf"]
    assert result[1, col.STATUS] == (SKIPPED if bad in ("gradient", "factor") else PLAIN)


UNCHECKED = {}, {"scalar": True}, {"warmup_steps": 9}, {"interval": 3}, {"start": START_STEPS}


@pytest.mark.parametrize("options", UNCHECKED, ids=str)
def test_unchecked_gradients_that_are_nan_count_as_zero(every_backend, options):
    start = layers(4, FLOAT)[:3]
    spoilt, clean = Rows(start, every_backend), Rows(start, every_backend)
    for number in range(4):
        grads = grads_like(start)
        zeroed = [tuple(g.clone() for g in sides) for sides in grads]
        if number in (1, 2):
            for given, value in ((grads, torch.nan), (zeroed, 0.0)):
                given[0][0][:, 3], given[0][1][2], given[2][0][:, 1:] = value, value, value
        spoilt.step(grads, check=False, **options)
        clean.step(zeroed, check=number == 0, **options)  # of finite ones a check changes nothing
        assert same(spoilt, clean)


@pytest.mark.parametrize(
    "options, dtype",
    [*((options, FLOAT) for options in UNCHECKED), (UNCHECKED[0], BF16),
     pytest.param(UNCHECKED[1], torch.float16, marks=pytest.mark.thorough)], ids=str,
)  # fmt: skip
def test_unchecked_gradients_past_the_range_leave_factors_and_moments_finite(every_backend, options, dtype):
    start = layers(4, dtype)[:3]
    rows = Rows(start, every_backend)
    for number in range(4):
        grads = grads_like(start)
        if number in (1, 2):
            g = grads[0][0]
            g[1, 3], g[1, 2], g[0, 0], g[2, 1] = torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max
            grads[0][1][2, 0], grads[0][1][4, 1] = torch.nan, -torch.inf
        assert (rows.step(grads, check=False, **options)[:, col.STATUS] != SKIPPED).all()
        assert all(t.isfinite().all() for t in rows.tensors())
        # squares fit, so that v forgets them again
        assert dtype == torch.float16 or all(float(v.max()) < 1e37 for v in rows.own("A", "exp_avg_sq"))
    with torch.no_grad():
        rows.pairs[1].A[0, 0] = torch.nan
    assert rows.step(grads_like(start), check=False, **options)[1, col.STATUS] == SKIPPED


@pytest.mark.parametrize("scales", [(1e15, 1e-15), (1e-15, 1e15), (1e30, 1e-30)], ids=str)
def test_extreme_scales_stay_finite(every_backend, scales):
    """S^-1 g far past the range of float32: saturated, and never NaN afterwards."""
    p = pair(3, 30, 20, FLOAT)
    rows = Rows([LoRAPair("far", scales[0] * p.A, scales[1] * p.B)], every_backend)
    for options in (PLAIN_ADAMW, {}, {}, PLAIN_ADAMW, {}):
        rows.step(grads_like([p], 1e12), **options)
        assert all(t.isfinite().all() for t in rows.tensors())


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e140, 1e-150), (1e-100, 1e170)], ids=str)
def test_norms_of_the_scalar_variant_far_outside_the_range_of_squares(every_backend, scales):
    start = [LoRAPair(p.name, scales[0] * p.A, scales[1] * p.B) for p in layers(3, DOUBLE)[:2]]
    hypers = Hypers(lr=1e-7, eps=0.0, weight_decay=0.0)
    rows = Rows(start, every_backend, (hypers, hypers))
    for _ in range(3):
        assert (rows.step(grads_like(start), scalar=True)[:, col.STATUS] == REFACTORED).all()
        for p in rows.pairs:
            norm_A, norm_B = (float((f / f.abs().max()).norm() * f.abs().max()) for f in (p.A, p.B))
            assert norm_A == pytest.approx(norm_B, rel=1e-12)


def test_second_moments_below_the_normal_range_still_bound_the_step(every_backend):
    """A quick root takes a subnormal v for 0: with a small eps the step would be m / eps."""
    hypers = Hypers(lr=1e-3, eps=1e-30, weight_decay=0.0)
    start = [LoRAPair("tiny", torch.randn(4, 30), torch.randn(20, 4))]
    rows = Rows(start, every_backend, (hypers, hypers))
    before = rows.snapshot()[:2]
    # the first v is 1e-3 g^2, about 1e-41
    rows.step([tuple(1e-19 * torch.sign(torch.randn_like(t)) for t in (start[0].A, start[0].B))], **PLAIN_ADAMW)
    for now, then in zip(rows.tensors(), before):
        assert 0.5e-3 < float((now - then).abs().mean()) < 2e-3 and float((now - then).abs().max()) < 3e-3


@pytest.mark.parametrize("kind, stored", NUMBERS)
def test_moments_that_are_not_numbers_are_not_made_numbers(every_backend, kind, stored):
    """A minimum of the hardware drops a NaN: a step of 1e38 would follow."""
    hypers, (dtype, storage) = Hypers(lr=1e-2, amsgrad=True), STORED[stored]
    start, names = [pair(4, dtype=dtype), pair(5, dtype=dtype)], ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    rows, plain = (Rows(start, name, (hypers, hypers), storage) for name in (every_backend, "torch"))
    for number in range(2):
        grads = grads_like(start)
        for run in (rows, plain):
            run.step(grads, scalar=kind == "scalar" and number == 1)
            for place, name in enumerate(names if number == 0 else ()):
                run.own("A", name)[0][place, place] = torch.nan
    for ours, theirs in zip(rows.tensors(), plain.tensors()):
        assert float(ours.abs().nan_to_num(0.0).max()) < 1e6
        assert torch.equal(ours.isnan().cpu(), theirs.isnan())
        torch.testing.assert_close(
            ours.cpu().double(), theirs.double(), rtol=0.05 if dtype == BF16 else 1e-4, atol=1e-4, equal_nan=True
        )


def test_a_degenerate_row_takes_a_scaled_step_or_a_plain_one(every_backend):
    start = [p for p in layers(4, FLOAT) if p.name in ("zero B", "rank 1")]
    rows = Rows(start, every_backend)
    assert rows.step(grads_like(start), interval=2)[:, col.STATUS].tolist() == [DEGENERATE, DEGENERATE]
    assert [float(t) for t in rows.own("A", PHASE)] == [0, 1]
    eye = torch.eye(4)
    assert torch.equal(rows.own("A", SAVED)[0][0].cpu(), torch.stack([eye, eye]))


def test_a_row_without_a_saved_S_is_solved_when_it_is_seen(every_backend):
    rows = Rows([pair(dtype=FLOAT)], every_backend)
    rows.bind(grads_like(rows.pairs), 4)
    rows.own("A", STEPS)[0].fill_(1)
    result = rows.step(grads_like(rows.pairs), interval=4)
    saved = rows.own("A", SAVED)[0].clone()
    assert result[0, col.BALANCE].isfinite() and saved.any()
    result = rows.step(grads_like(rows.pairs), interval=4)
    assert result[0, col.STATUS] == REFACTORED and result[0, col.BALANCE].isnan()
    assert torch.equal(rows.own("A", SAVED)[0], saved)


def test_a_saved_S_of_float32_beside_one_of_float64(every_backend):
    rows = Rows([*layers(4, FLOAT)[:2], *layers(4, DOUBLE)[:2]], every_backend)
    for _ in range(3):
        check_step(rows, grads_like(rows.pairs), interval=3)


@pytest.mark.parametrize("lr_dtype", [FLOAT, DOUBLE], ids=str)
@SCALAR
def test_the_learning_rate_may_lie_on_the_device(every_backend, lr_dtype, scalar):
    start = layers(4, FLOAT)[:2]
    plain, tensors = Rows(start, every_backend), Rows(start, every_backend)
    lrs = tuple(torch.tensor(lr, dtype=lr_dtype, device=device_of(every_backend)) for lr in (0.5, 0.25))
    for row, other, lr in zip(plain.table, tensors.table, lrs):
        row[col.LR], other[col.LR] = float(lr), torch.nan if every_backend == "torch" else -1.0
        if every_backend != "cpp":  # of a CPU's tensors the host reads the value
            other[col.LR_AT], other[col.LR_DTYPE] = lr.data_ptr(), float(lr_dtype == DOUBLE)
        else:
            other[col.LR] = float(lr)
    for _ in range(2):
        grads = grads_like(start)
        plain.step(grads, scalar=scalar), tensors.step(grads, scalar=scalar, lrs=lrs)
    assert same(plain, tensors)


# ---- nothing waits for a device


class NothingIsRead(TorchDispatchMode):
    """Fails where the host would wait for a device, or the device for numbers of the host."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in self.REFUSED, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"warmup_steps": 2, "interval": 2}, {"scalar": True}, {"seed": 5}, {"carry": True}], ids=str
)
def test_the_host_reads_nothing_from_the_device(options):
    """By the backend of torch operations, which serves any device; test_gpu.py has the others."""
    start = layers(4, BF16)
    rows = Rows(start, "torch", OTHERS, Storage(moments=True))
    scalars = {"found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(2.0), "lrs": (torch.tensor(1e-3), None)}
    first, second = grads_like(start), grads_like(start)
    rows.step(first, **options, **scalars)
    rows.bind(second, options.get("interval", 1))
    step = AdamWStep(rows.table, **options, **scalars)
    with NothingIsRead():
        load("torch").adamw(rows.engine.plan, step)
