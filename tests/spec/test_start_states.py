"""RefLoRA's start in a run: exact on resume, the same by every way in, and across changes of its options."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from start_cases import WAYS, crossing_pairs, drifting, start_of, trained
from toys import clones, factors, leaf_pairs, random_grads

import reflora
from reflora import RefLoRAAdamW, constants
from reflora import columns as col
from reflora.columns import PLAIN
from reflora.optim import wrapper

DOUBLE = torch.float64


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("kind", WAYS)
def test_a_resumed_run_has_the_same_bits(backend, kind, scalar):
    """In the middle of the start; B is 0 at the first of these steps."""
    make = functools.partial(WAYS[kind], lr=0.1, scalar=scalar, backend=backend)
    half, whole = (10, 14) if backend == "triton" else (30, 60)
    pairs = start_of()
    optimizer = make(pairs)
    trained(optimizer, pairs, (0, half), drift=1.0)
    kept = copy.deepcopy(optimizer.state_dict())
    assert {float(optimizer.state[A]["reflora_phase"]) for A, _ in pairs} == {col.BALANCED if scalar else 0}
    resumed = clones(pairs)
    trained(optimizer, pairs, (half, whole), drift=1.0)
    again = make(resumed)
    again.load_state_dict(kept)
    trained(again, resumed, (half, whole), drift=1.0)
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


def side_by_side(named, name, steps, since=0, **options):
    """An entry of the state after the same steps both ways, which agree; pairs after the first train from `since`."""
    ends, entries = [], []
    for make in WAYS.values():
        pairs = clones([(p.A, p.B) for p in named])
        optimizer = make(pairs, **options)
        for step in range(steps):
            torch.manual_seed(step)
            for number, (pair, grads) in enumerate(zip(pairs, drifting(named))):
                for p, g in zip(pair, grads):
                    p.grad = g if number == 0 or step >= since else None
            optimizer.step()
        ends.append(factors(pairs))
        entries.append([float(optimizer.state[A][name]) for A, _ in pairs])
    for p, q in zip(*ends):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert entries[0] == entries[1]
    return entries[0]


def test_wrapped_refloras_starts_as_the_fused_one(fast_backend):
    phases = side_by_side(crossing_pairs(DOUBLE), "reflora_phase", 30, lr=2e-2, scalar=True, backend=fast_backend)
    assert phases[0] == col.BALANCED


def test_sgd_keeps_the_scale_of_S(fast_backend):
    """Its steps grow with the gradient: there the default is the paper's S."""
    ours = leaf_pairs([(4, 30, 21)])
    theirs = clones(ours)
    SGD = reflora.wrap(torch.optim.SGD)
    default = SGD(factors(ours), pairs=ours, lr=1e-3, backend=fast_backend)
    exact = SGD(factors(theirs), pairs=theirs, lr=1e-3, backend=fast_backend, warmup_steps=0)
    trained(default, ours, (0, 5))
    trained(exact, theirs, (0, 5))
    assert all(torch.equal(p, q) for p, q in zip(factors(ours), factors(theirs)))


@pytest.mark.parametrize("kind", WAYS)
def test_steps_that_are_not_yet_balanced_are_reported_as_plain(fast_backend, kind):
    pairs = start_of()
    optimizer = WAYS[kind](pairs, lr=1e-4, scalar=True, backend=fast_backend)
    trained(optimizer, pairs, (0, 2))
    assert optimizer.diagnostics().status.tolist() == [PLAIN, PLAIN]
    assert constants.START_STEPS == 400


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
        for _ in range(2):
            random_grads(factors(pairs), torch.Generator().manual_seed(0))
            optimizer.step()
            if "reflora_steps" in optimizer.state[A]:
                optimizer.state[A]["reflora_steps"].fill_(1e9)  # past the start: the exact S
        sizes.append([float(A.grad.norm()), float(B.grad.norm())])
        state = optimizer.state_dict()
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


class Averaged(torch.optim.AdamW):
    """With an entry of its own in the state, whose unit nobody knows."""

    def step(self, closure=None):
        loss = super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p].setdefault("average", p.detach().clone()).lerp_(p.detach(), 0.1)
        return loss


def test_a_class_with_state_of_its_own_resumes():
    """Nothing is moved by default, so nothing has to be known of it."""
    pairs = start_of()
    again = clones(pairs)
    first, second = (reflora.wrap(Averaged)(factors(own), pairs=own, lr=1e-2) for own in (pairs, again))
    trained(first, pairs, (0, 6))
    trained(second, again, (0, 3))
    state = copy.deepcopy(second.state_dict())
    second = reflora.wrap(Averaged)(factors(again), pairs=again, lr=1e-2)
    second.load_state_dict(state)
    trained(second, again, (3, 6))
    assert all(torch.equal(p, q) for p, q in zip(factors(pairs), factors(again)))


UNITS = {"RefLoRA-S": dict(scalar=True), "a warm-up": dict(warmup_steps=10**6), "the default": {}}


