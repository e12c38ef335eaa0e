"""The AdamW step of the torch backend, on a plan of its own, against a plain float64 writing of it."""

import pytest
import torch
from test_rounding import plain_round
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import AMSGRAD, OPTIONS, SIDES, Bound, PlainRow, draw, same, some_pairs

from reflora import plan as col
from reflora.backends import AdamWStep, torch_adamw, torch_backend
from reflora.contract import DEGENERATE, PLAIN, REFACTORED, SKIPPED, LoRAPair
from reflora.plan import A_SIDE, B_SIDE


@pytest.mark.parametrize("scalar", [False, True], ids=["full", "scalar"])
@pytest.mark.parametrize("warmup_steps, interval", [(0, 1), (3, 1), (0, 3), (2, 2)])
@pytest.mark.parametrize("options", [OPTIONS, AMSGRAD], ids=["plain", "amsgrad"])
def test_every_row_follows_its_own_counter(scalar, warmup_steps, interval, options):
    pairs = some_pairs()
    bound = Bound(pairs, options)
    rows = [PlainRow(bound, row) for row in bound.plan.rows]
    for start, row in zip((0, 2, 5, 0, 1), rows):
        row.count = start
        bound.state[col.COUNT][row.row.pair][row.row.expert] = start
    # moments of an earlier S, in units of that
    rows[1].phase = 1
    bound.state[col.PHASE][1].fill_(1)
    for name, _ in SIDES:
        for column, moments in ((col.M, rows[1].m), (col.V, rows[1].v)):
            moments[name] = torch.rand_like(moments[name])
            bound.side(column, name, bound.plan.rows[1]).copy_(moments[name])
    schedule = dict(warmup_steps=warmup_steps, interval=interval, scalar=scalar)
    for grads in draw(pairs, 6):
        result = bound.step(grads, **schedule)
        for number, row in enumerate(rows):
            row.step(grads[row.row.pair], **schedule)
            row.check(1e-10)
            assert result[number, col.STATUS] == (REFACTORED if row.acted else PLAIN)
            assert bound.state[col.COUNT][row.row.pair][row.row.expert] == row.count
            assert bound.state[col.PHASE][row.row.pair][row.row.expert] == row.phase


def test_a_row_without_a_saved_S_is_solved_when_it_is_seen():
    pairs = some_pairs()[:1]
    bound = Bound(pairs)
    bound.state[col.COUNT][0].fill_(1)
    result = bound.step(draw(pairs)[0], interval=4)
    assert result[0, col.STATUS] == REFACTORED and result[0, col.BALANCE].isfinite()
    saved = bound.state[col.SAVED][0].clone()
    assert saved.any()
    result = bound.step(draw(pairs)[0], interval=4)
    assert result[0, col.STATUS] == REFACTORED and result[0, col.BALANCE].isnan()
    assert torch.equal(bound.state[col.SAVED][0], saved)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("bad", ["gradient", "factor", "found_inf", "no gradient"])
def test_a_row_that_does_not_run_changes_nothing(scalar, bad):
    pairs = some_pairs(torch.float32)
    if bad == "factor":
        pairs[1].A[2, 3] = torch.inf
    bound, options = Bound(pairs), dict(scalar=scalar, interval=2, check=bad != "factor")
    for grads in draw(pairs, 2):  # the next S is due
        bound.step(grads, **options)
    before, grads = bound.snapshot(), draw(pairs)[0]
    if bad == "gradient":
        grads[1][1][2, 3] = torch.inf
    if bad == "no gradient":
        grads[1] = (None, grads[1][1])
    if bad == "found_inf":
        options["found_inf"] = torch.tensor(1.0)
    result = bound.step(grads, **options)
    of_pair = [torch.equal(x, y) for x, y in zip(before, bound.snapshot())]
    changed = {number % 4 for number, equal in enumerate(of_pair[8:]) if not equal}
    assert changed == (set() if bad == "found_inf" else {0, 2, 3})
    assert of_pair[2] and of_pair[3] and of_pair[0] == (bad == "found_inf")
    assert result[1, col.STATUS] == (PLAIN if bad in ("found_inf", "no gradient") else SKIPPED)


UNCHECKED = pytest.mark.parametrize(
    "options", [{}, {"warmup_steps": 9}, {"interval": 3}, {"scalar": True}, {"warmup_steps": 1}], ids=str
)


@UNCHECKED
def test_unchecked_gradients_that_are_nan_count_as_zero(options):
    pairs = some_pairs(torch.float32)
    bound, clean = Bound(pairs), Bound(pairs)
    for number, grads in enumerate(draw(pairs, 4)):
        bad, zero = ([tuple(g.clone() for g in sides) for sides in grads] for _ in range(2))
        if number in (1, 2):
            for given, value in ((bad, torch.nan), (zero, 0.0)):
                given[0][0][:, 3], given[0][1][2], given[2][0][:, 1:] = value, value, value
        bound.step(bad, check=False, **options), clean.step(zero, **options)
        assert same(bound.snapshot(), clean.snapshot())


