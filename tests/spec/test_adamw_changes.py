"""What happens to a run under RefLoRAAdamW when something is changed between its steps."""

import pytest
import torch
from refusals import refused, unchanged
from toys import backward, clones, factors, leaf_pairs, run, targets

from reflora import RefLoRAAdamW
from reflora.pairs import LoRAPair


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interval", [1, 3])
def test_factors_of_another_dtype(fast_backend, dtype, interval):
    """model.double(), .bfloat16() or .half() after a step: the state follows."""
    pairs = leaf_pairs([(4, 30, 21), (5, 12, 70)], torch.float32)
    twins = clones(pairs)
    for own in (pairs, twins):
        optimizer = RefLoRAAdamW(own, lr=1e-2, interval=interval, backend=fast_backend)
        goals = [torch.ones(B.shape[0], A.shape[1]) for A, B in own]
        run(optimizer, own, goals)
        if own is pairs:
            for t in factors(pairs):
                t.data = t.data.to(dtype)
                t.grad = None
            goals = [W.to(dtype) for W in goals]
        run(optimizer, own, goals)
    for p, q in zip(factors(pairs), factors(twins)):
        assert p.dtype == dtype and (p.double() - q.double()).abs().max() <= 16 * max(torch.finfo(dtype).eps, 1e-7)
    assert all(optimizer.state[t]["exp_avg"].dtype == torch.float32 for t in factors(twins))


def test_factors_of_another_shape_are_refused(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend)
    run(optimizer, pairs, targets(pairs))
    A = pairs[0][0]
    A.grad = None
    A.data = torch.randn(4, 64)
    pairs[0][1].grad, A.grad = torch.ones(21, 4), torch.ones(4, 64)
    with refused("state 'exp_avg': expected .4, 64., got .4, 30.", *pairs[0]):
        optimizer.step()


def test_conv_factors_of_another_memory_format(fast_backend):
    ends = []
    for change in (False, True):
        torch.manual_seed(1)
        A, B = torch.randn(4, 5, 3, 3).requires_grad_(), torch.randn(20, 4, 1, 1).requires_grad_()
        optimizer = RefLoRAAdamW([LoRAPair("conv", A, B, "conv")], lr=1e-2, backend=fast_backend)
        for step in range(4):
            if change and step == 2:
                A.data = A.data.to(memory_format=torch.channels_last)
            for t in (A, B):
                t.grad = torch.empty_like(t).copy_(torch.randn(t.shape))
            optimizer.step()
        ends.append(A.detach().clone())
    assert torch.allclose(*ends, atol=1e-6)


def test_gradients_of_another_dtype_are_refused(fast_backend):
    A, B = (
        torch.ones(4, 16, dtype=torch.bfloat16).requires_grad_(),
        torch.ones(9, 4, dtype=torch.bfloat16).requires_grad_(),
    )
    optimizer = RefLoRAAdamW([(A, B)], backend=fast_backend)
    if not hasattr(A, "grad_dtype"):
        return  # torch itself refuses such gradients before 2.10
    A.grad_dtype = torch.float32
    A.grad, B.grad = torch.ones(4, 16), torch.ones(9, 4, dtype=torch.bfloat16)
    with refused("expected torch.bfloat16, strided, like its factor"):
        optimizer.step()


def test_eps_of_zero_at_the_usual_start(backend):
    """B = 0 gives A no gradient, so 0 / 0: A must stay, not vanish."""
    A, B = torch.randn(4, 30).requires_grad_(), torch.zeros(20, 4).requires_grad_()
    before = A.detach().clone()
    optimizer = RefLoRAAdamW([(A, B)], lr=1e-2, eps=0.0, weight_decay=0.0, backend=backend)
    A.grad, B.grad = torch.zeros_like(A), torch.randn_like(B)
    optimizer.step()
    assert torch.equal(A.detach(), before) and B.isfinite().all()


