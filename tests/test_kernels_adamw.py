"""The fused AdamW kernel against a plain float64 writing of the step, and against torch's AdamW where S = I."""

import pytest
import torch
from kernel_cases import DEVICE, DOUBLE, MARKS, Fused, Oracle, pair, randn

from reflora import plan as col
from reflora.backends import FRESH, IDENTITY, SAVED, torch_backend, triton_backend
from reflora.contract import DEGENERATE, PLAIN, REFACTORED, SKIPPED, LoRAPair
from reflora.plan import A_SIDE

pytestmark = MARKS


def pairs_of(dtype):
    return [
        pair(4, 3, 30, dtype, 50, 61),
        pair(9, 3, 10, dtype, 33, 20),
        LoRAPair("zero B", randn(3, 40, dtype=dtype), 0 * randn(30, 3, dtype=dtype)),
        LoRAPair("n < r", randn(6, 4, dtype=dtype), randn(25, 6, dtype=dtype)),
        LoRAPair("experts", randn(2 * 3, 21, dtype=dtype), randn(17, 3 * 2, dtype=dtype), "experts(2)"),
    ]


def steps(fused, schedule, draw, rtol, **fixed):
    oracle = Oracle(fused)
    for options in schedule:
        grads = draw()
        result = fused.step(grads, **options, **fixed)
        oracle.step(grads, **options, **fixed)
        oracle.check(rtol)
    return result


def gradients(pairs, scale=1.0):
    return lambda: [(scale * torch.randn_like(p.A), scale * torch.randn_like(p.B)) for p in pairs]


KEPT, AFTER = {"source": FRESH, "keep": True}, {"source": IDENTITY, "scalar_after": True}
SCHEDULES = {
    "fresh": [{"source": FRESH}] * 3,
    "warm-up": [{"source": IDENTITY}] * 2 + [{"source": FRESH}] * 2,
    "interval": [KEPT, {"source": SAVED}, KEPT, {"source": SAVED}],
    "back to I": [{"source": FRESH}, {"source": IDENTITY}],
    "scalar": [{**AFTER, "scalar_before": True}, AFTER, AFTER],
}