@UNCHECKED
def test_unchecked_gradients_past_the_range_leave_factors_and_moments_finite(options):
    pairs = some_pairs(torch.float32)
    bound = Bound(pairs)
    for number, grads in enumerate(draw(pairs, 4)):
        if number in (1, 2):
            grads[0][0][1, 3], grads[0][1][2, 0], grads[0][1][4, 1] = torch.nan, torch.inf, -torch.inf
        result = bound.step(grads, check=False, **options)
        assert (result[:, col.STATUS] != SKIPPED).all()
        assert all(t.isfinite().all() for t in bound.tensors())
    assert bound.state[col.COUNT][0] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 2, "interval": 2}], ids=str)
def test_state_in_float32_under_factors_of_16_bits(dtype, options):
    pairs = some_pairs(dtype)
    bound = Bound(pairs, AMSGRAD, torch.float32)
    rows = [PlainRow(bound, row, dtype) for row in bound.plan.rows]
    for grads in draw(pairs, 4):
        bound.step(grads, **options)
        for row in rows:
            row.step(grads[row.row.pair], **options)
            # a sum that falls close to the middle of two neighbours may be rounded either way
            row.check(1e-4, p_rtol=torch.finfo(dtype).eps / 4)
            row.p = {name: bound.side(col.P, name, row.row).double().clone() for name, _ in SIDES}
    assert bound.state[A_SIDE + col.M][0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_are_the_weights_of_a_float32_run(dtype):
    """S is found from the rounded factors: where it is I, nothing tells the two apart."""
    pairs = some_pairs(dtype)
    wide = [LoRAPair(p.name, p.A.float(), p.B.float(), p.layout) for p in pairs]
    bound, exact = Bound(pairs, AMSGRAD, torch.float32, master=True), Bound(wide, AMSGRAD)
    for grads in draw(pairs, 6):
        bound.step(grads, warmup_steps=10**9)
        exact.step([tuple(g.float() for g in sides) for sides in grads], warmup_steps=10**9)
        for number, (ours, theirs) in enumerate(zip(bound.pairs, exact.pairs)):
            for name, side in SIDES:
                w, p = bound.state[side + col.W][number], getattr(ours, name)
                assert torch.equal(w, getattr(theirs, name)) and torch.equal(p, w.to(dtype))


@pytest.mark.parametrize("options", [{}, {"interval": 2, "warmup_steps": 1}], ids=str)
def test_master_weights_with_S(options):
    pairs = some_pairs(torch.bfloat16)
    bound = Bound(pairs, OPTIONS, torch.float32, master=True)
    rows = [PlainRow(bound, row, torch.bfloat16, master=True) for row in bound.plan.rows]
    for grads in draw(pairs, 4):
        bound.step(grads, **options)
        for row in rows:
            row.step(grads[row.row.pair], **options)
            row.check(1e-4, p_rtol=2e-3)
            row.p = {name: bound.side(col.P, name, row.row).double().clone() for name, _ in SIDES}


@pytest.mark.parametrize("scalar", [False, True])
def test_what_somebody_writes_into_a_factor_replaces_its_master_weights_there(scalar):
    pairs = some_pairs(torch.bfloat16)
    bound, told = (Bound(pairs, OPTIONS, torch.float32, master=True) for _ in range(2))
    first, second = draw(pairs, 2)
    for run in (bound, told):
        run.step(first, scalar=scalar)
        run.pairs[0].A[1:3, 4:7] = 0.375
        run.pairs[3].B[5] *= 2
    told.state[A_SIDE + col.W][0][1:3, 4:7] = 0.375
    told.state[B_SIDE + col.W][3][5] = told.pairs[3].B[5].float()
    bound.step(second, scalar=scalar), told.step(second, scalar=scalar)
    assert same(bound.snapshot(), told.snapshot())
    for number, pair in enumerate(bound.pairs):
        w = bound.state[A_SIDE + col.W][number]
        assert torch.equal(w.bfloat16(), pair.A) and not torch.equal(w, pair.A.float())


@pytest.mark.parametrize("options", [{}, {"interval": 3, "warmup_steps": 1}, {"precision": "float32"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_carried_grams_give_the_same_bits(options, dtype):
    pairs = some_pairs(dtype)
    plain, carried, unkept = (Bound(pairs) for _ in range(3))
    for number, grads in enumerate(draw(pairs, 7)):
        extra = dict(options)
        if number == 2:  # leaves its group, and comes back with a Gram of two steps ago
            grads[0] = (None, None)
        if number == 4:
            extra["found_inf"] = torch.tensor(1.0)
        if number == 5:
            grads[2][0][0, 0] = torch.nan
        want = plain.step(grads, **extra)
        for run, kept in ((carried, 1), (unkept, 0)):
            assert torch.equal(want.nan_to_num(-1), run.step(grads, kept=kept, carry=True, **extra).nan_to_num(-1))
            assert same(plain.snapshot(), run.snapshot())


def test_carried_grams_are_used_only_where_the_factors_are_untouched(monkeypatch):
    pairs, calls = some_pairs()[:2], []
    real = torch_adamw.Group.grams
    monkeypatch.setattr(torch_adamw.Group, "grams", lambda *args: calls.append(1) or real(*args))
    bound, plain = Bound(pairs), Bound(pairs)
    first, second, third = draw(pairs, 3)
    bound.step(first, kept=1, carry=True)
    assert len(calls) == 2  # its own, and the next step's
    bound.step(second, kept=1, carry=True)
    assert len(calls) == 3
    bound.pairs[0].A.mul_(2)
    for grads in (first, second):
        plain.step(grads)
    plain.pairs[0].A.mul_(2)
    bound.step(third, kept=0, carry=True), plain.step(third)
    assert same(bound.snapshot(), plain.snapshot())
    # a step that carries nothing leaves nothing behind
    bound.step(first), plain.step(first)
    assert bound.plan.memory["torch"].grams == {}


def test_the_learning_rate_may_lie_on_the_device():
    pairs = some_pairs(torch.float32)
    plain, tensors = Bound(pairs), Bound(pairs)
    lrs = (torch.tensor(OPTIONS[0][0], dtype=torch.float64), None)
    tensors.hypers[0, col.LR] = torch.nan
    for grads in draw(pairs, 2):
        plain.step(grads)
        tensors.step(grads, lrs=lrs)
    assert same(plain.snapshot(), tensors.snapshot())


def test_stochastic_rounding_of_bfloat16_factors():
    """What is rounded is the very float32 that master weights keep."""
    pairs, seed = some_pairs(torch.bfloat16), 2**62 + 5
    bound, wide = Bound(pairs, OPTIONS, torch.float32), Bound(pairs, OPTIONS, torch.float32, master=True)
    grads, steps = draw(pairs)[0], 12
    for run in (bound, wide):
        run.plan.tag([7, 3, 0, 40])
        for _, side in SIDES:
            for tensor in run.state[side + col.STEP]:
                tensor.fill_(steps)
    bound.step(grads, seed=seed), wide.step(grads, seed=seed)
    tags = [7, 3, 0, 40, 41]
    for tag, row in zip(tags, bound.plan.rows):
        for number, (name, _) in enumerate(SIDES):
            got, w = bound.side(col.P, name, row), wide.side(col.W, name, row)
            assert torch.equal(wide.side(col.P, name, row), w.bfloat16())  # master weights: to nearest
            for i in range(4):
                for k in range(0, w.shape[1], 3):
                    assert float(got[i, k]) == plain_round(float(w[i, k]), seed, tag, number, steps, i + 4 * k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_factors_are_rounded_to_nearest(dtype):
    pairs = some_pairs(dtype)
    plain, seeded = Bound(pairs), Bound(pairs)
    for grads in draw(pairs, 2):
        plain.step(grads), seeded.step(grads, seed=1)
    assert same(plain.snapshot(), seeded.snapshot())


def test_stochastic_rounding_with_the_scalar_refactoring():
    """Powers of two: what has been rounded by chance stays on the grid, and BA is that of the update."""
    pairs = some_pairs(torch.bfloat16)
    pairs[0].B.mul_(64)
    scalar, plain = Bound(pairs, state=torch.float32), Bound(pairs, state=torch.float32)
    grads, options = draw(pairs)[0], dict(seed=3, warmup_steps=1)
    scalar.step(grads, scalar=True, **options), plain.step(grads, **options)
    for ours, theirs in zip(scalar.pairs, plain.pairs):
        assert torch.equal(ours.B.float() @ ours.A.float(), theirs.B.float() @ theirs.A.float()) or ours.experts > 1
    assert not torch.equal(scalar.pairs[0].A, plain.pairs[0].A)


def test_a_degenerate_row_takes_a_scaled_step_or_a_plain_one():
    pairs = [LoRAPair("zero B", torch.randn(4, 21), torch.zeros(17, 4))]
    pairs.append(LoRAPair("rank 1", torch.randn(4, 21), torch.randn(17, 1) @ torch.randn(1, 4)))
    bound = Bound(pairs)
    result = bound.step(draw(pairs)[0], interval=2)
    assert result[:, col.STATUS].tolist() == [DEGENERATE, DEGENERATE]
    assert [float(t) for t in bound.state[col.PHASE]] == [0, 1]
    eye = torch.eye(4)
    assert torch.equal(bound.state[col.SAVED][0][0], torch.stack([eye, eye]))


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
    pairs = some_pairs(torch.bfloat16)
    bound = Bound(pairs, AMSGRAD, torch.float32)
    lrs = (torch.tensor(1e-3), None)
    options = dict(options, found_inf=torch.tensor(0.0), grad_scale=torch.tensor(2.0), lrs=lrs)
    first, second = draw(pairs, 2)
    bound.step(first, **options)
    bound.plan.bind_grads(second)
    step = AdamWStep(bound.hypers, **options)
    with NothingIsRead():
        torch_backend.adamw(bound.plan, step)
