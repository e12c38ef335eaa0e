"""Both routes of the AdamW kernels, carried Grams, and what is stored beside a factor."""

import dataclasses

import pytest
import torch
from kernel_cases import DEVICE, DOUBLE, MARKS, Fused

from reflora import plan as col
from reflora.backends import FRESH, IDENTITY, SAVED, torch_backend, triton_backend
from reflora.contract import PLAIN, REFACTORED, SKIPPED, LoRAPair
from reflora.kernels import launch, routes
from reflora.plan import A_SIDE, B_SIDE, Plan

pytestmark = MARKS

HYPERS = [dict(lr=1e-2), dict(lr=3e-2, weight_decay=0.1, beta1=0.8, beta2=0.99)]


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    """Chunks of one block, so that small layers have several."""
    monkeypatch.setattr(launch, "LEAST_BLOCKS", 1)


@pytest.fixture
def apart(monkeypatch):
    """S is solved for in a launch of its own, as in the larger classes."""
    monkeypatch.setitem(routes.ROUTES, 16, dataclasses.replace(routes.ROUTES[16], gram_warps=1))


def pairs_of(dtype):
    """One chunk and eight, ragged ends, n < r, experts with strides of their own."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE).to(DEVICE, dtype)  # noqa: E731
    return [
        LoRAPair("even", draw(2, 83), draw(70, 2)),
        LoRAPair("lopsided", draw(3, 260), draw(20, 3)),
        LoRAPair("n < r", draw(4, 3), draw(25, 4)),
        LoRAPair("experts", draw(2 * 2, 41), draw(37, 2 * 2), "experts(2)"),
    ]


def gradients(pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda t: torch.randn(t.shape, generator=generator, dtype=DOUBLE).to(DEVICE, t.dtype)  # noqa: E731
    return [(draw(p.A), draw(p.B)) for p in pairs]


def everything(fused):
    return [*fused.snapshot(), *(t.clone() for t in fused.state[col.SAVED])]


def run(dtype, schedule, route="split", carry=False, spoil=None, fused=None, **options):
    fused = fused or Fused(pairs_of(dtype), HYPERS)
    routes.forced, ends = route, []
    try:
        for number, named in enumerate(schedule):
            fused.plan.table[:, col.KEPT] = 1 if number else 0
            grads = gradients(fused.pairs, number)
            if spoil:
                spoil(number, fused, grads)
            result = fused.step(grads, carry=carry, **{**options, **named})
            ends.append((result[:, col.STATUS].tolist(), everything(fused)))
    finally:
        routes.forced = None
    return ends


def assert_same(ones, others):
    assert len(ones) == len(others)
    for (status, tensors), (other_status, other_tensors) in zip(ones, others):
        assert status == other_status
        assert all(torch.equal(x, y) for x, y in zip(tensors, other_tensors))


SCHEDULES = {
    "fresh": [{"source": FRESH}] * 2,
    "interval": [{"source": FRESH, "keep": True}, {"source": SAVED}, {"source": FRESH, "keep": True}],
    "warm-up": [{"source": IDENTITY}, {"source": FRESH}, {"source": IDENTITY}],
}


@pytest.mark.parametrize(
    "schedule, dtype",
    [("fresh", torch.float32), ("fresh", DOUBLE), ("interval", torch.float32), ("warm-up", torch.float32)],
    ids=str,
)
def test_routes_agree_to_the_bit(schedule, dtype):
    assert_same(run(dtype, SCHEDULES[schedule]), run(dtype, SCHEDULES[schedule], "row"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_who_solves_changes_no_bit(schedule, request):
    by_the_last_to_arrive = run(torch.float32, SCHEDULES[schedule])
    request.getfixturevalue("apart")
    assert_same(by_the_last_to_arrive, run(torch.float32, SCHEDULES[schedule]))


@pytest.mark.parametrize(
    "dtype, precision, route",
    [
        (torch.float32, "float64", "split"),
        (torch.float32, "float64", "row"),
        (torch.float32, "float32", "split"),
        (DOUBLE, "float64", "split"),
    ],
    ids=str,
)
def test_carried_grams_are_fresh_ones(dtype, precision, route):
    schedule = [{"source": FRESH}] * 2
    fresh = run(dtype, schedule, route, precision=precision)
    assert_same(fresh, run(dtype, schedule, route, carry=True, precision=precision))


def test_carried_grams_are_used():
    """Without a new version, a write behind the optimizer's back goes unseen; KEPT = 0 sees it."""

    def write(kept):
        def spoil(number, fused, grads):
            if number == 1:
                fused.pairs[0].B.mul_(torch.linspace(0.5, 2, 2, device=DEVICE))
                fused.plan.table[:, col.KEPT] = kept

        return spoil

    seen, unseen, without = (
        run(torch.float32, [{"source": FRESH}] * 2, carry=carry, spoil=write(kept))
        for carry, kept in ((True, 0), (True, 1), (False, 0))
    )
    assert_same(seen, without)
    assert not torch.equal(unseen[-1][1][0], without[-1][1][0])


