"""RefLoRA's start from B = 0: no collapse, alike on every backend, exact on resume, and what users get by default."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import spectrum_pair
from kernel_cases import Fused, Oracle, pair, randn
from toys import factors, leaf_pairs, random_grads

import reflora
from reflora import LoRAPair, RefLoRAAdamW, contract, reference
from reflora import plan as col
from reflora.backends import FRESH, load
from reflora.contract import PLAIN, START_STEPS
from reflora.plan import Plan

DOUBLE = torch.float64
RANK, WIDTHS, STEPS, RATE = 8, (48, 64), 200, 1e-2


# ---- the collapse, and that it is gone


def fine_tune(make, seed: int) -> tuple[float, float]:
    """(held-out loss over that of no training, stable rank of B A) after 200 steps from B = 0.

    A linear layer learns a map of 16 equal singular values from inputs with a common mean, as tokens have: the first
    gradient is nearly of rank one.
    """
    draw = torch.Generator().manual_seed(seed)
    (n_out, n_in), rank = WIDTHS, RANK
    left, right = (torch.linalg.qr(torch.randn(n, 16, generator=draw)).Q for n in WIDTHS)
    goal, mean = left @ right.mT, 2 * torch.randn(n_in, 1, generator=draw)
    A = ((2 * torch.rand(rank, n_in, generator=draw) - 1) / n_in**0.5).requires_grad_()
    B = torch.zeros(n_out, rank, requires_grad=True)
    optimizer = make([(A, B)])
    for step in range(STEPS):
        inputs = torch.randn(n_in, 32, generator=draw) + mean
        ((B @ A - goal) @ inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
    inputs = torch.randn(n_in, 4096, generator=draw) + mean
    values = torch.linalg.svdvals((B @ A).detach())
    loss = ((B @ A - goal) @ inputs).square().mean() / (goal @ inputs).square().mean()
    return float(loss.detach()), float(values.square().sum() / values[0].square())


def adamw(pairs):
    return torch.optim.AdamW(factors(pairs), lr=RATE)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_exact_S_collapses_from_B_0_and_the_default_does_not(fast_backend, scalar, seed):
    options = {"lr": RATE, "scalar": scalar, "backend": fast_backend}
    lora, rank_of_lora = fine_tune(adamw, seed)
    exact, rank_of_exact = fine_tune(lambda pairs: RefLoRAAdamW(pairs, warmup_steps=0, **options), seed)
    gentle, rank = fine_tune(lambda pairs: RefLoRAAdamW(pairs, **options), seed)
    assert exact > 1.1 * lora and rank_of_exact < 0.75 * rank_of_lora
    assert gentle < 1.005 * lora and rank > 0.97 * rank_of_lora


def test_it_is_no_worse_than_100_plain_steps(fast_backend):
    for seed in range(3):
        plain, _ = fine_tune(lambda p: RefLoRAAdamW(p, lr=RATE, warmup_steps=100, backend=fast_backend), seed)
        gentle, _ = fine_tune(lambda p: RefLoRAAdamW(p, lr=RATE, backend=fast_backend), seed)
        assert gentle < 1.01 * plain


# ---- the mathematics


@pytest.mark.parametrize("weight", [0.0, 0.06, 0.5, 0.99, 1.0])
def test_shrunk_grams_are_means_of_the_gram_and_a_multiple_of_I(weight):
    A, B = spectrum_pair(5, 20, 31, 3.0, 1e3)
    own_A, own_B = reference.shrunk(A, B, weight)
    for G, own in ((A @ A.mT, own_A @ own_A.mT), (B.mT @ B, own_B.mT @ own_B)):
        eye = torch.eye(5, dtype=DOUBLE)
        torch.testing.assert_close(own, weight * G + (1 - weight) * torch.trace(G) / 5 * eye, rtol=1e-12, atol=1e-14)


def test_the_weight_rises_from_0_to_1():
    assert reference.shrink_weight(0, 400) == 0.0 and reference.shrink_weight(400, 400) == 0.5
    assert reference.shrink_weight(40_000, 400) > 0.9998


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.8, 1.0])
def test_the_shrunk_S_has_the_symmetries_of_S(weight):
    """Swapping the factors inverts it, an orthogonal change of basis carries it along, and no scale matters."""
    A, B = spectrum_pair(6, 20, 31, 3.0, 50.0)
    S, S_inv, _ = reference.choose(A, B, weight=weight)
    eye = torch.eye(6, dtype=DOUBLE)
    torch.testing.assert_close(S @ S_inv, eye, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference.choose(B.mT, A.mT, weight=weight)[0], S_inv, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference.choose(3 * A, B / 7, weight=weight)[0], S, rtol=1e-9, atol=1e-9)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    torch.testing.assert_close(reference.choose(Q.mT @ A, B @ Q, weight=weight)[0], Q.mT @ S @ Q, rtol=1e-9, atol=1e-9)
    if weight == 0:
        torch.testing.assert_close(S, eye, rtol=0, atol=1e-12)
    if weight == 1:
        torch.testing.assert_close(S * reference.balance_scalar(A, B), reference.refactoring(A, B).S)


def test_S_of_a_B_of_rank_one_is_bounded():
    """Where the exact S does not exist: its condition is at most sqrt(1 + r w / (1 - w)) of either Gram."""
    A, _ = spectrum_pair(8, 40, 30, 2.0, 2.0)
    B = torch.randn(30, 1, dtype=DOUBLE) @ torch.randn(1, 8, dtype=DOUBLE)
    for weight in (0.0, 0.1, 0.5):
        S, _, why = reference.choose(A, B, weight=weight)
        values = torch.linalg.eigvalsh(S)
        assert why == "refactored" and values[-1] / values[0] <= 1 + 8 * weight / (1 - weight) + 1e-9


# ---- every backend against the reference


def start_pairs(dtype):
    return [
        pair(4, 3, 30, dtype, 50, 61),
        pair(9, 3, 1e3, dtype, 33, 20),
        LoRAPair("zero B", randn(3, 40, dtype=dtype), 0 * randn(30, 3, dtype=dtype)),
        LoRAPair("rank 1", randn(4, 30, dtype=dtype), randn(20, 1, dtype=dtype) @ randn(1, 4, dtype=dtype)),
        LoRAPair("n < r", randn(6, 4, dtype=dtype), randn(25, 6, dtype=dtype)),
        LoRAPair("experts", randn(2 * 3, 21, dtype=dtype), randn(17, 3 * 2, dtype=dtype), "experts(2)"),
    ]


@pytest.mark.parametrize("dtype, rtol", [(DOUBLE, 1e-9), (torch.float32, 2e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("count", [0, 1, 60, 5000])
def test_a_step_of_the_start(backend, dtype, rtol, count):
    pairs = start_pairs(dtype)[0 if backend != "triton" or dtype == DOUBLE else 2 :]
    fused = Fused(pairs, [dict(lr=1e-2), dict(lr=3e-2, weight_decay=0.1)], load(backend))
    oracle = Oracle(fused)
    for _ in range(2):
        grads = [(torch.randn_like(p.A), torch.randn_like(p.B)) for p in pairs]
        fused.step(grads, FRESH, count=count, start=START_STEPS)
        oracle.step(grads, FRESH, weight=reference.shrink_weight(count, START_STEPS))
        oracle.check(rtol)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.999])
def test_preconditioning_with_a_weight(backend, weight):
    pairs = start_pairs(torch.float32)
    grads = [(torch.randn_like(p.A), torch.randn_like(p.B)) for p in pairs]
    wanted = []
    for p, (gA, gB) in zip(pairs, grads):
        views = zip(p.views_A(p.A), p.views_B(p.B), p.views_A(gA.clone()), p.views_B(gB.clone()))
        wanted.append([reference.precondition(*(t.cpu() for t in view), weight=weight) for view in views])
    plan = Plan(pairs)
    plan.bind_grads(grads)
    load(backend).precondition(plan, False, "float64", weight)
    for p, (gA, gB), each in zip(pairs, grads, wanted):
        for view_A, view_B, (want_A, want_B) in zip(p.views_A(gA), p.views_B(gB), each):
            for got, want in ((view_A, want_A), (view_B, want_B)):
                assert (got.double().cpu() - want).norm() <= 2e-5 * want.norm(), p.name


def crossing_pairs(dtype):
    """Norms that meet within a few steps from below and from above, in one jump, and not at all."""
    return [
        LoRAPair("B grows", 0.03 * randn(3, 20, dtype=dtype), 0 * randn(25, 3, dtype=dtype)),
        LoRAPair("A grows", 0 * randn(4, 20, dtype=dtype), 0.03 * randn(25, 4, dtype=dtype)),
        LoRAPair("jump", 1e-3 * randn(2, 20, dtype=dtype), 0 * randn(25, 2, dtype=dtype)),
        LoRAPair("never", 9 * randn(3, 20, dtype=dtype), 0 * randn(25, 3, dtype=dtype)),
        LoRAPair("equal", randn(3, 20, dtype=dtype), randn(20, 3, dtype=dtype)),
    ]


def drifting(pairs):
    """Gradients under which the factor that was 0 grows step by step, and the other one wanders."""
    return [
        (torch.randn_like(p.A) + (p.name == "A grows"), torch.randn_like(p.B) + (p.name != "A grows")) for p in pairs
    ]


@pytest.mark.parametrize("interval", [1, 3])
def test_refloras_begins_where_the_norms_meet(backend, interval):
    """Against a plain writing of it in float64; a pair stays balanced once it has begun."""
    pairs = crossing_pairs(DOUBLE)
    options = [dict(lr=2e-2), dict(lr=2e-2)]
    fused = Fused(pairs, options, load(backend))
    oracle = Oracle(fused)
    for step in range(9):
        grads = drifting(pairs)
        fused.step(grads, FRESH, scalar_after=True, count=step, start=START_STEPS, interval=interval)
        due = (step + 1) % interval == 0
        oracle.step(grads, FRESH, scalar_after=True, scalar_start=True, scalar_due=due)
        oracle.check(1e-9)
    begun = [float(phases[0]) == col.BALANCED for phases in fused.state[col.PHASE]]
    assert begun[:4] == [True, True, True, False]
    for p, on in list(zip(pairs, begun))[:3]:
        assert not on or interval > 1 or abs(float(p.A.norm() / p.B.norm()) - 1) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refloras_begins_in_16_bits_too(fast_backend, dtype):
    A, B = (0.05 * torch.randn(4, 40)).to(dtype), torch.zeros(30, 4, dtype=dtype)
    optimizer = RefLoRAAdamW([(A.requires_grad_(), B.requires_grad_())], lr=1e-2, scalar=True, backend=fast_backend)
    for _ in range(60):
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B) + 1
        optimizer.step()
    assert float(optimizer.state[A]["reflora_phase"]) == col.BALANCED
    assert 0.45 < float((B.float().norm() / A.float().norm()).detach()) < 2.2


# ---- resume, and the other ways in


def trained(optimizer, pairs, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps[1]):
        random_grads(factors(pairs), generator)
        if step >= steps[0]:
            optimizer.step()


def start_of(dtype=torch.float32):
    return [(A, B.detach().zero_().requires_grad_()) for A, B in leaf_pairs([(4, 30, 21), (3, 10, 17)], dtype)]


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("kind", ["RefLoRAAdamW", "wrap"])
def test_a_resumed_run_has_the_same_bits(backend, kind, scalar):
    """In the middle of the start; B is 0 at the first of these steps."""

    def make(pairs):
        if kind == "wrap":
            cls = reflora.wrap(torch.optim.AdamW)
            return cls(factors(pairs), pairs=pairs, lr=2e-2, scalar=scalar, backend=backend)
        return RefLoRAAdamW(pairs, lr=2e-2, scalar=scalar, backend=backend)

    half, whole = (3, 6) if backend == "triton" else (30, 60)
    pairs = start_of()
    optimizer = make(pairs)
    trained(optimizer, pairs, (0, half))
    kept = copy.deepcopy(optimizer.state_dict())
    resumed = [tuple(t.detach().clone().requires_grad_() for t in pair) for pair in pairs]
    trained(optimizer, pairs, (half, whole))
    again = make(resumed)
    again.load_state_dict(kept)
    trained(again, resumed, (half, whole))
    assert all(torch.equal(p, q) for p, q in zip(factors(pairs), factors(resumed)))


DEFAULTS = {
    "RefLoRAAdamW": lambda model, pairs: RefLoRAAdamW(model.parameters(), pairs=pairs, lr=1e-2),
    "create_reflora_optimizer": lambda model, pairs: reflora.create_reflora_optimizer(model, lr=1e-2),
    "of a class": lambda model, pairs: reflora.create_reflora_optimizer(
        model, reflora.wrap(torch.optim.AdamW), lr=1e-2
    ),
    "Trainer's factory": lambda model, pairs: reflora.OptimizerFactory()(model, lr=1e-2),
    "wrap": lambda model, pairs: reflora.wrap(torch.optim.AdamW)(model.parameters(), pairs=pairs, lr=1e-2),
    "GradientHooks": lambda model, pairs: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "exact": lambda model, pairs: RefLoRAAdamW(model.parameters(), pairs=pairs, lr=1e-2, warmup_steps=0),
    "LoRA": lambda model, pairs: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


def ten_steps(kind: str) -> torch.Tensor:
    """B A after ten steps from B = 0; the parameters that train are those of a PEFT layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(24, 20)), LoraConfig(r=4, target_modules=["0"]))
    pairs = reflora.find_pairs(model)
    optimizer = DEFAULTS[kind](model, pairs)
    hooks = reflora.GradientHooks(model) if kind == "GradientHooks" else None
    for _ in range(10):
        optimizer.zero_grad()
        (model(torch.randn(32, 24) + 1) - 1).square().mean().backward()
        optimizer.step()
        if hooks:
            hooks.refresh()
    return (pairs[0].B @ pairs[0].A).detach()


