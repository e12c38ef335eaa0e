"""InvariantAdamW against what it must equal, its state, and the layers that it cannot step."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from refusals import refused, unchanged
from toys import clones, factors, leaf_pairs, random_grads, step_alike

from benchmarks.baselines.lora_muon import LoRAMuon
from benchmarks.baselines.lora_rite import LoRARITE
from reflora import InvariantAdamW, RefLoRAAdamW, RiemannianAdamW, create_reflora_optimizer
from reflora.columns import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from reflora.constants import METRICS, MOMENTS

DOUBLE = torch.float64
KIND = pytest.mark.parametrize("metric, moments", [(metric, kind) for metric in METRICS for kind in MOMENTS])
SHAPES = [(4, 30, 21), (6, 25, 40)]


def of_condition(r: int, k: float) -> torch.Tensor:
    """A random `[r, r]` of condition k."""
    U, _, Vh = torch.linalg.svd(torch.randn(r, r, dtype=DOUBLE))
    return U * torch.logspace(0, -torch.log10(torch.tensor(k)).item(), r, dtype=DOUBLE) @ Vh


def draw_like(pairs):
    """A full gradient of each product."""
    return [torch.randn(B.shape[0], A.shape[1], dtype=A.dtype) for A, B in pairs]


def set_grads(pairs, full):
    for (A, B), G in zip(pairs, full):
        A.grad, B.grad = B.detach().mT @ G, G @ A.detach().mT


@KIND
@pytest.mark.parametrize("start", ["trained", "B = 0"])
def test_every_equal_pair_moves_its_product_alike(fast_backend, metric, moments, start):
    """For "identity" the change of basis is orthogonal."""
    ones = leaf_pairs(SHAPES)
    if start == "B = 0":
        for _, B in ones:
            B.data.zero_()
    turns = [3 * of_condition(A.shape[0], 100.0) for A, _ in ones]
    if metric == "identity":
        turns = [torch.linalg.qr(Q).Q for Q in turns]
    others = [(Q.mT @ A.detach(), B.detach() @ torch.linalg.inv(Q).mT) for Q, (A, B) in zip(turns, ones)]
    others = [tuple(t.requires_grad_() for t in sides) for sides in others]
    options = {"lr": 1e-2, "metric": metric, "moments": moments, "weight_decay": 0.0, "backend": fast_backend}
    steppers = [InvariantAdamW(pairs, **options) for pairs in (ones, others)]
    goals = draw_like(ones)
    for _ in range(6):
        for pairs, stepper in zip((ones, others), steppers):
            set_grads(pairs, [(B @ A).detach() - goal for (A, B), goal in zip(pairs, goals)])
            stepper.step()
        for (A, B), (A2, B2) in zip(ones, others):
            assert (B @ A - B2 @ A2).norm() <= 1e-6 * (B @ A).norm()


def steps_from_one_place(ours, a, theirs, b):
    """What three steps of either optimizer add to each factor, all taken from the same factors."""
    start = [t.detach().clone() for t in factors(ours)]
    for _ in range(3):
        full = draw_like(ours)
        moved = []
        for pairs, stepper in ((ours, a), (theirs, b)):
            for t, first in zip(factors(pairs), start):
                t.data.copy_(first)
            set_grads(pairs, full)
            stepper.step()
            moved.append([t.detach() - first for t, first in zip(factors(pairs), start)])
        yield from zip(*moved)


def test_the_scaled_metric_is_lora_rites_update(fast_backend):
    """Without its skips, clips and average: the second moments of its steps, in a basis that stays."""
    ours = leaf_pairs(SHAPES)
    theirs = clones(ours)
    options = {"lr": 1e-2, "betas": (0.0, 0.99), "eps": 1e-12, "weight_decay": 0.0}
    a = InvariantAdamW(ours, metric="scaled", damping=1e-14, backend=fast_backend, **options)
    b = LoRARITE(factors(theirs), theirs, skip=torch.inf, clip=torch.inf, **options)
    for x, y in steps_from_one_place(ours, a, theirs, b):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


def test_momentum_in_the_scaled_metric_is_lora_muons_update(fast_backend):
    """Its rate is that of the spectral norm: 2 sqrt(n) for a root mean square of 1."""
    ours = leaf_pairs(SHAPES)
    theirs = clones(ours)
    options = {"lr": 1e-3, "weight_decay": 0.0}
    a = InvariantAdamW(
        ours, metric="scaled", moments="momentum", betas=(0.95, 0.999), eps=1e-14, damping=1e-14, backend=fast_backend,
        **options,
    )  # fmt: skip
    b = LoRAMuon(factors(theirs), theirs, **options)
    for x, y in steps_from_one_place(ours, a, theirs, b):
        torch.testing.assert_close(x, 2 * max(x.shape) ** 0.5 * y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_from_B_at_0_the_first_step_has_full_stable_rank(fast_backend, metric):
    pairs = leaf_pairs([(8, 60, 50)], torch.float32)
    (A, B), *_ = pairs
    B.data.zero_()
    optimizer = InvariantAdamW(pairs, lr=1e-2, metric=metric, backend=fast_backend)
    set_grads(pairs, draw_like(pairs))
    with unchanged(A.grad):
        optimizer.step()
    framed = B.detach().double() @ torch.linalg.qr(A.detach().double().mT).R.mT
    s = torch.linalg.svdvals(B.detach() if metric == "identity" else framed)
    assert s.square().sum() / s[0].square() > 7.8


def test_state_is_half_of_adamws(fast_backend):
    pairs = leaf_pairs([(8, 768, 768)], torch.float32)
    optimizer = InvariantAdamW(pairs, backend=fast_backend)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.step()
    A, B = pairs[0]
    assert set(optimizer.state[A]) == set(optimizer.state[B]) == {"exp_avg", "exp_avg_gram", "step"}
    kept = sum(t.nbytes for own in optimizer.state.values() for t in own.values())
    assert kept <= 0.55 * 2 * (A.nbytes + B.nbytes)
    gram = optimizer.state[A]["exp_avg_gram"]
    torch.testing.assert_close(gram, 1e-3 * (A.grad.double() @ A.grad.double().mT) / 768, rtol=1e-6, atol=0)


def test_resume_is_exact(fast_backend):
    pairs = leaf_pairs(SHAPES, torch.float32)
    optimizer = InvariantAdamW(pairs, lr=1e-2, metric="scaled", backend=fast_backend)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        random_grads(factors(pairs), generator)
        optimizer.step()
    others, saved = clones(pairs), copy.deepcopy(optimizer.state_dict())
    resumed = InvariantAdamW(others, lr=3e-2, metric="scaled", backend=fast_backend)
    resumed.load_state_dict(saved)
    assert resumed.state[others[0][0]]["exp_avg_gram"].dtype == DOUBLE
    for _ in range(3):
        step_alike(pairs, optimizer, others, resumed, generator)
    assert all(torch.equal(p, q) for p, q in zip(factors(pairs), factors(others)))
    copied = copy.deepcopy(resumed)
    assert copied.options == resumed.options and copied.metric == "scaled"


def test_state_of_adamw_is_taken_over(fast_backend):
    pairs = leaf_pairs(SHAPES, torch.float32)
    adamw = torch.optim.AdamW(factors(pairs), lr=1e-2)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    adamw.step()
    optimizer = InvariantAdamW(pairs, lr=1e-2, backend=fast_backend)
    optimizer.load_state_dict(adamw.state_dict())
    optimizer.step()
    for t, mean in zip(factors(pairs), (1, 0) * 2):
        own, theirs = optimizer.state[t], adamw.state[t]
        assert set(own) == {"exp_avg", "exp_avg_gram", "step"} and own["step"] == 2
        g = t.grad.double() if mean else t.grad.double().mT
        wanted = 0.999 * torch.diag(theirs["exp_avg_sq"].double().mean(mean)) + 1e-3 * g @ g.mT / g.shape[1]
        torch.testing.assert_close(own["exp_avg_gram"], wanted, rtol=1e-5, atol=1e-12)


def test_state_of_RefLoRAAdamW_is_refused(fast_backend):
    """Its means are of gradients multiplied by S."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    others = clones(pairs)
    other = RefLoRAAdamW(others, backend=fast_backend)
    random_grads(factors(others), torch.Generator().manual_seed(0))
    other.step()
    optimizer = InvariantAdamW(pairs, backend=fast_backend)
    with refused("means of the gradients themselves", of=optimizer):
        optimizer.load_state_dict(other.state_dict())


