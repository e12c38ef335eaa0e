"""RefLoRAAdamW against what it must equal (AdamW, the published algorithm), and that nothing jolts Adam."""

import functools

import pytest
import torch
from toys import backward, clones, factors, leaf_pairs, step_sizes, targets, worst_jolt

from benchmarks.baselines import published_reflora as published
from reflora import RefLoRAAdamW, constants

TWENTY = [(r, 20 + 3 * i, 45 - i) for i, r in enumerate([1, 2, 4, 8, 12] * 4)]


def test_ten_steps_of_the_published_algorithm(fast_backend):
    """Preconditioning before torch's AdamW, 20 random pairs in float64: the same weights."""
    ours = leaf_pairs(TWENTY)
    theirs, goals = clones(ours), targets(ours)
    a = RefLoRAAdamW(ours, lr=1e-2, warmup_steps=0, backend=fast_backend)
    b = torch.optim.AdamW(factors(theirs), lr=1e-2)
    for _ in range(10):
        backward(ours, goals), backward(theirs, goals)
        a.step()
        published.precondition_(theirs)
        b.step()
        assert a.diagnostics().refactored == len(ours)
    for p, q in zip(factors(ours), factors(theirs)):
        assert (p - q).abs().max() <= 1e-10


def test_ten_steps_of_the_published_scalar_algorithm(fast_backend):
    """RefLoRA-S: the first refactor is lazy here, so products agree, from the first step on."""
    ours = leaf_pairs(TWENTY)
    theirs, goals = clones(ours), targets(ours)
    a = RefLoRAAdamW(ours, lr=1e-2, scalar=True, warmup_steps=0, backend=fast_backend)
    b = torch.optim.AdamW(factors(theirs), lr=1e-2)
    published.refactor_scalar_(theirs, b)
    for _ in range(10):
        backward(ours, goals), backward(theirs, goals)
        a.step()
        b.step()
        published.refactor_scalar_(theirs, b)
        for (A, B), (A2, B2) in zip(ours, theirs):
            assert (B @ A - B2 @ A2).abs().max() <= 1e-10


def test_the_published_schedule(fast_backend):
    """S = I for warmup_steps, then fresh every `interval` steps, and reused between."""
    pairs = leaf_pairs([(4, 30, 21)])
    A, goals = pairs[0][0], targets(pairs)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, interval=3, warmup_steps=2, backend=fast_backend)
    saved = []
    for _ in range(9):
        backward(pairs, goals)
        optimizer.step()
        saved.append(optimizer.state[A]["reflora_S"].clone())
    assert not saved[0].any() and not saved[1].any()  # none yet
    changed = [not torch.equal(x, y) for x, y in zip(saved, saved[1:])]
    assert changed == [False, True, False, False, True, False, False, True]


@pytest.mark.parametrize("scalar", [False, True])
def test_trains_from_peft_start(fast_backend, scalar):
    """B = 0 and no warm-up, where the published code goes dead (full) or NaN (scalar): bench/test_benchmarks.py."""
    pairs, goal = [(torch.randn(8, 60) / 60**0.5, torch.zeros(50, 8))], [torch.randn(50, 60)]
    for t in factors(pairs):
        t.requires_grad_()
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, scalar=scalar, warmup_steps=0, backend=fast_backend)
    start = backward(pairs, goal)
    for _ in range(60):
        loss = backward(pairs, goal)
        optimizer.step()
    assert loss < 0.8 * start


def warmed_up(A, B, warmup_steps=60):
    return RefLoRAAdamW([(A, B)], lr=1e-3, warmup_steps=warmup_steps, weight_decay=0.0, backend="cpp")


def test_leaving_the_warm_up_does_not_jolt_adam():
    sizes, _ = step_sizes(warmed_up)
    assert worst_jolt(sizes[59:61]) < 1.1 and worst_jolt(sizes[59:]) < 1.25

    def pretend_that_moments_were_moved(step, optimizer):
        if step == 60:
            optimizer.state[optimizer.pairs[0].A]["reflora_phase"].fill_(1)

    # and what the transport is there for: without it the steps are off by a factor of several for 30 steps and more
    untransported, _ = step_sizes(warmed_up, pretend_that_moments_were_moved)
    assert worst_jolt(untransported[59:]) > 2


def test_leaving_a_degenerate_phase_does_not_jolt_adam(monkeypatch):
    real = constants.KAPPA_MAX["float64"]

    def degenerate_until_60(step, _):
        monkeypatch.setitem(constants.KAPPA_MAX, "float64", 0.0 if step < 60 else real)

    sizes, optimizer = step_sizes(functools.partial(warmed_up, warmup_steps=0), degenerate_until_60)
    assert optimizer.diagnostics().refactored == 1 and worst_jolt(sizes[59:61]) < 1.1


def test_it_is_an_adamw_to_whoever_asks():
    """Trainers, schedulers and checkpoints look: the groups have torch's keys."""
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = RefLoRAAdamW(pairs, lr=1e-2)
    assert isinstance(optimizer, torch.optim.AdamW)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0].keys() == torch.optim.AdamW(factors(pairs)).param_groups[0].keys()