@pytest.mark.parametrize("kind", [kind for kind in DEFAULTS if kind not in ("exact", "LoRA")])
def test_whoever_does_nothing_gets_the_gentle_start(kind):
    lora, exact, ours = ten_steps("LoRA"), ten_steps("exact"), ten_steps(kind)
    assert (exact - lora).norm() > 0.05 * lora.norm() and 0 < (ours - lora).norm() < 0.005 * lora.norm()


def test_wrapped_adamw_starts_as_the_fused_one(fast_backend):
    ours = start_of(DOUBLE)
    theirs = [tuple(t.detach().clone().requires_grad_() for t in pair) for pair in ours]
    fused = RefLoRAAdamW(ours, lr=1e-2, backend=fast_backend)
    wrapped = reflora.wrap(torch.optim.AdamW)(factors(theirs), pairs=theirs, lr=1e-2, backend=fast_backend)
    trained(fused, ours, (0, 50))
    trained(wrapped, theirs, (0, 50))
    for p, q in zip(factors(ours), factors(theirs)):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_wrapped_refloras_starts_as_the_fused_one(fast_backend):
    named = crossing_pairs(DOUBLE)
    ours = [(p.A.requires_grad_(), p.B.requires_grad_()) for p in named]
    theirs = [tuple(t.detach().clone().requires_grad_() for t in pair) for pair in ours]
    fused = RefLoRAAdamW(ours, lr=2e-2, scalar=True, backend=fast_backend)
    wrapped = reflora.wrap(torch.optim.AdamW)(factors(theirs), pairs=theirs, lr=2e-2, scalar=True, backend=fast_backend)
    for _ in range(30):
        grads = [g for both in drifting(named) for g in both]
        for own, optimizer in ((ours, fused), (theirs, wrapped)):
            for p, g in zip(factors(own), grads):
                p.grad = g.clone()
            optimizer.step()
    for p, q in zip(factors(ours), factors(theirs)):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    phases = [[float(opt.state[A]["reflora_phase"]) for A, _ in own] for opt, own in ((fused, ours), (wrapped, theirs))]
    assert phases[0] == phases[1] and phases[0][0] == col.BALANCED


