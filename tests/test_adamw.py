"""RefLoRAAdamW against what it must equal (AdamW, the published algorithm), and that nothing jolts Adam."""

import pytest
import torch
from toys import backward, clones, factors, leaf_pairs, targets

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
def test_trains_from_peft_start_where_the_published_code_does_not(fast_backend, scalar):
    """B = 0 and no warm-up: the published code goes dead (full) or NaN (scalar)."""
    A0 = torch.randn(8, 60) / 60**0.5
    goal = [torch.randn(50, 60)]
    ours, theirs = ([(A0.clone().requires_grad_(), torch.zeros(50, 8, requires_grad=True))] for _ in range(2))
    a = RefLoRAAdamW(ours, lr=1e-2, scalar=scalar, warmup_steps=0, backend=fast_backend)
    b = torch.optim.AdamW(factors(theirs), lr=1e-2)
    start = backward(ours, goal)
    published_fails = False
    if scalar:
        published.refactor_scalar_(theirs, b)
    for _ in range(60):
        loss = backward(ours, goal)
        a.step()
        if published_fails:
            continue
        backward(theirs, goal)
        if not scalar:
            published.precondition_(theirs)
        published_fails = not all(t.isfinite().all() for t in factors(theirs)) or not any(
            t.grad.abs().max() > 0 for t in factors(theirs)
        )
        b.step()
        if scalar:
            published.refactor_scalar_(theirs, b)
    assert loss < 0.8 * start
    assert published_fails


def step_sizes(leave, transported=True, until=None, steps=30):
    """Mean |step| of A and B under a noisy gradient, around step `leave`."""
    generator = torch.Generator().manual_seed(3)
    r, n, m = 8, 96, 64
    W = torch.randn(m, n, generator=generator) / n**0.5
    A = (3 * torch.randn(r, n, generator=generator) / n**0.5).requires_grad_()
    B = torch.zeros(m, r).requires_grad_()
    warmup = leave if until is None else 0
    optimizer = RefLoRAAdamW([(A, B)], lr=1e-3, warmup_steps=warmup, weight_decay=0.0, backend="cpp")
    sizes = []
    for k in range(leave + steps):
        if until is not None:
            until(k)
        if k == leave and not transported:
            optimizer.state[A]["reflora_phase"].fill_(1)  # pretend the moments had been moved
        X = torch.randn(n, 64, generator=generator)
        optimizer.zero_grad()
        (B @ (A @ X) - W @ X).square().mean().backward()
        before = [t.detach().clone() for t in (A, B)]
        optimizer.step()
        sizes.append([float((t.detach() - old).abs().mean()) for t, old in zip((A, B), before)])
    return sizes, optimizer


def test_leaving_the_warm_up_does_not_jolt_adam():
    sizes, _ = step_sizes(60)
    for side in (0, 1):
        assert abs(sizes[60][side] / sizes[59][side] - 1) < 0.1
    # and what the transport is there for: without it the steps are off by a factor of several for 30 steps and more
    untransported, _ = step_sizes(60, transported=False)
    assert worst_ratio(sizes) < 1.25 and worst_ratio(untransported) > 2


def worst_ratio(sizes, leave=60):
    """The largest factor by which a later step differs from the last one before `leave`, either way."""
    ratios = [later[side] / sizes[leave - 1][side] for later in sizes[leave:] for side in (0, 1)]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def test_leaving_a_degenerate_phase_does_not_jolt_adam(monkeypatch):
    real = constants.KAPPA_MAX["float64"]

    def degenerate_until_60(k):
        monkeypatch.setitem(constants.KAPPA_MAX, "float64", 0.0 if k < 60 else real)

    sizes, optimizer = step_sizes(60, until=degenerate_until_60)
    assert optimizer.diagnostics().refactored == 1
    for side in (0, 1):
        assert abs(sizes[60][side] / sizes[59][side] - 1) < 0.1


def test_it_is_an_adamw_to_whoever_asks():
    """Trainers, schedulers and checkpoints look: the groups have torch's keys."""
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = RefLoRAAdamW(pairs, lr=1e-2)
    assert isinstance(optimizer, torch.optim.AdamW)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0].keys() == torch.optim.AdamW(factors(pairs)).param_groups[0].keys()
