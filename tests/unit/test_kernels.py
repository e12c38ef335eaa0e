"""The Triton kernels as they are compiled, against the float64 reference."""

import math

import pytest
import torch
from conftest import affine_error
from kernel_cases import DOUBLE, MARKS, degenerate_pairs, pair, precondition, preconditioned, randn, refactor

from reflora import columns as col
from reflora import reference
from reflora.backends import triton_backend
from reflora.columns import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from reflora.pairs import LoRAPair
from reflora.plan import Plan

pytestmark = MARKS


def poisoned(monkeypatch):
    """Results and workspaces start as NaN."""
    empty = torch.empty

    def poison(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poison)


def read_S(p, precision="float64"):
    """(S, S^-1) of a pair, read off gradients that are rows of I, and the result row."""
    r = p.rank
    gA, gB = torch.zeros_like(p.A), torch.zeros_like(p.B)
    gA[:, :r].fill_diagonal_(1)
    gB[:r].fill_diagonal_(1)
    result = precondition([p], [(gA, gB)], precision=precision)[0]
    assert not gA[:, r:].any() and not gB[r:].any()
    return gB[:r].cpu(), gA[:, :r].cpu(), result.cpu()


# r; type of the factors; their conditions and scales; precision; bound
SPECTRA = (
    *((r, torch.float32, (3, 1e3), (1, 1), "float64", 1e-3) for r in (1, 2, 12, 16, 32, 48, 64, 128)),
    *((r, *case) for r in (8, 24) for case in (
        (torch.float32, (3, 1e4), (1, 1), "float64", 1e-2), (torch.float32, (1e3, 1e3), (1, 1), "float64", 1e-2),
        (DOUBLE, (10, 1e4), (1, 1), "float64", 1e-8), (DOUBLE, (1e4, 1e4), (1, 1), "float64", 1e-8),
        (torch.float32, (3, 500), (1, 1), "float32", 5e-3),
    )),
    *((r, DOUBLE, (3, 500), (1, 1), "float32", 5e-3) for r in (8, 24)),
    *((5, torch.float32, (3, 50), scales, precision, 5e-3) for precision in ("float64", "float32")
      for scales in ((1e30, 1e30), (1e-30, 1e-30), (1e15, 1e-15))),
)  # fmt: skip


@pytest.mark.parametrize("r, dtype, conditions, scales, precision, bound", SPECTRA, ids=str)
def test_S(r, dtype, conditions, scales, precision, bound, monkeypatch):
    poisoned(monkeypatch)
    # the larger classes take a minute each to compile: the very kernels of test_kernels_storages.py
    p = pair(r, *conditions, dtype, 152 if r > 32 else 150, 173, *scales)
    S, S_inv, result = read_S(p, precision)
    assert result[col.STATUS] == REFACTORED
    assert affine_error(S, p.A.cpu(), p.B.cpu()) <= bound
    assert affine_error(S_inv, p.B.cpu().mT, p.A.cpu().mT) <= bound
    kappa = float(reference.condition(p.B.mT.double() / p.B.abs().max()))
    assert abs(float(result[col.KAPPA_B]) - kappa) <= max(bound, 1e-3) * kappa
    assert abs(float(result[col.NORM_A] / p.A.double().norm()) - 1) < 1e-6


def solve(pairs, precision="float64", start=0, counts=None):
    """(S, S^-1) of pairs, and the result rows."""
    plan = Plan(pairs)
    plan.bind_grads([(p.A, p.B) for p in pairs])
    wide = [torch.float64 if p.A.dtype == torch.float64 else torch.float32 for p in pairs]
    rooms = [torch.full((1, 2, p.rank, p.rank), torch.nan, dtype=d, device=p.A.device) for p, d in zip(pairs, wide)]
    plan.bind_once(col.SAVED, rooms)
    if counts:
        plan.bind_once(col.COUNT, [torch.tensor([float(count)], device=plan.device) for count in counts])
    results = triton_backend.solve(plan, precision, start)
    return [room[0].cpu() for room in rooms], results.cpu()