@pytest.mark.parametrize("solves", ["last to arrive", "apart"])
def test_rows_that_sit_out_a_step_with_carried_grams(solves, request):
    if solves == "apart":
        request.getfixturevalue("apart")

    def spoil(number, fused, grads):
        if number == 1:
            grads[0][0][1, 7] = torch.nan
            grads[1] = (None, None)

    schedule = [{"source": FRESH}] * 3
    ends = run(torch.float32, schedule, carry=True, spoil=spoil)
    assert ends[1][0][:2] == [SKIPPED, PLAIN]
    assert_same(run(torch.float32, schedule, spoil=spoil), ends)


@pytest.mark.parametrize("carry", [False, True])
def test_unchecked_gradients_cannot_spoil_a_factor(carry):
    def spoil(number, fused, grads):
        grads[0][0][1, 7], grads[1][1][3, 1] = torch.nan, torch.inf

    ends = run(torch.float32, [{"source": FRESH}] * 2, carry=carry, spoil=spoil, check=False)
    assert SKIPPED not in ends[-1][0]
    assert all(t.isfinite().all() for t in ends[-1][1])


def test_gradients_past_the_range_do_not_freeze_an_element():
    """They saturate where their squares still fit, so that v forgets them again."""
    pairs = pairs_of(torch.float32)[:2]
    fused = Fused(pairs, HYPERS)
    grads = gradients(pairs, 0)
    grads[0][0][1, 7] = 1e30
    fused.step(grads, FRESH, check=False)
    assert all(float(v.max()) < 1e35 for side in (A_SIDE, B_SIDE) for v in fused.state[side + col.V])


def test_rows_count_their_steps():
    pairs = pairs_of(torch.float32)
    fused = Fused(pairs, HYPERS)
    grads = gradients(pairs, 0)
    grads[0] = (None, None)
    grads[1][0][0, 0] = torch.nan
    fused.step(grads, FRESH, count=3)
    assert fused.counts() == [3, 3, 4, 4, 4]
    fused.step(gradients(pairs, 1), FRESH, count=3, found_inf=torch.ones((), device=DEVICE))
    assert fused.counts() == [3] * 5
    fused.step(gradients(pairs, 1), IDENTITY, scalar_before=True, scalar_after=True, count=0)
    assert fused.counts() == [1] * 5