def test_a_lone_gradient_takes_adamws_step_and_comes_back(fast_backend):
    pairs = leaf_pairs(SHAPES, torch.float32)
    (A, B), other = pairs
    optimizer = InvariantAdamW(pairs, lr=1e-2, backend=fast_backend)
    generator = torch.Generator().manual_seed(0)
    random_grads(factors(pairs), generator)
    optimizer.step()
    diagonal = optimizer.state[B]["exp_avg_gram"].diagonal().clone()
    random_grads(factors(pairs), generator)
    A.grad = None
    exact = [t.detach().clone().requires_grad_() for t in (B,)]
    adamw = torch.optim.AdamW(exact, lr=1e-2)
    exact[0].grad = B.grad.clone()
    entries = {"step": torch.tensor(1.0), "exp_avg": optimizer.state[B]["exp_avg"].clone()}
    adamw.state[exact[0]] = {**entries, "exp_avg_sq": diagonal.float().expand_as(B).clone()}
    with pytest.warns(UserWarning, match="without RefLoRA"), unchanged(A):
        optimizer.step()
    adamw.step()
    torch.testing.assert_close(B, exact[0], rtol=1e-5, atol=1e-7)
    assert optimizer.diagnostics().status.tolist() == [PLAIN, REFACTORED]
    squares = optimizer.state[B]["exp_avg_sq"].double().mean(0)
    random_grads(factors(pairs), generator)
    optimizer.step()
    assert optimizer.diagnostics().status.tolist() == [REFACTORED, REFACTORED]
    assert set(optimizer.state[B]) == {"exp_avg", "exp_avg_gram", "step"}
    g = B.grad.double()
    wanted = 0.999 * torch.diag(squares) + 1e-3 * g.mT @ g / len(g)
    torch.testing.assert_close(optimizer.state[B]["exp_avg_gram"], wanted, rtol=1e-5, atol=1e-12)