def test_sgd_keeps_the_scale_of_S(fast_backend):
    """Its steps grow with the gradient: there the default is the paper's S."""
    ours, theirs = leaf_pairs([(4, 30, 21)]), None
    theirs = [tuple(t.detach().clone().requires_grad_() for t in pair) for pair in ours]
    SGD = reflora.wrap(torch.optim.SGD)
    default = SGD(factors(ours), pairs=ours, lr=1e-3, backend=fast_backend)
    exact = SGD(factors(theirs), pairs=theirs, lr=1e-3, backend=fast_backend, warmup_steps=0)
    trained(default, ours, (0, 5))
    trained(exact, theirs, (0, 5))
    assert all(torch.equal(p, q) for p, q in zip(factors(ours), factors(theirs)))


def test_a_state_in_units_of_c_S_is_moved_back(fast_backend):
    """A run with the paper's S that goes on with the default: the moments stay those of the same gradients."""
    pairs = leaf_pairs([(4, 30, 21)])
    (A, B), scale = pairs[0], None
    exact = RefLoRAAdamW(pairs, lr=0.0, weight_decay=0.0, warmup_steps=0, backend=fast_backend)
    trained(exact, pairs, (0, 5))
    assert float(exact.state[A]["reflora_phase"]) == 1
    gentle = RefLoRAAdamW(pairs, lr=0.0, weight_decay=0.0, backend=fast_backend)
    gentle.load_state_dict(exact.state_dict())
    gentle.state[A]["reflora_steps"].fill_(1e9)  # the exact S over c, from here on
    before = exact.state[B]["exp_avg"].clone()
    B.grad, A.grad = torch.zeros_like(B), torch.zeros_like(A)
    gentle.step()
    scale = float(B.detach().norm() / A.detach().norm())
    assert float(gentle.state[A]["reflora_phase"]) == 0
    torch.testing.assert_close(gentle.state[B]["exp_avg"], 0.9 * before / scale, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("given", [-1, 1.5, True, "0", 2**31])
def test_warmup_steps_of_a_wrong_kind_are_refused(given):
    pairs = leaf_pairs([(2, 5, 6)])
    for cls in (RefLoRAAdamW, reflora.wrap(torch.optim.AdamW)):
        with pytest.raises(ValueError, match="warmup_steps: expected .*, got"):
            cls(factors(pairs), pairs=pairs, warmup_steps=given)


def test_steps_that_are_not_yet_balanced_are_reported_as_plain(fast_backend):
    pairs = start_of()
    optimizer = RefLoRAAdamW(pairs, lr=1e-4, scalar=True, backend=fast_backend)
    trained(optimizer, pairs, (0, 2))
    assert optimizer.diagnostics().status.tolist() == [PLAIN, PLAIN]
    assert contract.START_STEPS == 400


# ---- what a reviewer found


def test_a_step_without_one_gradient_does_not_end_the_balance(fast_backend):
    pairs = start_of()
    optimizer = RefLoRAAdamW(pairs, lr=2e-2, scalar=True, backend=fast_backend)
    A, B = pairs[0]
    optimizer.state[A]["reflora_phase"] = torch.tensor([float(col.BALANCED)])
    A.grad, B.grad = None, torch.randn_like(B)
    optimizer.step()
    assert float(optimizer.state[A]["reflora_phase"]) == col.BALANCED


def test_equal_norms_have_met_whatever_rounding_says(backend):
    """As those of an adapter that has been balanced."""
    pairs = []
    for _ in range(4):
        A = torch.randn(3, 20)
        pairs.append((A.requires_grad_(), A.detach()[:, torch.randperm(20)].mT.contiguous().requires_grad_()))
    optimizer = RefLoRAAdamW(pairs, lr=1e-3, scalar=True, backend=backend)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.step()
    assert all(float(optimizer.state[A]["reflora_phase"]) == col.BALANCED for A, _ in pairs)


def test_a_full_state_goes_on_as_refloras_in_units_of_I(backend):
    """Moments of c S are moved back at once, and the pair waits for its norms like any other."""
    pairs = [(0.9 * A.detach(), 0.01 * B.detach()) for A, B in leaf_pairs([(4, 30, 21)])]
    pairs = [(A.requires_grad_(), B.requires_grad_()) for A, B in pairs]
    (A, B), generator = pairs[0], torch.Generator().manual_seed(0)
    full = RefLoRAAdamW(pairs, lr=0.0, weight_decay=0.0, warmup_steps=0, backend=backend)
    random_grads(factors(pairs), generator)
    full.step()
    scale = float(B.detach().norm() / A.detach().norm())
    before = full.state[A]["exp_avg"].clone(), full.state[B]["exp_avg"].clone()
    for warmup_steps, phase in ((None, 0), (10**6, 0)):
        scalar = RefLoRAAdamW(pairs, lr=0.0, weight_decay=0.0, scalar=True, warmup_steps=warmup_steps, backend=backend)
        scalar.load_state_dict(copy.deepcopy(full.state_dict()))
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        scalar.step()
        assert float(scalar.state[A]["reflora_phase"]) == phase
        for factor, old, unit in ((A, before[0], scale), (B, before[1], 1 / scale)):
            torch.testing.assert_close(scalar.state[factor]["exp_avg"], 0.9 * old * unit, rtol=1e-9, atol=0)


@pytest.mark.parametrize("turns", [(None, 0), (0, None)])
def test_gradients_in_front_of_a_state_that_cannot_be_moved_keep_their_size(turns):
    """RMSprop's state is nobody's to move: a change of warmup_steps on a loaded state must not change its unit."""
    pairs = [(A, (0.01 * B.detach()).requires_grad_()) for A, B in leaf_pairs([(4, 30, 21)])]
    (A, B), sizes, state = pairs[0], [], None
    for warmup_steps in turns:
        cls = reflora.wrap(torch.optim.RMSprop)
        optimizer = cls(factors(pairs), pairs=pairs, lr=0.0, warmup_steps=warmup_steps)
        if state:
            optimizer.load_state_dict(state)
            optimizer.param_groups[0]["reflora_steps"] = 10**9  # past the start: the exact S
        else:
            optimizer.param_groups[0]["reflora_steps"] = 10**9
        random_grads(factors(pairs), torch.Generator().manual_seed(0))
        optimizer.step()
        sizes.append([float(A.grad.norm()), float(B.grad.norm())])
        state = optimizer.state_dict()
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


def test_wrapped_pairs_that_wait_are_reported_as_plain():
    pairs = start_of()
    optimizer = reflora.wrap(torch.optim.AdamW)(factors(pairs), pairs=pairs, lr=1e-4, scalar=True)
    trained(optimizer, pairs, (0, 2))
    assert optimizer.diagnostics().status.tolist() == [PLAIN, PLAIN]