def test_a_tiny_layer_leaves_the_warm_up(backend):
    A, B = torch.randn(4, 30).requires_grad_(), (torch.randn(20, 4) * 1e-25).requires_grad_()
    optimizer = RefLoRAAdamW([(A, B)], lr=1e-30, warmup_steps=1, backend=backend)
    for _ in range(2):
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        before = A.detach().clone()
        optimizer.step()
    assert torch.allclose(A.detach(), before) and all(t.isfinite().all() for t in (A, B))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_experts_pair_with_one_gradient_takes_plain_steps(fast_backend, compiled):
    A, B = torch.randn(8, 16).requires_grad_(), torch.randn(16, 8).requires_grad_()
    optimizer = RefLoRAAdamW([LoRAPair("moe", A, B, "experts(2)")], lr=1e-2, backend=fast_backend)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for both in (False, True, False, True):
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B) if both else None
        before = A.detach().clone()
        step()
        assert not torch.equal(A.detach(), before)
    assert optimizer.state[A]["step"].tolist() == [4, 4] and optimizer.state[B]["step"].tolist() == [2, 2]


def test_freezing_one_factor_brings_the_moments_back_to_plain_units(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    A, B = pairs[0]
    optimizer = RefLoRAAdamW(pairs, lr=0.0, weight_decay=0.0, warmup_steps=0, backend=fast_backend)
    run(optimizer, pairs, targets(pairs))
    c = float(B.detach().norm() / A.detach().norm())
    before = optimizer.state[A]["exp_avg"].clone()
    A.grad, B.grad = torch.zeros_like(A), None
    optimizer.step()
    assert torch.allclose(optimizer.state[A]["exp_avg"], 0.9 * before * c, rtol=1e-4)
    assert float(optimizer.state[A]["reflora_phase"]) == 0


def test_pairs_this_optimizer_does_not_own_leave_no_state(fast_backend):
    pairs = leaf_pairs([(4, 30, 21), (4, 12, 9)], torch.float32)
    optimizer = RefLoRAAdamW(list(pairs[0]), pairs=pairs, lr=1e-2, backend=fast_backend)
    with unchanged(*pairs[1]):
        run(optimizer, pairs, targets(pairs))
    assert len(optimizer.state_dict()["state"]) == 2 and optimizer.diagnostics().inactive == 1


def test_a_parameter_replaced_in_its_group_is_seen(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    head = torch.ones(3, requires_grad=True)
    optimizer = RefLoRAAdamW([*factors(pairs), head], pairs=pairs, lr=1e-2, backend=fast_backend)
    run(optimizer, pairs, targets(pairs), 1)
    other = torch.ones(3, requires_grad=True)
    optimizer.param_groups[0]["params"][2] = other
    head.grad, other.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(head.detach(), torch.ones(3)) and not torch.equal(other.detach(), torch.ones(3))


def test_torch_options_are_taken():
    RefLoRAAdamW(leaf_pairs([(4, 30, 21)]), foreach=True, fused=True, capturable=False, differentiable=False)


def test_a_refused_step_changes_nothing(fast_backend):
    """A sparse gradient in a plain parameter: the pairs must not have moved either."""
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = RefLoRAAdamW([*factors(pairs), table.weight], pairs=pairs, lr=1e-2, backend=fast_backend)
    backward(pairs, targets(pairs))
    table(torch.tensor([1])).sum().backward()
    with refused("expected a dense tensor", *factors(pairs), error=RuntimeError):
        optimizer.step()
    assert not optimizer.state


def test_complex_parameters_in_no_pair_are_torchs():
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    ours, theirs = (torch.ones(3, dtype=torch.complex64).requires_grad_() for _ in range(2))
    optimizer = RefLoRAAdamW([*factors(pairs), ours], pairs=pairs, lr=1e-2)
    plain = torch.optim.AdamW([theirs], lr=1e-2)
    for _ in range(2):
        backward(pairs, targets(pairs))
        ours.grad, theirs.grad = (torch.full((3,), 1 + 2j) for _ in range(2))
        optimizer.step(), plain.step()
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_factor_without_a_partner_is_not_spoilt(fast_backend, spoilt):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend)
    run(optimizer, pairs, targets(pairs))
    A, B = pairs[0]
    A.grad, B.grad = torch.ones_like(A), None
    A.grad[1, 2] = spoilt
    with unchanged(A, optimizer.state[A]["step"]):
        optimizer.step()
    assert optimizer.state[A]["exp_avg"].isfinite().all()


def test_pairs_of_another_model_are_refused():
    pairs = leaf_pairs([(4, 30, 21)])
    with refused("factors that are among the parameters, got 1 pairs of other tensors"):
        RefLoRAAdamW(factors(pairs), pairs=clones(pairs))
