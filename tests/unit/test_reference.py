"""The properties of docs/mathematics.md, on the float64 reference itself."""

import pytest
import torch
from conftest import spectrum_pair

from reflora import reference

SHAPES = [(1, 7, 5), (4, 9, 11), (8, 63, 40), (12, 31, 64)]


def random_pair(shape):
    r, n_in, n_out = shape
    return spectrum_pair(r, n_in, n_out, 3.0, 50.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_S_solves_its_equation_and_balances(shape):
    A, B = random_pair(shape)
    result = reference.refactoring(A, B)
    Ga, Gb = A @ A.mT, B.mT @ B
    eye = torch.eye(shape[0], dtype=torch.float64)
    assert torch.allclose(result.S @ Ga @ result.S, Gb, atol=1e-12)
    assert torch.allclose(result.S, result.S.mT) and torch.linalg.eigvalsh(result.S).min() > 0
    assert torch.allclose(result.S @ result.S_inv, eye, atol=1e-9)
    assert torch.allclose(result.P @ result.P.mT, result.S) and torch.allclose(
        result.P.mT @ result.P_inv_T, eye, atol=1e-9
    )
    new_A, new_B = reference.refactor(A, B)
    assert torch.allclose(new_B @ new_A, B @ A, atol=1e-12)
    assert torch.allclose(new_A @ new_A.mT, new_B.mT @ new_B, atol=1e-12)
    assert torch.allclose(new_A @ new_A.mT, torch.diag(result.spectrum), atol=1e-12)


def test_S_is_the_geometric_mean():
    A, B = random_pair((6, 20, 30))
    S = reference.refactoring(A, B).S
    assert torch.allclose(reference.geometric_mean(torch.linalg.inv(A @ A.mT), B.mT @ B), S, atol=1e-10)


def test_S_minimises_the_trace_bound():
    A, B = random_pair((5, 20, 30))
    Ga, Gb = A @ A.mT, B.mT @ B
    result = reference.refactoring(A, B)

    def bound(S):
        return torch.trace(S @ Ga) + torch.trace(torch.linalg.solve(S, Gb))

    assert torch.isclose(bound(result.S), 2 * torch.linalg.matrix_norm(B @ A, "nuc"))
    for _ in range(20):
        W = torch.randn(5, 5, dtype=torch.float64) * 0.1
        assert bound(torch.linalg.matrix_exp(W + W.mT) @ result.S @ torch.linalg.matrix_exp(W + W.mT)) > bound(result.S)


def sgd_update(A, B, gW, precondition):
    gA, gB = B.mT @ gW, gW @ A.mT
    pA, pB = precondition(A, B, gA, gB)
    return B @ pA + pB @ A  # first order in the learning rate


def test_every_equal_factorisation_takes_the_same_step():
    """Theorem 6: true for the full variant, false for the scalar one."""
    A, B = random_pair((6, 20, 30))
    gW = torch.randn(30, 20, dtype=torch.float64)
    Q = torch.randn(6, 6, dtype=torch.float64) + 3 * torch.eye(6)
    other = (Q.mT @ A, B @ torch.linalg.inv(Q).mT)
    full = [sgd_update(*pair, gW, reference.precondition) for pair in ((A, B), other)]
    assert torch.allclose(*full, atol=1e-9)

    def scalar(A, B, gA, gB):
        s = reference.balance_scalar(A, B)
        return gA / s, gB * s

    assert not torch.allclose(*[sgd_update(*pair, gW, scalar) for pair in ((A, B), other)], atol=1e-2)


def test_symmetries():
    A, B = random_pair((6, 20, 30))
    S = reference.refactoring(A, B).S
    assert torch.allclose(reference.refactoring(B.mT, A.mT).S, torch.linalg.inv(S), atol=1e-7)
    assert torch.allclose(reference.refactoring(-3 * A, B).S, S / 3)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert torch.allclose(reference.refactoring(Q.mT @ A, B @ Q).S, Q.mT @ S @ Q)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_known_smoothness(upper, scaling):
    A, B = random_pair((4, 20, 30))
    result = reference.refactoring(A, B)
    k, L = float(result.spectrum.sum()), 3.0
    small, large = 0.25 / (k * L * scaling**2), 2 / (k * L * scaling**2)  # t = 4 k and t = k / 2
    S = reference.known_smoothness(A, B, L, small, scaling, upper)
    assert reference.upper_bound(A, B, S, L, small, scaling) < 1e-18
    assert reference.upper_bound(A, B, result.S, L, small, scaling) > 1e-4
    assert torch.equal(reference.known_smoothness(A, B, L, large, scaling, upper), result.S)
    assert reference.known_smoothness(A, B * 0, L, large, scaling, upper) is None

    half = float(A.norm() * B.norm())
    for lr, reaches_zero in ((0.25 / (half * L * scaling**2), True), (2 / (half * L * scaling**2), False)):
        s = reference.known_smoothness_scalar(A, B, L, lr, scaling, upper)
        bound = reference.upper_bound(A, B, s * torch.eye(4, dtype=torch.float64), L, lr, scaling)
        assert (bound < 1e-18) == reaches_zero
        if not reaches_zero:
            assert torch.isclose(s, B.norm() / A.norm())


def test_degenerate_layers():
    A, B = random_pair((4, 20, 30))
    eye = torch.eye(4, dtype=torch.float64)
    assert reference.choose(A, B)[2] == "refactored"
    S, S_inv, why = reference.choose(A, B * 0)
    assert why == "degenerate" and torch.equal(S, eye) and torch.equal(S_inv, eye)
    S, S_inv, why = reference.choose(A, B[:, :1] @ torch.ones(1, 4, dtype=torch.float64))
    assert why == "degenerate" and torch.allclose(S @ S_inv, eye) and torch.equal(S, S[0, 0] * eye)
    assert reference.choose(A[:, :3], B)[2] == "degenerate"
    assert reference.choose(A, B * torch.nan)[2] == "skipped"


def test_transport_is_what_refactoring_does_to_gradients():
    """Adam's moments of the refactored pair, from gradients of the refactored pair or by moving the old ones."""
    A, B = random_pair((4, 20, 30))
    gW = torch.randn(30, 20, dtype=torch.float64)
    root = reference.balance_scalar(A, B).sqrt()
    new_A, new_B = reference.refactor(A, B, scalar=True)
    assert torch.allclose(new_A.norm(), new_B.norm())
    for old, new, factor in ((B.mT @ gW, new_B.mT @ gW, 1 / root), (gW @ A.mT, gW @ new_A.mT, root)):
        moved = reference.transport(old, old**2, factor)
        assert torch.allclose(moved[0], new) and torch.allclose(moved[1], new**2)


def test_polar_and_sqrtm():
    X = torch.randn(3, 5, 5, dtype=torch.float64)
    Q, H = reference.polar(X)
    assert torch.allclose(Q @ H, X) and torch.allclose(Q @ Q.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    spd = X @ X.mT + torch.eye(5)
    assert torch.allclose(reference.sqrtm(spd) @ reference.sqrtm(spd), spd)
