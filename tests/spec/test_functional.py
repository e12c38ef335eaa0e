"""refactor_ and precondition_ on every backend: accuracy against the oracle, properties, layouts, degenerate input.

The triton backend compiles a kernel for each case, so it has only the sizes that test_kernels.py does not cover.
"""

import pytest
import torch
from conftest import FLOAT32_TOLERANCE, RANKS, TOLERANCE, affine_error, read_S, spectrum_pair
from refusals import unchanged

import reflora
from reflora import precondition_, refactor_, reference
from reflora.columns import DEGENERATE, REFACTORED, SKIPPED
from reflora.pairs import LoRAPair

SPECTRA = {10.0: (1.3, 10.0), 1e3: (1e3, 1e3), 1e4: (1e4, 1e4)}
DTYPES = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]


def sizes(r):
    return 2 * r + 17, 3 * r + 5


@pytest.mark.parametrize("condition", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_S_against_the_oracle(fast_backend, r, dtype, condition):
    A, B = spectrum_pair(r, *sizes(r), *SPECTRA[condition], dtype)
    S, S_inv = read_S(A, B, fast_backend)
    tolerance = TOLERANCE[dtype, condition]
    assert affine_error(S, A, B) <= tolerance
    assert affine_error(S_inv, B.mT, A.mT) <= tolerance  # the roles of A and B swapped
    assert torch.equal(S, S.mT) and torch.equal(S_inv, S_inv.mT)


@pytest.mark.parametrize("r", RANKS)
def test_float32_precision(fast_backend, r):
    A, B = spectrum_pair(r, *sizes(r), 3.0, 500.0, torch.float32)
    S, _ = read_S(A, B, fast_backend, precision="float32")
    assert affine_error(S, A, B) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_refactor_balances_and_keeps_the_product(fast_backend, r, dtype):
    A, B = spectrum_pair(r, *sizes(r), 3.0, 100.0, dtype)
    new_A, new_B = A.clone(), B.clone()
    assert refactor_([(new_A, new_B)], backend=fast_backend).refactored == 1
    eps, size = torch.finfo(dtype).eps, (B.double() @ A.double()).norm()
    assert (new_B.double() @ new_A.double() - B.double() @ A.double()).norm() <= 20 * eps * 10 * size
    Ga, Gb = new_A.double() @ new_A.double().mT, new_B.double().mT @ new_B.double()
    assert (Ga - Gb).norm() <= 1e4 * eps * Ga.norm()
    again = refactor_([(new_A.clone(), new_B.clone())], backend=fast_backend)
    assert again.worst_balance <= 1e4 * eps


def test_theorem_6_one_step_for_every_factorisation(fast_backend):
    A, B = spectrum_pair(6, 40, 30, 3.0, 20.0)
    gW = torch.randn(30, 40, dtype=torch.float64)
    Q = torch.randn(6, 6, dtype=torch.float64) + 3 * torch.eye(6)
    updates = {}
    for scalar in (False, True):
        for name, (a, b) in {"given": (A, B), "other": (Q.mT @ A, B @ torch.linalg.inv(Q).mT)}.items():
            gA, gB = b.mT @ gW, gW @ a.mT
            precondition_([(a, b)], [(gA, gB)], scalar=scalar, backend=fast_backend)
            updates[scalar, name] = b @ gA + gB @ a
    assert torch.allclose(updates[False, "given"], updates[False, "other"], atol=1e-8)
    assert not torch.allclose(updates[True, "given"], updates[True, "other"], atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES + HALVES, ids=str)
def test_scalar_refactor(backend, dtype):
    A, B = torch.randn(4, 30).to(dtype), (torch.randn(20, 4) / 50).to(dtype)
    new_A, new_B = A.clone(), B.clone()
    assert refactor_([(new_A, new_B)], scalar=True, backend=backend).refactored == 1
    if dtype in HALVES:  # the root is a power of two, so that the product moves by nothing at all
        assert torch.equal(new_B.double() @ new_A.double(), B.double() @ A.double())
        assert 0.5 <= new_B.double().norm() / new_A.double().norm() <= 2
    else:
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        for got, want in zip((new_A, new_B), reference.refactor(A, B, scalar=True)):
            assert torch.allclose(got.double(), want, rtol=tolerance)


def test_three_hundred_half_precision_scalar_refactorings_leave_the_product(fast_backend):
    A, B = torch.randn(4, 30).bfloat16(), (torch.randn(20, 4) / 50).bfloat16()
    new_A, new_B = A.clone(), B.clone()
    for _ in range(300):
        new_A *= 4  # an imbalance to mend every time
        new_B /= 4
        refactor_([(new_A, new_B)], scalar=True, backend=fast_backend)
    assert torch.equal(new_B.double() @ new_A.double(), B.double() @ A.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_storage(fast_backend, dtype):
    A, B = (t.to(dtype) for t in spectrum_pair(8, 60, 70, 3.0, 50.0))
    gA, gB = torch.randn_like(A) / 100, torch.randn_like(B) / 100
    want_A, want_B = reference.precondition(A, B, gA, gB)
    precondition_([(A, B)], [(gA, gB)], backend=fast_backend)
    eps = torch.finfo(dtype).eps
    assert (gA - want_A).norm() <= eps * want_A.norm() and (gB - want_B).norm() <= eps * want_B.norm()


def degenerate_pairs(r, dtype):
    """Name -> (pair, statuses that are right)."""
    A, B = (t.to(dtype) for t in spectrum_pair(r, 3 * r + 7, 2 * r + 11, 3.0, 10.0))
    rank_1 = (B[:, :1] @ torch.ones(1, r, dtype=dtype)).contiguous()
    unless_of_rank_1 = REFACTORED if r == 1 else DEGENERATE
    return {
        "B = 0": ((A, B * 0), DEGENERATE),
        "A = 0": ((A * 0, B), DEGENERATE),
        "both 0": ((A * 0, B * 0), DEGENERATE),
        "rank 1": ((A, rank_1), unless_of_rank_1),
        "k = 1e12": ((A, spectrum_pair(r, r + 1, 2 * r + 11, 1.0, 1e12, dtype)[1]), unless_of_rank_1),
        "n < r": ((A[:, : max(r // 2, 1)].contiguous(), B), unless_of_rank_1),
        "huge A": ((A * 1e30, B), REFACTORED),
        "tiny A": ((A * 1e-30, B), REFACTORED),
        "huge both": ((A * 1e30, B * 1e30), REFACTORED),
        "tiny both": ((A * 1e-30, B * 1e-30), REFACTORED),
        "apart": ((A * 1e30, B * 1e-30), DEGENERATE if dtype == torch.float32 else REFACTORED),
        "nan": ((A, B.clone().fill_diagonal_(torch.nan)), SKIPPED),
        "inf": ((A.clone().fill_diagonal_(torch.inf), B), SKIPPED),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 2, 8, 48, 128])
@pytest.mark.parametrize("scalar", [False, True])
def test_degenerate_input_is_decided_layer_by_layer(fast_backend, r, dtype, scalar):
    cases = degenerate_pairs(r, dtype)
    pairs = [(A.clone(), B.clone()) for (A, B), _ in cases.values()]
    grads = [(torch.randn_like(A), torch.randn_like(B)) for A, B in pairs]
    before = [(gA.clone(), gB.clone()) for gA, gB in grads]
    statuses = precondition_(pairs, grads, scalar=scalar, backend=fast_backend).status.tolist()
    refactored = refactor_(pairs, scalar=scalar, backend=fast_backend)
    for i, (name, ((A, B), want)) in enumerate(cases.items()):
        if not scalar:
            assert statuses[i] == want, name
        assert (statuses[i] == SKIPPED) == (want == SKIPPED), name
        for new, old in zip((*pairs[i], *grads[i]), (A, B, *before[i])):
            if want == SKIPPED:
                assert torch.equal(new.nan_to_num(7.0), old.nan_to_num(7.0)), name
            else:
                assert new.isfinite().all(), name
    assert (refactored.status == SKIPPED).sum() == 2


def statuses_of_singular_grams(ranks, n, count, backend):
    """In float32 precision, of B with rank r - 1: often rounding leaves a Cholesky factor, of whatever condition."""
    pairs = [(torch.randn(r, 100), torch.randn(n, r - 1) @ torch.randn(r - 1, r)) for r in ranks for _ in range(count)]
    grads = [(torch.randn_like(A), torch.randn_like(B)) for A, B in pairs]
    return precondition_(pairs, grads, precision="float32", backend=backend).status


def test_rounding_of_a_singular_gram_is_not_taken_for_an_S(backend):
    assert (statuses_of_singular_grams((2, 3, 4, 8), 77, 12, backend) == DEGENERATE).all()


def test_rounding_of_a_long_singular_gram_is_not_taken_for_an_S(fast_backend):
    assert (statuses_of_singular_grams((2, 4, 8), 11008, 40, fast_backend) == DEGENERATE).all()


def test_a_rank_that_is_tiny_is_there(fast_backend):
    """Its squares are too small for float32, of which the Grams may be; the layer is no smaller one."""
    A, B = spectrum_pair(6, 40, 30, 2.0, 2.0)
    A[2] *= 1e-24
    B[:, 2] *= 1e-24
    grads = [(torch.randn_like(A), torch.randn_like(B))]
    found = precondition_([(A, B)], grads, precision="float32", backend=fast_backend)
    assert found.status.tolist() == [DEGENERATE] and float(found.condition_A[0]) > 1e4
    A[2], B[:, 2] = 0, 0
    found = precondition_([(A, B)], grads, precision="float32", backend=fast_backend)
    assert found.status.tolist() == [REFACTORED] and float(found.condition_A[0]) < 100


def test_experts_are_refactored_each_on_its_own(backend):
    pair = LoRAPair("moe", torch.randn(3 * 4, 20), torch.randn(15, 4 * 3), "experts(3)")
    alone = [(A.clone(), B.clone()) for A, B in zip(pair.views_A(pair.A), pair.views_B(pair.B))]
    diagnostics = refactor_([pair], backend=backend)
    assert diagnostics.names == ["moe[0]", "moe[1]", "moe[2]"] and diagnostics.refactored == 3
    refactor_(alone, backend=backend)
    for (A, B), new_A, new_B in zip(alone, pair.views_A(pair.A), pair.views_B(pair.B)):
        assert torch.allclose(A, new_A, atol=1e-6) and torch.allclose(B, new_B, atol=1e-6)


def test_conv_pairs(backend):
    for memory in (torch.contiguous_format, torch.channels_last):
        A, B = torch.randn(4, 5, 3, 3).to(memory_format=memory), torch.randn(20, 4, 1, 1)
        product = torch.einsum("or,rikl->oikl", B[..., 0, 0], A)
        assert refactor_([LoRAPair("conv", A, B, "conv")], backend=backend).refactored == 1
        assert torch.allclose(torch.einsum("or,rikl->oikl", B[..., 0, 0], A), product, atol=1e-5)


def test_missing_gradients_are_left_alone(backend):
    pairs = [tuple(t.requires_grad_() for t in (torch.randn(4, 10), torch.randn(6, 4))) for _ in range(3)]
    (pairs[0][0].sum() + pairs[0][1].sum() + pairs[1][0].sum()).backward()
    with unchanged(pairs[1][0].grad):
        assert precondition_(pairs, backend=backend).status.tolist() == [0, 3, 3]
    assert pairs[2][0].grad is None


def test_a_non_finite_gradient_skips_its_layer(fast_backend):
    pairs = [(torch.randn(4, 10), torch.randn(6, 4)) for _ in range(2)]
    grads = [(torch.randn(4, 10), torch.randn(6, 4)) for _ in range(2)]
    grads[0][1][3, 2] = torch.inf
    with unchanged(grads[0][0]):
        assert precondition_(pairs, grads, backend=fast_backend).status.tolist() == [SKIPPED, REFACTORED]


def test_autograd_sees_the_writes(backend):
    A, B = torch.randn(4, 10, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = (B @ A).square().sum()
    refactor_([(A, B)], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_and_many(fast_backend):
    assert refactor_([], backend=fast_backend).refactored == 0
    pairs = [(torch.randn(2, 5), torch.randn(3, 2)) for _ in range(1000)]
    assert refactor_(pairs, backend=fast_backend).refactored == 1000


def test_a_rank_above_every_class():
    for backend in ("cpp", "torch"):
        A, B = spectrum_pair(160, 200, 180, 2.0, 20.0)
        product = B @ A
        assert refactor_([(A, B)], backend=backend).refactored == 1
        assert torch.allclose(B @ A, product, atol=1e-12)


def test_diagnostics(fast_backend):
    A, B = spectrum_pair(8, 60, 70, 3.0, 50.0, torch.float32)
    result = precondition_([(A, B)], [(A.clone(), B.clone())], backend=fast_backend)
    Ga, Gb = A.double() @ A.double().mT, B.double().mT @ B.double()
    assert result.balance[0] == pytest.approx(float((Ga - Gb).norm() / Ga.norm()), rel=1e-9)
    assert result.condition_A[0] == pytest.approx(float(reference.condition(A)), rel=1e-6)
    assert result.condition_B[0] == pytest.approx(float(reference.condition(B.mT)), rel=1e-6)
    assert result.scale[0] == pytest.approx(float(B.double().norm() / A.double().norm()), rel=1e-9)
    assert "refactored=1" in repr(result)


def test_results_do_not_depend_on_threads_or_company():
    """A layer's bits are its own: not the thread count's, not the batch's."""
    pairs = [spectrum_pair(8, 300, 200, 3.0, 30.0, torch.float32) for _ in range(9)]
    threads, outputs = torch.get_num_threads(), []
    try:
        for count, chosen in ((1, pairs), (2, pairs), (2, pairs[:1])):
            torch.set_num_threads(count)
            copies = [(A.clone(), B.clone()) for A, B in chosen]
            reflora.refactor_(copies, backend="cpp")
            outputs.append(copies[0])
    finally:
        torch.set_num_threads(threads)
    for A, B in outputs[1:]:
        assert torch.equal(A, outputs[0][0]) and torch.equal(B, outputs[0][1])


def test_balance_where_a_layer_is_degenerate(backend):
    A, B = torch.randn(6, 4), torch.randn(9, 6)  # n < r
    Ga, Gb = A.double() @ A.double().mT, B.double().mT @ B.double()
    pairs = [(A, B), (torch.randn(4, 10), torch.zeros(9, 4)), (torch.zeros(4, 10), torch.randn(9, 4))]
    grads = [(torch.randn_like(a), torch.randn_like(b)) for a, b in pairs]
    balance = precondition_(pairs, grads, backend=backend).balance.tolist()
    assert balance == pytest.approx([float((Ga - Gb).norm() / Ga.norm()), 1.0, float("inf")])


def test_float64_storage_of_long_factors(fast_backend):
    for r in (2, 8, 32):
        A, B = spectrum_pair(r, 1536, 2048, 3.0, 1e4)
        assert affine_error(read_S(A, B, fast_backend)[0], A, B) <= 1e-8


def test_products_past_the_storage_range_saturate(backend):
    A, B = torch.randn(4, 30), torch.randn(20, 4) * 1e-30
    gA, gB = torch.randn_like(A) * 1e20, torch.randn_like(B)
    precondition_([(A, B)], [(gA, gB)], backend=backend)
    assert gA.isfinite().all() and gA.abs().max() == torch.finfo(torch.float32).max
