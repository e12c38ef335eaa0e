"""The routes of the AdamW kernels: the same bits by all of them, how many launches, how much memory."""

import dataclasses

import pytest
import torch
from kernel_cases import DEVICE, DOUBLE, MARKS
from rows import PLAIN_ADAMW, Rows, grads_like, same

from reflora import columns as col
from reflora.backends import torch_backend, triton_backend
from reflora.columns import PLAIN, SKIPPED
from reflora.kernels import options, routes
from reflora.kernels.step import launch
from reflora.pairs import LoRAPair
from reflora.plan import Plan

pytestmark = [*MARKS, pytest.mark.as_launched]


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


def run(dtype, schedule, route="split", carry=False, spoil=None, backend="triton", **options):
    """What each step of a schedule of options leaves, and the statuses that it reports."""
    rows, ends = Rows(pairs_of(dtype), backend), []
    torch.manual_seed(0)
    routes.forced = route
    try:
        for number, named in enumerate(schedule):
            grads = grads_like(rows.pairs)
            if spoil:
                spoil(number, rows, grads)
            result = rows.step(grads, carry=carry, **options, **named)
            ends.append((result[:, col.STATUS].tolist(), rows.snapshot()))
    finally:
        routes.forced = None
    return ends


def assert_same(ones, others):
    assert len(ones) == len(others)
    for (status, tensors), (other_status, other_tensors) in zip(ones, others):
        assert status == other_status and same(tensors, other_tensors)


SCHEDULES = {"fresh": [{}] * 2, "interval": [{"interval": 2}] * 3, "warm-up": [PLAIN_ADAMW, {}, PLAIN_ADAMW]}


ROUTED = [("fresh", torch.float32), ("interval", torch.float32)]
ROUTED += [pytest.param(name, DOUBLE, marks=pytest.mark.thorough) for name in ("interval", "warm-up")]


@pytest.mark.parametrize("schedule, dtype", ROUTED, ids=str)
def test_routes_agree_to_the_bit(schedule, dtype):
    assert_same(run(dtype, SCHEDULES[schedule]), run(dtype, SCHEDULES[schedule], "row"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_who_solves_changes_no_bit(schedule, request):
    by_the_last_to_arrive = run(torch.float32, SCHEDULES[schedule])
    request.getfixturevalue("apart")
    assert_same(by_the_last_to_arrive, run(torch.float32, SCHEDULES[schedule]))


@pytest.mark.parametrize("route", [pytest.param("split", marks=pytest.mark.thorough), "row"])
def test_carried_grams_are_fresh_ones(route):
    fresh = run(torch.float32, SCHEDULES["fresh"], route)
    assert_same(fresh, run(torch.float32, SCHEDULES["fresh"], route, carry=True))


def test_rows_that_sit_out_a_step_with_carried_grams(apart):
    def spoil(number, rows, grads):
        if number == 1:
            grads[0][0][1, 7] = torch.nan
            grads[1] = (None, None)

    ends = run(torch.float32, [{}] * 3, carry=True, spoil=spoil)
    assert ends[1][0][:2] == [SKIPPED, PLAIN]
    assert_same(run(torch.float32, [{}] * 3, spoil=spoil), ends)


def test_chunk_widths():
    for n_a, n_b, block in [(1, 1, 16), (768, 3072, 32), (4096, 11008, 32), (11008, 4096, 32), (10**6, 3, 16)]:
        width = launch.chunk_width(n_a, n_b, block)
        chunks = -(-n_a // width) - (-n_b // width)
        assert width % block == 0 and 2 <= chunks <= 8


@pytest.mark.parametrize("rank_class, layers, megabytes", [(32, 160, 8), (16, 72, 1)])
def test_memory_beyond_adamw(rank_class, layers, megabytes):
    """LLaMA-7B at r = 32 and DeBERTaV3-base at r = 8: buffers, tables and state, as an allocator rounds them."""
    sizes = [(4096, 11008)] * layers
    group = launch.RankClass(rank_class, 0, 0, torch.float32, torch.device(DEVICE), range(layers), sizes)
    buffers = [group.workspace, group.headers, group.arrivals, group.entries, group.items]
    table, results = 8 * layers * col.COLUMNS, 8 * layers * col.RESULTS
    state = 2 * 512 * layers  # reflora_phase and reflora_steps, one element each
    assert sum(b.nbytes for b in buffers) + table + results + state + 4096 <= megabytes * 2**20


def test_launches(monkeypatch, request):
    """Two a rank class by the split route and for RefLoRA-S, three where S has its own, one by the other route."""
    from reflora.kernels.step import adamw, adamw_scalar

    launches = []
    kernels = [(adamw, name) for name in ("gram_kernel", "settle_kernel", "update_kernel", "row_kernel")]
    for module, name in [*kernels, (adamw_scalar, "foresee_kernel"), (adamw_scalar, "turn_kernel")]:
        kernel = getattr(module, name)
        original = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *a, _n=name, _r=original, **k: launches.append(_n) or _r(*a, **k))
    run(torch.float32, [{}])
    assert launches == ["gram_kernel", "update_kernel"]
    launches.clear()
    request.getfixturevalue("apart")
    run(torch.float32, [{}])
    assert launches == ["gram_kernel", "settle_kernel", "update_kernel"]
    launches.clear()
    run(torch.float32, [{}], "row")
    assert launches == ["row_kernel"]
    launches.clear()
    run(torch.float32, [{"scalar": True}])
    assert launches == ["foresee_kernel", "turn_kernel"]


def test_a_class_without_a_kernel_on_a_device_goes_through_torch(monkeypatch):
    """As r > 64 does where a program cannot have the shared memory that it needs, whatever is called."""
    monkeypatch.setattr(options, "shared_memory", lambda device: routes.ROUTES[16].shared - 1)
    ends = []
    for backend in (triton_backend, torch_backend):
        torch.manual_seed(0)
        pairs = pairs_of(torch.float32)
        plan, grads = Plan(pairs), grads_like(pairs)
        plan.bind_grads(grads)
        rooms = [torch.zeros(p.experts, 2, p.rank, p.rank, device=DEVICE) for p in pairs]
        plan.bind_once(col.SAVED, rooms)
        results = [backend.solve(plan, "float64"), backend.precondition(plan, False, "float64")]
        results.append(backend.refactor(plan, False, "float64"))
        ends.append([t for p, g in zip(pairs, grads) for t in (p.A, p.B, *g)] + rooms + results)
    for x, y in zip(*ends):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert_same(*(run(torch.float32, [{}], backend=backend) for backend in ("triton", "torch")))


@pytest.mark.parametrize("shared, route", [(99 * 1024, routes.TORCH), (163 * 1024, routes.SPLIT), (None, routes.SPLIT)])
def test_the_route_of_the_largest_class_is_what_the_device_has_room_for(shared, route, monkeypatch):
    """99 KiB: compute capability 8.6, 8.9, 12.0 and 12.1, and whatever comes next. float32 takes less."""
    assert routes.route_of(128, shared) == route
    assert routes.route_of(128, shared, double=False) == routes.route_of(64, shared) == routes.SPLIT
    # what is measured is not what a device has no room for
    monkeypatch.setattr(routes, "forced", routes.ROW)
    assert routes.route_of(128, shared) == (routes.TORCH if route == routes.TORCH else routes.ROW)