@pytest.mark.parametrize("dtype, rtol", [(DOUBLE, 1e-9), (torch.float32, 2e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule, dtype, rtol):
    pairs = pairs_of(dtype)[0 if dtype == DOUBLE else 2 :]
    fused = Fused(pairs, [dict(lr=1e-2), dict(lr=3e-2, weight_decay=0.1, beta1=0.8, beta2=0.99)])
    steps(fused, SCHEDULES[schedule], gradients(pairs), rtol)


def test_amsgrad_maximize_and_grad_scale():
    pairs = pairs_of(DOUBLE)[:2]
    fused = Fused(pairs, [dict(lr=1e-2, amsgrad=1.0), dict(lr=2e-2, maximize=1.0)])
    scale = torch.tensor(8.0, device=DEVICE)
    schedule = [{"source": IDENTITY}, {"source": FRESH}, {"source": FRESH}]
    steps(fused, schedule, gradients(pairs, 8.0), 1e-9, grad_scale=scale, found_inf=torch.tensor(0.0, device=DEVICE))


def test_scalar_amsgrad():
    pairs = pairs_of(DOUBLE)[:2]
    fused = Fused(pairs, [dict(lr=1e-2, amsgrad=1.0), dict(lr=2e-2, amsgrad=1.0)])
    steps(fused, SCHEDULES["scalar"], gradients(pairs), 1e-9)


@pytest.mark.parametrize("source, scalar", [(FRESH, False), (IDENTITY, False), (IDENTITY, True)])
def test_found_inf_changes_nothing(source, scalar):
    pairs = pairs_of(torch.float32)
    fused = Fused(pairs, [dict(lr=1e-2)] * 2)
    before = fused.snapshot()
    options = {"source": source, "scalar_before": scalar, "scalar_after": scalar}
    result = fused.step(gradients(pairs)(), found_inf=torch.tensor(1.0, device=DEVICE), **options)
    assert all(torch.equal(x, y) for x, y in zip(before, fused.snapshot()))
    assert (result[:, col.STATUS] == PLAIN).all()


@pytest.mark.parametrize("source, scalar", [(FRESH, False), (IDENTITY, False), (SAVED, False), (IDENTITY, True)])
def test_rows_that_are_not_finite_are_left_alone(source, scalar):
    pairs = pairs_of(torch.float32)
    pairs[1].A[3, 7] = torch.inf
    fused = Fused(pairs, [dict(lr=1e-2)] * 2)
    fused.step(gradients(pairs)(), source=FRESH, keep=True)
    grads = gradients(pairs)()
    grads[0][1][60, 2] = torch.nan
    before = fused.snapshot()
    options = {"source": source, "scalar_before": scalar, "scalar_after": scalar}
    result = fused.step(grads, **options)
    assert result[:2, col.STATUS].tolist() == [SKIPPED, SKIPPED] and (result[2:, col.STATUS] != SKIPPED).all()
    moved = [not torch.equal(x, y) for x, y in zip(before, fused.snapshot())]
    per_pair = len(moved) // len(pairs)
    assert not any(moved[: 2 * per_pair]) and all(moved[i * per_pair] for i in range(2, len(pairs)))


def test_statuses():
    pairs = pairs_of(torch.float32)
    fused = Fused(pairs, [dict(lr=1e-2)] * 2)
    result = fused.step(gradients(pairs)(), source=FRESH)
    assert result[:, col.STATUS].tolist() == [REFACTORED, REFACTORED, DEGENERATE, DEGENERATE, REFACTORED, REFACTORED]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_identity_is_torch_adamw(amsgrad):
    pairs = pairs_of(torch.float32)[2:]
    fused = Fused(pairs, [dict(lr=1e-2, amsgrad=float(amsgrad))] * 2)
    params = [torch.nn.Parameter(t.clone()) for p in pairs for t in (p.A, p.B)]
    torch_adamw = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01, amsgrad=amsgrad, fused=True)
    for _ in range(8):
        grads = gradients(pairs)()
        fused.step(grads, source=IDENTITY)
        for param, g in zip(params, [g for sides in grads for g in sides]):
            param.grad = g
        torch_adamw.step()
    for param, ours in zip(params, [t for p in pairs for t in (p.A, p.B)]):
        torch.testing.assert_close(ours, param.detach(), rtol=1e-5, atol=1e-6)


def test_extreme_scales_stay_finite():
    """S^-1 g far past the range of float32: saturated, and never NaN afterwards."""
    scales = [(1e15, 1e-15), (1e-15, 1e15), (1e30, 1e-30)]
    pairs = [pair(3, 3, 10, torch.float32, 30, 20, a, b) for a, b in scales]
    fused = Fused(pairs, [dict(lr=1e-3)] * 2)
    for source in (IDENTITY, FRESH, FRESH, IDENTITY, FRESH):
        fused.step(gradients(pairs, 1e12)(), source=source)
        assert all(t.isfinite().all() for t in fused.snapshot())


def test_plain_steps_of_the_scalar_variant():
    """Between its refactorings a layer takes AdamW's step, its moments back in units of S = I, and says so."""
    ends = []
    for backend in (triton_backend, torch_backend):
        torch.manual_seed(0)
        pairs = pairs_of(torch.float32)[:3]
        fused = Fused(pairs, [dict(lr=1e-2)] * 2, backend)
        fused.step(gradients(pairs)(), FRESH)
        assert any(float(phase) == 1 for phase in fused.state[col.PHASE])
        result = fused.step(gradients(pairs)(), SAVED, scalar_after=True, count=5)
        assert result[:, col.STATUS].tolist() == [PLAIN] * 3
        assert all(float(phase) == 0 for phase in fused.state[col.PHASE])
        ends.append(fused.snapshot())
    for ours, theirs in zip(*ends):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": 1.0}], ids=["", "amsgrad"])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
def test_moments_that_are_not_numbers_are_not_made_numbers(dtype, scalar, options):
    """The hardware's minimum and maximum drop a NaN: a step of 1e38 would follow."""
    ends = []
    for backend in (triton_backend, torch_backend):
        torch.manual_seed(0)
        pairs = pairs_of(dtype)[:2]
        fused = Fused(pairs, [dict(lr=1e-2, **options)] * 2, backend)
        fused.step(gradients(pairs)(), FRESH)
        for place, column in enumerate((col.M, col.V, col.X)):
            fused.state[A_SIDE + column][0][place, place] = torch.nan
        fused.step(gradients(pairs)(), FRESH, scalar_after=scalar, count=5)
        state = {name: fused.state[A_SIDE + name][0].double() for name in (col.M, col.V, col.X)}
        ends.append((pairs[0].A.double(), state))
    (ours, moments), (theirs, others) = ends
    for name, kept in moments.items():
        assert torch.equal(kept.isnan(), others[name].isnan()), name
        assert float(kept.nan_to_num(0.0).abs().max()) < 1e6
    torch.testing.assert_close(ours, theirs, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("scalar", [False, True])
def test_master_weights_of_moments_that_are_not_numbers(scalar):
    ends = []
    for backend in (triton_backend, torch_backend):
        torch.manual_seed(0)
        pairs = pairs_of(torch.bfloat16)[:1]
        fused = Fused(pairs, [dict(lr=1e-2)] * 2, backend, state_dtype=torch.float32, master=True)
        fused.state[A_SIDE + col.M][0][1, 2] = torch.nan
        fused.step(gradients(pairs)(), FRESH, scalar_after=scalar, count=5)
        ends.append(fused.state[A_SIDE + col.W][0])
    torch.testing.assert_close(*ends, rtol=1e-2, atol=1e-3)


def test_second_moments_below_the_normal_range_still_bound_the_step():
    """float32's quick root takes a subnormal v for 0: with a small eps the step would be m / eps."""
    pairs = [LoRAPair("tiny", randn(4, 30), randn(20, 4))]
    fused = Fused(pairs, [dict(lr=1e-3, eps=1e-30, weight_decay=0.0, beta1=0.9, beta2=0.999)] * 2)
    before = [pairs[0].A.clone(), pairs[0].B.clone()]
    # the first v is 1e-3 g^2, about 1e-41
    fused.step([tuple(1e-19 * torch.sign(randn(*t.shape)) for t in before)], IDENTITY)
    for now, then in zip((pairs[0].A, pairs[0].B), before):
        assert 0.5e-3 < float((now - then).abs().mean()) < 2e-3 and float((now - then).abs().max()) < 3e-3