@pytest.mark.parametrize("lr_dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("scalar", [False, True])
def test_the_learning_rate_may_be_on_the_device(lr_dtype, scalar):
    ends = []
    for on_device in (False, True):
        fused = Fused(pairs_of(torch.float32)[:2], HYPERS)
        lrs = torch.tensor([0.5, 0.25], dtype=lr_dtype, device=DEVICE)
        for row, lr in zip(fused.hypers, lrs):
            row[col.LR] = -1.0 if on_device else float(lr)
            if on_device:
                row[col.LR_AT], row[col.LR_DTYPE] = lr.data_ptr(), float(lr_dtype == DOUBLE)
        fused.step(gradients(fused.pairs, 0), FRESH, scalar_after=scalar, scalar_before=scalar)
        ends.append(everything(fused))
    assert all(torch.equal(x, y) for x, y in zip(*ends))


STORED = {
    "float32 state": dict(state_dtype=torch.float32),
    "master weights": dict(state_dtype=torch.float32, master=True),
    "random rounding": dict(state_dtype=torch.float32, seed=12345678901),
    "all bfloat16": {},
}


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_what_is_stored_beside_bfloat16_factors(stored, scalar):
    """As the torch backend has it, but for a last bit here and there."""
    options = dict(STORED[stored])
    step = {name: options.pop(name) for name in ("seed",) if name in options}
    ends = []
    for backend in (None, torch_backend):
        pairs = pairs_of(torch.bfloat16)[:2]
        fused = Fused(pairs, HYPERS, **({"backend": backend} if backend else {}), **options)
        for number in range(2):
            first = scalar and number == 0
            fused.step(gradients(pairs, number), FRESH, scalar_after=scalar, scalar_before=first, **step)
            if number == 0 and "master" in options:
                pairs[0].A[1] *= 0.5  # seen through the master weights
        ends.append(everything(fused))
    for ours, theirs in zip(*ends):
        close = (ours - theirs).abs() <= 2.0**-7 * theirs.abs() + 1e-6
        assert close.all() and (ours == theirs).float().mean() > (0.5 if ours.dtype == torch.float32 else 0.95)


def test_chunk_widths():
    for n_a, n_b, block in [(1, 1, 16), (768, 3072, 32), (4096, 11008, 32), (11008, 4096, 32), (10**6, 3, 16)]:
        width = launch.chunk_width(n_a, n_b, block)
        chunks = -(-n_a // width) - (-n_b // width)
        assert width % block == 0 and 2 <= chunks <= 8


@pytest.mark.parametrize("rank_class, layers, megabytes", [(32, 160, 8), (16, 72, 1)])
def test_memory_beyond_adamw(rank_class, layers, megabytes):
    """LLaMA-7B at r = 32 and DeBERTaV3-base at r = 8: buffers, tables and state, as an allocator rounds them."""
    sizes = [(4096, 11008)] * layers
    group = launch.Group(rank_class, 0, 0, torch.float32, torch.device(DEVICE), range(layers), sizes)
    buffers = [group.workspace, group.headers, group.arrivals, group.entries, group.items]
    table, results = 8 * layers * col.COLUMNS, 8 * layers * col.RESULTS
    state = 2 * 512 * layers  # reflora_phase and reflora_steps, one element each
    assert sum(b.nbytes for b in buffers) + table + results + state + 4096 <= megabytes * 2**20


def test_launches(monkeypatch, request):
    """Two a rank class by the split route and for RefLoRA-S, three where S has its own, one by the other route."""
    from reflora.kernels import adamw, adamw_scalar

    launches = []
    kernels = [(adamw, name) for name in ("gram_kernel", "settle_kernel", "update_kernel", "row_kernel")]
    for module, name in [*kernels, (adamw_scalar, "foresee_kernel"), (adamw_scalar, "turn_kernel")]:
        kernel = getattr(module, name)
        original = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *a, _n=name, _r=original, **k: launches.append(_n) or _r(*a, **k))
    run(torch.float32, [{"source": FRESH}])
    assert launches == ["gram_kernel", "update_kernel"]
    launches.clear()
    request.getfixturevalue("apart")
    run(torch.float32, [{"source": FRESH}])
    assert launches == ["gram_kernel", "settle_kernel", "update_kernel"]
    launches.clear()
    run(torch.float32, [{"source": FRESH}], "row")
    assert launches == ["row_kernel"]
    launches.clear()
    run(torch.float32, [{"source": IDENTITY, "scalar_after": True}])
    assert launches == ["foresee_kernel", "turn_kernel"]


def direction(pair):
    """B A over what would overflow in it."""
    return (pair.B / pair.B.abs().max()) @ (pair.A / pair.A.abs().max())


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e140, 1e-150), (1e-100, 1e170)], ids=str)
def test_norms_over_chunks_of_the_scalar_variant(scales):
    """Balanced after every step, far outside the range that squares have, the first step and its start included."""
    pairs = [LoRAPair("", scales[0] * p.A, scales[1] * p.B) for p in pairs_of(DOUBLE)[:3]]
    fused = Fused(pairs, [dict(lr=1e-2 * scale, eps=0.0, weight_decay=0.0) for scale in scales])
    for number in range(3):
        grads = gradients(pairs, number)
        before = [direction(p) for p in pairs]
        result = fused.step(grads, IDENTITY, scalar_before=number == 0, scalar_after=True)
        assert result[:, col.STATUS].tolist() == [REFACTORED] * 3
        for p, product in zip(pairs, before):
            norm_a, norm_b = (float((f / f.abs().max()).norm() * f.abs().max()) for f in (p.A, p.B))
            assert norm_a == pytest.approx(norm_b, rel=1e-12)
            assert p.A.isfinite().all() and p.B.isfinite().all() and not torch.equal(direction(p), product)


def test_a_class_without_a_kernel_on_a_device_goes_through_torch(monkeypatch):
    """As r > 64 does where a program cannot have the shared memory that it needs, whatever is called."""
    monkeypatch.setattr(launch, "shared_memory", lambda device: routes.ROUTES[16].shared - 1)
    ends = []
    for backend in (triton_backend, torch_backend):
        torch.manual_seed(0)
        pairs = pairs_of(torch.float32)
        plan, grads = Plan(pairs), gradients(pairs, 0)
        plan.bind_grads(grads)
        rooms = [torch.zeros(p.experts, 2, p.rank, p.rank, device=DEVICE) for p in pairs]
        plan.bind_once(col.SAVED, rooms)
        results = [backend.solve(plan, "float64"), backend.precondition(plan, False, "float64")]
        results.append(backend.refactor(plan, False, "float64"))
        ends.append([t for p, g in zip(pairs, grads) for t in (p.A, p.B, *g)] + rooms + results)
    for x, y in zip(*ends):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    ends = []
    for backend in (triton_backend, torch_backend):
        fused = Fused(pairs_of(torch.float32), HYPERS, backend)
        result = fused.step(gradients(fused.pairs, 0), FRESH)
        ends.append([*everything(fused), result[:, : col.NORM_B + 1]])
    assert all(torch.equal(x, y) for x, y in zip(*ends))


@pytest.mark.parametrize("shared, route", [(99 * 1024, routes.TORCH), (163 * 1024, routes.SPLIT), (None, routes.SPLIT)])
def test_the_route_of_the_largest_class_is_what_the_device_has_room_for(shared, route, monkeypatch):
    """99 KiB: compute capability 8.6, 8.9, 12.0 and 12.1, and whatever comes next. float32 takes less."""
    assert routes.route_of(128, shared) == route
    assert routes.route_of(128, shared, double=False) == routes.route_of(64, shared) == routes.SPLIT
    # what is measured is not what a device has no room for
    monkeypatch.setattr(routes, "forced", routes.ROW)
    assert routes.route_of(128, shared) == (routes.TORCH if route == routes.TORCH else routes.ROW)