def test_a_partner_that_rests_keeps_its_second_moments(fast_backend):
    """Only the factor that takes AdamW's step loses what is off the diagonal."""
    ((A, B),) = pairs = leaf_pairs(SHAPES[:1], torch.float32)
    optimizer = InvariantAdamW(pairs, lr=1e-2, backend=fast_backend)
    random_grads((A, B), torch.Generator().manual_seed(0))
    optimizer.step()
    kept = optimizer.state[A]["exp_avg_gram"].clone()
    gradient, A.grad = A.grad, None
    with pytest.warns(UserWarning, match="without RefLoRA"):
        optimizer.step()
    A.grad = gradient
    optimizer.step()
    wanted = 0.999 * kept + 1e-3 * gradient.double() @ gradient.double().mT / A.shape[1]
    torch.testing.assert_close(optimizer.state[A]["exp_avg_gram"], wanted, rtol=1e-6, atol=1e-12)
    assert wanted.fill_diagonal_(0).any()


def test_a_lone_gradient_of_float16_factors_loses_no_second_moments(fast_backend):
    """They underflow in float16: a step of A was 70 times as long, and both Grams were lost."""
    ((A, B),) = pairs = leaf_pairs(SHAPES[:1], torch.float16)
    optimizer = InvariantAdamW(pairs, lr=1e-3, weight_decay=0.0, backend=fast_backend)
    generator = torch.Generator().manual_seed(0)
    for number in range(30):
        for t in (A, B):
            t.grad = (1e-4 * torch.randn(t.shape, generator=generator)).half()
        kept, before = optimizer.state[A].get("exp_avg_gram"), A.detach().clone()
        if number == 28:
            B.grad, trace = None, float(kept.trace())
            with pytest.warns(UserWarning, match="without RefLoRA"):
                optimizer.step()
        else:
            optimizer.step()
        if number >= 28:
            assert float((A.detach() - before).float().abs().max()) < 4e-3, number
    assert 0.5 < float(optimizer.state[A]["exp_avg_gram"].trace()) / trace < 100


def test_an_element_that_is_never_finite_does_not_lengthen_steps(fast_backend):
    """The step count goes on, so second moments that stay would shrink without their bias."""
    ((A, B),) = pairs = leaf_pairs([(4, 40, 30)], torch.float32)
    optimizer = InvariantAdamW(pairs, lr=1e-3, weight_decay=0.0, carry_grams=True, backend=fast_backend)
    lengths = []
    for number in range(60):
        random_grads((A, B), torch.Generator().manual_seed(0))
        if number > 4:
            A.grad[0, 0] = torch.inf
        before = A.detach().clone()
        optimizer.step()
        lengths.append(float((A.detach() - before).square().mean().sqrt()))
    assert max(lengths) < 1.2 * min(lengths)