@pytest.mark.parametrize("r, precision", [(3, "float64"), (3, "float32"), (20, "float64")])
@pytest.mark.parametrize("n_in, n_out", [(1100, 900), (129, 3), (2, 700)])
def test_sides_in_chunks(n_in, n_out, r, precision, monkeypatch):
    """S alone, preconditioned and refactored: the same S in all, of sides longer than a chunk and shorter than r."""
    poisoned(monkeypatch)
    degenerate = min(n_in, n_out) < r
    p = LoRAPair("", randn(r, n_in), randn(n_out, r)) if degenerate else pair(r, 3, 30, n_in=n_in, n_out=n_out)
    [(S, S_inv)], [result] = solve([p], precision)
    assert result[col.STATUS] == (DEGENERATE if degenerate else REFACTORED)
    gA, gB = (torch.randn_like(t) for t in (p.A, p.B))
    wanted = [(S_inv.double() @ gA.cpu().double()), gB.cpu().double() @ S.double()]
    again = precondition([p], [(gA, gB)], precision=precision)[0].cpu()
    torch.testing.assert_close(again, result, equal_nan=True)
    for got, want in zip((gA, gB), wanted):
        assert float((got.cpu().double() - want).norm() / want.norm()) < 1e-6
    if not degenerate:
        assert affine_error(S, p.A.cpu(), p.B.cpu()) <= (1e-4 if precision == "float64" else 1e-2)
    product = p.B.double() @ p.A.double()
    refactor([p], precision=precision)
    assert float((p.B.double() @ p.A.double() - product).norm() / product.norm()) < 1e-5
    assert float(p.A.double().norm() / p.B.double().norm()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("r", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_sides_in_chunks_by_a_number(r, dtype, monkeypatch):
    """RefLoRA-S: norms are of all chunks of a side, and all columns are multiplied."""
    poisoned(monkeypatch)
    p = pair(r, 3, 30, dtype, n_in=1100, n_out=900)
    p.A[:, :1000].mul_(1e-3)
    p.B[900 // 2 :].mul_(1e3)
    s = float(reference.balance_scalar(p.A.cpu(), p.B.cpu()))
    gA, gB = (torch.randn_like(t) for t in (p.A, p.B))
    wanted = [gA / s, gB * s, *(t.to(p.A) for t in reference.refactor(p.A.cpu(), p.B.cpu(), scalar=True))]
    assert float(precondition([p], [(gA, gB)], scalar=True)[0, col.SCALE]) == pytest.approx(s, rel=1e-10)
    refactor([p], scalar=True)
    for got, want in zip((gA, gB, p.A, p.B), wanted):
        torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


def test_S_alone_of_rows_that_have_none():
    """c I, I, or I without a word of it in the factors' type, never what was there before; shrunk by its own count."""
    _, pairs, statuses, scales = zip(*degenerate_pairs())
    rooms, results = solve(pairs)
    assert results[:, col.STATUS].tolist() == [float(s) for s in statuses]
    for p, room, status, scale in zip(pairs, rooms, statuses, scales):
        c = 1.0 if status == SKIPPED else float(reference.balance_scalar(p.A, p.B)) if scale is None else scale
        eye = torch.eye(p.rank, dtype=room.dtype)
        torch.testing.assert_close(room, torch.stack([c * eye, eye / c]))
    p = pair(5, 3, 30)
    [room], _ = solve([p], start=100, counts=[50])
    weight = reference.shrink_weight(50, 100)
    for got, want in zip(room.double(), reference.choose(p.A.cpu(), p.B.cpu(), weight=weight)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_degenerate(precision, monkeypatch):
    """One launch over pairs that are all singular, extreme or not finite: c I, I or nothing at all, never NaN."""
    poisoned(monkeypatch)
    names, pairs, statuses, scales = zip(*degenerate_pairs())
    grads = [(torch.randn_like(p.A), torch.randn_like(p.B)) for p in pairs]
    before = [(a.clone(), b.clone()) for a, b in grads]
    results = precondition(pairs, grads, precision=precision)
    assert results[:, col.STATUS].tolist() == [float(s) for s in statuses], names
    for p, (gA, gB), (oldA, oldB), status, scale, result in zip(pairs, grads, before, statuses, scales, results):
        if status == SKIPPED:
            assert torch.equal(gA, oldA) and torch.equal(gB, oldB)
            continue
        c = float(reference.balance_scalar(p.A, p.B)) if scale is None else scale
        assert float(result[col.SCALE]) == pytest.approx(c, rel=1e-5)
        torch.testing.assert_close(gA, (oldA.double() / c).to(gA.dtype))
        torch.testing.assert_close(gB, (oldB.double() * c).to(gB.dtype))


def test_gradients_not_finite_or_saturating():
    pairs = [pair(4, 3, 30) for _ in range(3)]
    pairs[2] = pair(4, 3, 30, scale_A=1e-15, scale_B=1e15)
    grads = [(torch.randn_like(p.A), torch.randn_like(p.B)) for p in pairs]
    grads[0][0][1, 140] = torch.inf
    grads[1][1][172, 3] = torch.nan
    grads[2][1].mul_(1e30)
    before = [(a.clone(), b.clone()) for a, b in grads]
    results = precondition(pairs, grads)
    assert results[:, col.STATUS].tolist() == [SKIPPED, SKIPPED, REFACTORED]
    for i in (0, 1):
        assert torch.equal(grads[i][0], before[i][0])
        torch.testing.assert_close(grads[i][1], before[i][1], equal_nan=True, rtol=0, atol=0)
    assert grads[2][1].isfinite().all() and grads[2][1].abs().max() == torch.finfo(torch.float32).max


def strided(tensor):
    """The same values in memory with gaps."""
    rows, columns = tensor.shape
    return randn(rows, 2 * columns + 3, dtype=tensor.dtype)[:, 1 : 2 * columns + 1 : 2].copy_(tensor)


def test_layouts_and_types_in_one_launch(monkeypatch):
    """Ragged shapes, strided and transposed storage, experts, an idle pair, float32 and float64: one rank class."""
    poisoned(monkeypatch)
    base = [pair(r, 3, 50, n_in=n, n_out=m) for r, n, m in ((1, 5, 7), (3, 63, 65), (16, 130, 40), (12, 64, 128))]
    E, r = 3, 5
    pairs = base + [
        LoRAPair("strided", strided(base[1].A), strided(base[1].B)),
        LoRAPair("transposed", base[3].A.mT.contiguous().mT, base[3].B.mT.contiguous().mT),
        LoRAPair("float64", *(x.double() for x in (base[2].A, base[2].B))),
        LoRAPair("experts", randn(E * r, 33), randn(21, r * E), f"experts({E})"),
        LoRAPair("idle", base[0].A.clone(), base[0].B.clone()),
    ]
    grads = [(torch.randn_like(p.A), torch.randn_like(p.B)) for p in pairs]
    grads[5] = (strided(grads[5][0]), grads[5][1].contiguous())
    grads[8] = (None, grads[8][1])
    expected = []
    for p, g in zip(pairs, grads):
        if g[0] is not None:
            views = zip(p.views_A(p.A), p.views_B(p.B), p.views_A(g[0]), p.views_B(g[1]))
            expected += [(gA, gB, *reference.precondition(A, B, gA, gB)) for A, B, gA, gB in views]
    idle = grads[8][1].clone()
    results = precondition(pairs, grads)
    assert results[:, col.STATUS].tolist() == [REFACTORED] * (7 + E) + [PLAIN]
    assert torch.equal(grads[8][1], idle) and results[-1, 1:].isnan().all()
    for gA, gB, wantA, wantB in expected:
        for got, want in ((gA, wantA), (gB, wantB)):
            assert float((got - want).norm() / want.norm()) < (1e-10 if got.dtype == DOUBLE else 1e-5)
    rows = [(A, B) for p in pairs for A, B in zip(p.views_A(p.A), p.views_B(p.B))]
    products = [B.double() @ A.double() for A, B in rows]
    assert (refactor(pairs)[:, col.STATUS] == REFACTORED).all()
    for (A, B), product in zip(rows, products):
        A, B = A.double(), B.double()
        assert float((B @ A - product).norm() / product.norm()) < 1e-5
        assert float((A @ A.mT - B.mT @ B).norm() / (A @ A.mT).norm()) < 1e-4


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_refactor(precision):
    ranks = (1, 7, 20) if precision == "float64" else (1, 7)
    pairs = [pair(r, 4, 200, dtype) for r in ranks for dtype in (torch.float32, DOUBLE)]
    pairs.append(LoRAPair("degenerate", randn(4, 30), 5 * randn(20, 1) @ randn(1, 4)))
    products = [p.B.double() @ p.A.double() for p in pairs]
    results = refactor(pairs, precision=precision)
    assert results[:, col.STATUS].tolist() == [REFACTORED] * 2 * len(ranks) + [DEGENERATE]
    for p, product in zip(pairs, products):
        A, B = p.A.double(), p.B.double()
        Ga, Gb = A @ A.mT, B.mT @ B
        exact = precision == "float64" and p.A.dtype == DOUBLE
        storage = 1e-12 if exact else 2e-6 if precision == "float64" else 1e-4
        assert float((B @ A - product).norm() / product.norm()) < storage
        if p.name != "degenerate":
            assert float((Ga - Gb).norm() / Ga.norm()) < (1e-9 if exact else 1e-5 if precision == "float64" else 1e-2)
        assert float(A.norm() / B.norm()) == pytest.approx(1, rel=1e-3)


def test_scalar_of_16_bits():
    """By a power of two; test_sides_in_chunks_by_a_number has the others."""
    p = LoRAPair("", randn(5, 70, dtype=torch.float16), 3.3 * randn(90, 5, dtype=torch.float16))
    s = 2.0 ** (2 * round(math.log2(float(reference.balance_scalar(p.A, p.B))) / 2))
    gA, gB = torch.randn_like(p.A), torch.randn_like(p.B)
    wanted = [gA.double() / s, gB.double() * s, p.A.double() * s**0.5, p.B.double() / s**0.5]
    result = precondition([p], [(gA, gB)], scalar=True)[0]
    assert result[col.STATUS] == REFACTORED and float(result[col.SCALE]) == s
    refactor([p], scalar=True)
    for got, want in zip((gA, gB, p.A, p.B), wanted):
        torch.testing.assert_close(got, want.half())


@pytest.mark.parametrize("b, s", [(2.0, 1.0), (8.0, 16.0), (32.0, 16.0)])
def test_a_root_between_two_powers_of_two_goes_to_the_even_one(b, s):
    p = LoRAPair("", randn(2, 8, dtype=torch.bfloat16).fill_(1.0), randn(8, 2, dtype=torch.bfloat16).fill_(b))
    result = refactor([p], scalar=True)[0]
    assert float(result[col.SCALE]) == s
    assert p.A.unique().tolist() == [s**0.5] and p.B.unique().tolist() == [b / s**0.5]


def test_scalar_leaves_zero_and_nan_alone():
    pairs = [LoRAPair("", randn(2, 9), 0 * randn(8, 2)), LoRAPair("", randn(2, 9) * torch.nan, randn(8, 2))]
    before = [(p.A.clone(), p.B.clone()) for p in pairs]
    results = refactor(pairs, scalar=True)
    assert results[:, col.STATUS].tolist() == [DEGENERATE, SKIPPED]
    for p, (A, B) in zip(pairs, before):
        torch.testing.assert_close(p.A, A, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(p.B, B)


def test_ranks_past_128_go_through_torch():
    """One plan: some rows by kernels, some by the torch backend, results in the plan's order."""
    pairs = [pair(4, 3, 30), pair(130, 3, 30), pair(20, 3, 30)]
    grads = [(torch.randn_like(p.A), torch.randn_like(p.B)) for p in pairs]
    expected = preconditioned(pairs, grads)
    results = precondition(pairs, grads)
    assert results[:, col.STATUS].tolist() == [REFACTORED] * 3
    for got, want in zip(grads, expected):
        for x, y in zip(got, want):
            assert float((x.cpu() - y).norm() / y.norm()) < 1e-5
    for p, result in zip(pairs, results):
        assert float(result[col.NORM_A]) == pytest.approx(float(p.A.double().norm()), rel=1e-9)


def test_no_rows_of_the_table_are_missed():
    """A plan rebuilt with other rows is prepared anew."""
    pairs = [pair(3, 3, 10, n_in=20, n_out=30), pair(5, 3, 10, n_in=20, n_out=30)]
    plan = Plan(pairs)
    assert len(triton_backend.refactor(plan, False, "float64")) == 2
    plan.pairs = [pair(6, 3, 10, n_in=20, n_out=30)] * 1
    plan.rebuild()
    results = triton_backend.refactor(plan, False, "float64")
    assert results.shape == (1, col.RESULTS) and results[0, col.STATUS] == REFACTORED
