"""RefLoRAAdamW's state and manners: what its layers report, groups, scalers, what a torch optimizer does."""

import copy
import weakref

import pytest
import torch
from refusals import unchanged
from toys import backward, clones, factors, leaf_pairs, random_grads, targets

from reflora import RefLoRAAdamW
from reflora.columns import DEGENERATE, PLAIN, REFACTORED


def test_pairs_over_groups_frozen_factors_and_plain_parameters(fast_backend):
    """LoRA+ groups; a frozen A; a head in no pair: the last two get AdamW."""
    pairs = leaf_pairs([(4, 30, 21), (4, 12, 9)], torch.float32)
    head = torch.randn(5, requires_grad=True)
    pairs[1][0].requires_grad_(False)
    groups = [
        {"params": [pairs[0][0], head], "lr": 1e-3},
        {"params": [pairs[0][1]], "lr": 1.6e-2},
        {"params": [pairs[1][1]]},
    ]
    optimizer = RefLoRAAdamW(groups, pairs=pairs, lr=1e-2, backend=fast_backend)
    single = clones(pairs)[1][1]
    twin_head = head.detach().clone().requires_grad_()
    twin = torch.optim.AdamW([{"params": [single], "lr": 1e-2}, {"params": [twin_head], "lr": 1e-3}], fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        random_grads([pairs[0][0], pairs[0][1], head, pairs[1][1]], generator)
        single.grad, twin_head.grad = pairs[1][1].grad.clone(), head.grad.clone()
        optimizer.step(), twin.step()
    assert optimizer.diagnostics().status.tolist() == [REFACTORED, PLAIN]
    assert torch.equal(pairs[1][1], single) and torch.equal(head, twin_head)
    # the learning rates of the two groups: first-step sizes of Adam are lr, 16 times apart
    moved = [t.detach().clone() for t in pairs[0]]
    random_grads(pairs[0], generator)
    optimizer.step()
    ratio = (pairs[0][1] - moved[1]).abs().mean() / (pairs[0][0] - moved[0]).abs().mean()
    assert 4 < ratio < 64


def test_add_param_group_schedulers_and_closure(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    A, B = pairs[0]
    goals = targets(pairs)
    optimizer = RefLoRAAdamW([A], pairs=pairs, lr=1e-2, backend=fast_backend)
    optimizer.add_param_group({"params": [B], "lr": 1e-3})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0 if k == 1 else 1.0)

    def closure():
        assert torch.is_grad_enabled()
        return backward(pairs, goals)

    assert optimizer.step(closure) == pytest.approx(backward(pairs, goals), rel=0.1)
    assert optimizer.diagnostics().refactored == 1
    scheduler.step()
    with unchanged(A, B):
        optimizer.step(closure)


def test_gradient_scaler(fast_backend):
    """grad_scale divides, found_inf leaves everything as it was (torch.amp.GradScaler's protocol)."""
    start = leaf_pairs([(4, 30, 21)], torch.float32)
    goals, ends = targets(start), []
    for scale in (1.0, 1024.0):
        pairs = clones(start)
        optimizer = RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend)
        for k in range(4):
            backward(pairs, goals)
            for t in factors(pairs):
                t.grad *= scale
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(k == 2))
            before = copy.deepcopy(optimizer.state_dict()) if k == 2 else None
            weights = [t.detach().clone() for t in factors(pairs)]
            optimizer.step()
            if k == 2:
                assert all(torch.equal(t, w) for t, w in zip(factors(pairs), weights))
                after = optimizer.state_dict()
                assert after["param_groups"] == before["param_groups"]
                assert all(torch.equal(after["state"][0][n], v) for n, v in before["state"][0].items())
        ends.append([t.detach() for t in factors(pairs)])
    for p, q in zip(*ends):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_moves_is_followed(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend)
    goals = targets(pairs)
    backward(pairs, goals)
    optimizer.step()
    stale = pairs[0][0].data
    before = stale.clone()
    pairs[0][0].data = stale.clone()
    backward(pairs, goals)
    optimizer.step()
    assert torch.equal(stale, before) and not torch.equal(pairs[0][0].detach(), before)


def test_empty_groups_and_no_gradients(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = RefLoRAAdamW([{"params": factors(pairs)}, {"params": []}], pairs=pairs, backend=fast_backend)
    optimizer.step()
    assert optimizer.diagnostics().inactive == 1
    assert not optimizer.state[pairs[0][0]].get("step", torch.zeros(1)).any()


def test_degenerate_start_reports(fast_backend):
    A, B = torch.randn(4, 10, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    optimizer = RefLoRAAdamW([(A, B)], backend=fast_backend)
    A.grad, B.grad = torch.zeros_like(A), torch.randn_like(B)
    optimizer.step()
    assert optimizer.diagnostics().status.tolist() == [DEGENERATE]
    assert optimizer.backends == {"cpu": fast_backend}


def test_gradients_do_not_outlive_zero_grad(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, backend=fast_backend)
    backward(pairs, targets(pairs))
    grads = [weakref.ref(t.grad) for t in factors(pairs)]
    optimizer.step()
    optimizer.zero_grad()
    assert all(grad() is None for grad in grads)


@pytest.mark.parametrize("warmup_steps", [None, 0])
def test_gradients_past_the_range_leave_everything_finite(fast_backend, warmup_steps):
    """Their squares leave float32, and with warmup_steps=0 S^-1 takes themselves past it."""
    A, B = torch.randn(4, 30).requires_grad_(), (torch.randn(20, 4) * 1e-30).requires_grad_()
    optimizer = RefLoRAAdamW([(A, B)], lr=1e-2, warmup_steps=warmup_steps, backend=fast_backend)
    before = A.detach().clone()
    for _ in range(2):
        A.grad, B.grad = torch.randn_like(A) * 1e30, torch.randn_like(B)
        optimizer.step()
    assert optimizer.diagnostics().skipped == 0
    # saturated, they make Adam's usual steps: weights neither fly away nor fall to 0
    assert (A.detach() - before).abs().mean() > 1e-3 and (A.detach() - before).abs().max() < 0.03
    for t in (A, B):
        assert t.isfinite().all() and all(v.isfinite().all() for v in optimizer.state[t].values())