@pytest.mark.parametrize("options", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapped_moments_of_c_S_are_moved_back(options, dtype):
    """As those of the fused optimizer are, whatever the run goes on with."""
    pairs = [(A.detach().to(dtype), (0.003 * B.detach()).to(dtype)) for A, B in leaf_pairs([(4, 30, 21)])]
    (A, B) = pairs[0][0].requires_grad_(), pairs[0][1].requires_grad_()
    frozen = dict(lr=0.0, weight_decay=0.0, pairs=[(A, B)])
    moments = []
    for cls in (RefLoRAAdamW, reflora.wrap(torch.optim.AdamW)):
        exact = cls([A, B], **frozen, warmup_steps=0)
        random_grads([A, B], torch.Generator().manual_seed(0))
        exact.step()
        assert float(exact.state[A]["reflora_phase"]) == 1
        c = float(B.detach().double().norm() / A.detach().double().norm())
        wanted = [0.9 * exact.state[A]["exp_avg"].double() * c, 0.9 * exact.state[B]["exp_avg"].double() / c]
        goes_on = cls([A, B], **frozen, **options)
        goes_on.load_state_dict(copy.deepcopy(exact.state_dict()))
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        B.grad.view(-1)[0] = 1e-30  # a step, though of nothing
        goes_on.step()
        assert float(goes_on.state[A]["reflora_phase"]) == 0
        moments.append([goes_on.state[factor]["exp_avg"].double() for factor in (A, B)])
        rtol = 1e-6 if dtype == torch.float32 else 1e-2
        for got, want in zip(moments[-1], wanted):
            assert (got - want).norm() <= rtol * want.norm(), cls


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_wrapped_pair_that_joins_late_starts_gently(backend, interval):
    """Each pair counts its own steps, as in the fused optimizer; the second trains from step 40 on."""
    options = {"lr": 1e-3, "interval": interval, "backend": backend}
    assert side_by_side(crossing_pairs(DOUBLE)[:2], "reflora_steps", 60, since=40, **options) == [60, 20]


@pytest.mark.parametrize("kind", WAYS)
def test_full_steps_end_the_balance(backend, kind):
    """A state that goes from RefLoRA-S to the full RefLoRA and back waits for its norms again."""
    pairs = start_of()
    for A, B in pairs:
        A.data.mul_(3), B.data.normal_()
    A = pairs[0][0]
    scalar, full = (WAYS[kind](pairs, lr=1e-4, scalar=scalar, backend=backend) for scalar in (True, False))
    trained(scalar, pairs, (0, 1))
    scalar.state[A]["reflora_phase"] = torch.tensor([float(col.BALANCED)])
    phases = []
    for optimizer, state in ((scalar, None), (full, scalar), (scalar, full)):
        if state:
            optimizer.load_state_dict(state.state_dict())
        random_grads(factors(pairs), torch.Generator().manual_seed(0))
        A.data.mul_(2)  # away from balance
        optimizer.step()
        phases.append(float(optimizer.state[A]["reflora_phase"]))
    assert phases == [col.BALANCED, 0, 0]


def test_a_pair_with_nan_keeps_its_partner(fast_backend):
    """A wrapped state in units of c S, and a factor that is not finite: the pair is skipped, not overwritten by NaN."""
    pairs = leaf_pairs([(4, 30, 21)])
    (A, B), cls = pairs[0], reflora.wrap(torch.optim.AdamW)
    exact = cls(factors(pairs), pairs=pairs, lr=1e-3, warmup_steps=0, backend=fast_backend)
    trained(exact, pairs, (0, 3))
    gentle = cls(factors(pairs), pairs=pairs, lr=1e-3, backend=fast_backend)
    gentle.load_state_dict(exact.state_dict())
    A.data[0, 0] = torch.nan
    trained(gentle, pairs, (0, 1))
    assert B.isfinite().all() and A.isfinite().sum() == A.numel() - 1
    assert float(gentle.state[A]["reflora_phase"]) == 1


def test_16_bit_norms_are_equal_within_a_power_of_two(backend):
    """Where sqrt(s) is a power of two they are as balanced as they can be: an adapter of RefLoRA-S goes on as one."""
    pairs = leaf_pairs([(4, 30, 21)], torch.bfloat16)
    ((A, B),) = pairs
    with torch.no_grad():
        B.mul_(0.6 * A.float().norm() / B.float().norm())
    optimizer = RefLoRAAdamW(pairs, lr=1e-4, scalar=True, backend=backend)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.step()
    assert float(optimizer.state[A]["reflora_phase"]) == col.BALANCED


def test_a_wrapped_step_stores_only_what_is_new(monkeypatch):
    """The first step makes the entries; later ones count in place, and need not look at every parameter again."""
    pairs, held = start_of(), []
    monkeypatch.setattr(wrapper.Wrapped, "_hold_places", lambda self: held.append(1))
    optimizer = reflora.wrap(torch.optim.AdamW)(factors(pairs), pairs=pairs, lr=1e-3)
    trained(optimizer, pairs, (0, 5))
    assert len(held) == 1 and all(float(optimizer.state[A]["reflora_steps"]) == 5 for A, _ in pairs)