def test_amsgrad_is_refused_for_factors(fast_backend):
    pairs = leaf_pairs(SHAPES, torch.float32)
    (A, B), other = pairs
    plain = torch.ones(3, requires_grad=True)
    with refused("amsgrad: expected False in a group with LoRA factors"):
        InvariantAdamW([{"params": factors(pairs), "amsgrad": True}], pairs=pairs, backend=fast_backend)
    groups = [{"params": factors(pairs)}, {"params": [plain], "amsgrad": True}]
    optimizer = InvariantAdamW(groups, pairs=pairs, backend=fast_backend)
    random_grads([*factors(pairs), plain], torch.Generator().manual_seed(0))
    optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[plain]
    adamw = torch.optim.AdamW([{"params": factors(pairs)}, {"params": [plain]}], amsgrad=True)
    adamw.step()
    with refused("amsgrad: expected False in a group with LoRA factors", of=optimizer):
        optimizer.load_state_dict(adamw.state_dict())
    more = leaf_pairs(SHAPES[:1], torch.float32)
    with refused("amsgrad", of=optimizer):
        optimizer.add_param_group({"params": factors(more), "pairs": more, "amsgrad": True})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[0]["amsgrad"] = True
    with refused("amsgrad: expected False", of=optimizer):
        optimizer.step()


def test_damping_of_any_number_type_is_a_float(fast_backend):
    pairs = leaf_pairs(SHAPES[:1], torch.float32)
    optimizer = InvariantAdamW(pairs, damping=Fraction(1, 1000), backend=fast_backend)
    assert type(optimizer.damping) is float
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.step()
    optimizer.damping = Fraction(1, 300)
    optimizer.step()


def test_degenerate_and_non_finite_layers(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)] * 3, torch.float32)
    pairs[0][1].data[:, 1] = pairs[0][1].data[:, 0]
    optimizer = InvariantAdamW(pairs, lr=1e-2, backend=fast_backend)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    pairs[1][0].grad[0, 0] = torch.nan
    with unchanged(*pairs[1]):
        optimizer.step()
    assert optimizer.diagnostics().status.tolist() == [DEGENERATE, SKIPPED, REFACTORED]
    assert all(not optimizer.state[t]["exp_avg_gram"].any() for t in pairs[1])
    assert all(t.isfinite().all() for t in factors(pairs))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_bad_options_are_refused(backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    for options in ({"metric": "riemannian"}, {"moments": None}, {"damping": 0.0}, {"damping": 2}, {"metric": 3}):
        with refused(next(iter(options))):
            InvariantAdamW(pairs, backend=backend, **options)


def test_create_reflora_optimizer_builds_it(fast_backend):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = create_reflora_optimizer(model, InvariantAdamW, lr=1e-2, metric="scaled", backend=fast_backend)
    assert type(optimizer) is InvariantAdamW and optimizer.metric == "scaled" and len(optimizer.pairs) == 1
    for cls in (InvariantAdamW, RiemannianAdamW):
        with refused(f"interval: expected its default with {cls.__name__}, got 2", error=TypeError):
            create_reflora_optimizer(model, cls, lr=1e-2, interval=2)


def test_carried_grams_resume_exactly_and_are_the_fresh_ones(fast_backend):
    """Neither a reload nor a write that makes the Grams stale shows in the bits."""
    ones = leaf_pairs(SHAPES, torch.float32)
    others = clones(ones)
    options = {"lr": 1e-2, "carry_grams": True, "backend": fast_backend}
    a, b = InvariantAdamW(ones, **options), InvariantAdamW(others, **options)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        if number == 3:
            b.load_state_dict(copy.deepcopy(a.state_dict()))
        b.invalidate()
        step_alike(ones, a, others, b, generator)
        assert all(torch.equal(t, other) for t, other in zip(factors(ones), factors(others)))


def test_carried_grams_are_used(fast_backend):
    """A write that autograd does not see goes unseen until `invalidate`; torch's backend reads the factors anew."""
    if fast_backend == "torch":
        pytest.skip("nothing is carried")
    unseen = leaf_pairs(SHAPES, torch.float32)
    told = clones(unseen)
    steppers = [InvariantAdamW(pairs, carry_grams=True, backend=fast_backend) for pairs in (unseen, told)]
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        random_grads(factors(unseen), generator)
        for t, other in zip(factors(unseen), factors(told)):
            other.grad = t.grad.clone()
        if number == 2:
            unseen[0][1].data.mul_(2), told[0][1].data.mul_(2)
            steppers[1].invalidate()
        for stepper in steppers:
            stepper.step()
    assert not torch.equal(unseen[0][0], told[0][0]) and torch.equal(unseen[1][0], told[1][0])
