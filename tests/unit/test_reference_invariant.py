"""Whitened steps in a metric's frame: what docs/mathematics.md says of them, on the float64 reference itself."""

import pytest
import torch
from conftest import spectrum_pair

from reflora import reference
from reflora.constants import METRICS
from reflora.reference import Hypers, InvariantState

DOUBLE = torch.float64
HYPERS = (Hypers(lr=1e-2, beta2=0.95, weight_decay=0.0), Hypers(lr=2e-2, beta1=0.8, weight_decay=0.0))
METRIC = pytest.mark.parametrize("metric", METRICS)
MOMENTS = pytest.mark.parametrize("moments", ["gradients", "momentum"])
CHANGES = ["scaled", "reflora"]


def draw(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def empty_state(A, B):
    r = A.shape[0]
    grams = torch.zeros(r, r, dtype=DOUBLE), torch.zeros(r, r, dtype=DOUBLE)
    return InvariantState((torch.zeros_like(A), torch.zeros_like(B)), grams)


def of_condition(r, k):
    """A random `[r, r]` of condition k."""
    U, _, Vh = torch.linalg.svd(draw(r, r))
    return U * torch.logspace(0, -torch.log10(torch.tensor(float(k))).item(), r, dtype=DOUBLE) @ Vh


def walk(A, B, target, **options):
    """Eight steps along the gradients of `||B A - target||^2 / 2`. Returns the products on the way."""
    state, products = empty_state(A, B), []
    for _ in range(8):
        G = B @ A - target
        A, B, state, _ = reference.invariant_step(A, B, B.mT @ G, G @ A.mT, state, HYPERS, **options)
        products.append(B @ A)
    return products


def furthest(ones, others):
    return max(float((x - y).norm() / x.norm()) for x, y in zip(ones, others))


@MOMENTS
@pytest.mark.parametrize("metric", CHANGES)
@pytest.mark.parametrize("start", ["trained", "B = 0"])
def test_every_equal_pair_takes_the_same_steps(metric, moments, start):
    A, B = spectrum_pair(6, 30, 40, 3.0, 10.0)
    B = B if start == "trained" else 0 * B
    Q = 3 * of_condition(6, 100)
    options = {"metric": metric, "moments": moments}
    target = draw(40, 30)
    products = walk(A, B, target, **options)
    others = walk(Q.mT @ A, B @ torch.linalg.inv(Q).mT, target, **options)
    assert furthest(products, others) < 1e-6


@MOMENTS
def test_the_identity_is_a_metric_for_orthogonal_changes_alone(moments):
    A, B = spectrum_pair(6, 30, 40, 3.0, 10.0)
    options = {"metric": "identity", "moments": moments, "target": draw(40, 30)}
    products = walk(A, B, **options)

    def others(Q):
        return walk(Q.mT @ A, B @ torch.linalg.inv(Q).mT, **options)

    assert furthest(products, others(torch.linalg.qr(draw(6, 6)).Q)) < 1e-9
    assert furthest(products, others(of_condition(6, 100))) > 1e-2


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.1])
def test_the_whitener_is_a_geometric_mean(damping):
    A, _ = spectrum_pair(5, 30, 40, 3.0, 10.0)
    g = draw(5, 20)
    V, P = reference.whitener, of_condition(5, 30)
    second = g @ g.mT / 20
    M = P @ P.mT
    size = damping * torch.trace(M @ second) / 5 + 1e-16
    damped = second + size * torch.linalg.inv(M)
    K = V(second, P, damping, 1e-8)
    assert torch.allclose(K, reference.geometric_mean(M, torch.linalg.inv(damped)), rtol=1e-8)
    # it depends on the metric alone, not on its root
    turned = P @ torch.linalg.qr(draw(5, 5)).Q
    assert torch.allclose(K, V(second, turned, damping, 1e-8), rtol=1e-8)


@METRIC
def test_from_B_at_0_the_first_step_has_full_stable_rank(metric):
    A, G = draw(8, 60), draw(50, 60)
    start = (A, torch.zeros(50, 8, dtype=DOUBLE))
    _, B, _, _ = reference.invariant_step(
        *start, torch.zeros_like(A), G @ A.mT, empty_state(*start), HYPERS, metric=metric
    )
    s = torch.linalg.svdvals(B @ torch.linalg.qr(A.mT).R.mT if metric != "identity" else B)
    assert float(s.square().sum() / s[0].square()) > 8 * 0.99
    adam = torch.linalg.svdvals(torch.sign(G @ A.mT))
    assert float(adam.square().sum() / adam[0].square()) < 8 * 0.9


def test_a_step_has_the_size_of_an_adamw_step():
    """In the frame the root mean square of a first step is the rate, as AdamW's is."""
    A, B = spectrum_pair(4, 50, 30, 3.0, 10.0)
    P_A, P_B, _ = reference.frames(A, B, "reflora")
    new_A, new_B, _, _ = reference.invariant_step(A, B, draw(4, 50), draw(30, 4), empty_state(A, B), HYPERS)
    for change, P, h in ((new_A - A, P_A, HYPERS[0]), ((new_B - B).mT, P_B, HYPERS[1])):
        framed = torch.linalg.solve(P, change)
        assert float(framed.square().mean().sqrt()) == pytest.approx(h.lr, rel=1e-3)


def test_degenerate_factors_and_absent_ranks():
    A, B = draw(4, 20), draw(30, 4)
    low = draw(4, 1) @ draw(1, 20)
    for metric in CHANGES:
        assert reference.frames(A, B, metric).why == "refactored"
        for pair in ((low, B), (A, draw(30, 1) @ draw(1, 4)), (draw(4, 3), B), (A, 0 * B)):
            found = reference.frames(*pair, metric)
            assert found.why == "degenerate" and found.of_A.isfinite().all() and found.of_B.isfinite().all()
        assert reference.frames(A * torch.inf, B, metric).why == "skipped"
    padded = torch.cat([A, 0 * A]), torch.cat([B, 0 * B], 1)
    for metric in CHANGES:
        found, own = reference.frames(*padded, metric), reference.frames(A, B, metric)
        assert found.why == "refactored"
        assert torch.allclose(found.of_B[:4, :4], own.of_B) and found.of_B[:4, 4:].eq(0).all()


def test_steps_stay_bounded_where_moments_tell_nothing():
    """No gradient yet, a gradient of rank one, and eps = 0: each step is finite and of the size of the rate."""
    A, B = spectrum_pair(4, 50, 30, 3.0, 10.0)
    hypers = (Hypers(eps=0.0), Hypers(eps=0.0))
    for gA, gB in ((0 * A, 0 * B), (draw(4, 1) @ draw(1, 50), 0 * B), (1e-30 * draw(4, 50), 1e30 * draw(30, 4))):
        found = reference.invariant_step(A, B, gA, gB, empty_state(A, B), hypers)
        P_A, P_B, _ = reference.frames(A, B, "reflora")
        for change, P in ((found[0] - A, P_A), ((found[1] - B).mT, P_B)):
            assert float(torch.linalg.solve(P, change).square().mean().sqrt()) < 1.5e-3
