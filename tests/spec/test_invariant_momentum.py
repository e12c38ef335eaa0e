"""InvariantAdamW's second moments where they are not a mean over steps: of the mean gradient, or with beta2 = 0."""

from __future__ import annotations

import copy

import pytest
import torch
from refusals import refused
from toys import clones, factors, leaf_pairs, random_grads, step_alike

from reflora import InvariantAdamW, LoRAPair, RefLoRAAdamW, wrap

SHAPES = [(4, 40, 30)]
LONE = pytest.mark.filterwarnings("ignore:.*stepped without RefLoRA")


def trained(pairs, steps=3, cls=InvariantAdamW, **options):
    optimizer = cls(factors(pairs) if cls is torch.optim.AdamW else pairs, lr=1e-2, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        random_grads(factors(pairs), generator)
        optimizer.step()
    return optimizer


@LONE
@pytest.mark.parametrize("steps", [3, 100])
def test_a_lone_gradient_takes_adamws_step_by_squares_of_the_mean(fast_backend, steps):
    """By the Gram, as if that had AdamW's bias, it was 18 times too short after three steps."""
    ((A, B),) = pairs = leaf_pairs(SHAPES, torch.float32)
    optimizer = trained(pairs, steps, moments="momentum", weight_decay=0.0, backend=fast_backend)
    m = optimizer.state[A]["exp_avg"].double()
    squares = (m / (1 - 0.9**steps)).square().mean(1, keepdim=True) * (1 - 0.999**steps)
    exact = A.detach().clone().requires_grad_()
    adamw = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.0)
    entries = {"step": torch.tensor(float(steps)), "exp_avg": m.float()}
    adamw.state[exact] = {**entries, "exp_avg_sq": squares.float().expand_as(A).clone()}
    random_grads((A, B), torch.Generator().manual_seed(steps))
    exact.grad, B.grad, before = A.grad.clone(), None, A.detach().clone()
    optimizer.step(), adamw.step()
    torch.testing.assert_close(A, exact, rtol=1e-6, atol=1e-7)
    assert 0.5e-2 < float((A.detach() - before).square().mean().sqrt()) < 2e-2


@LONE
def test_a_factor_comes_back_with_a_gram_of_its_mean(fast_backend):
    """With carried Grams a step whitens by what the step before has left, which AdamW's second moments are not."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    late = trained(pairs, moments="momentum", carry_grams=True, backend=fast_backend)
    others = clones(pairs)
    fresh = InvariantAdamW(others, lr=1e-2, moments="momentum", backend=fast_backend)
    fresh.load_state_dict(copy.deepcopy(late.state_dict()))
    generator = torch.Generator().manual_seed(5)
    for lone in (True, False):
        random_grads(factors(pairs), generator)
        for (A, B), (C, D) in zip(pairs, others):
            C.grad, D.grad = A.grad.clone(), B.grad.clone()
            if lone:
                B.grad = D.grad = None
        late.step(), fresh.step()
        for p, q in zip(factors(pairs), factors(others)):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@LONE
def test_a_lone_gradient_after_a_load_goes_on_with_adamws_squares(fast_backend):
    """By squares of the mean it took a step almost four times AdamW's."""
    ((A, B),) = pairs = leaf_pairs(SHAPES, torch.float32)
    adamw = trained(pairs, 30, torch.optim.AdamW)
    others = clones(pairs)
    optimizer = InvariantAdamW(others, lr=1e-2, moments="momentum", backend=fast_backend)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    random_grads((A, B), torch.Generator().manual_seed(5))
    ((C, _),) = others
    C.grad, B.grad = A.grad.clone(), None
    adamw.step(), optimizer.step()
    torch.testing.assert_close(C, A, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("saved", ["AdamW's", "of gradients"])
def test_a_loaded_state_without_the_gram_of_the_mean_takes_it_from_the_mean(fast_backend, saved):
    """A first step with carried Grams by what was loaded was ten times too long."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    options = {"cls": torch.optim.AdamW} if saved == "AdamW's" else {"backend": fast_backend}
    state, others = trained(pairs, **options).state_dict(), clones(pairs)
    late = InvariantAdamW(pairs, lr=1e-2, moments="momentum", carry_grams=True, backend=fast_backend)
    fresh = InvariantAdamW(others, lr=1e-2, moments="momentum", backend=fast_backend)
    late.load_state_dict(copy.deepcopy(state)), fresh.load_state_dict(state)
    step_alike(pairs, late, others, fresh, torch.Generator().manual_seed(5))
    for p, q in zip(factors(pairs), factors(others)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert set(late.state[pairs[0][0]]) == {"step", "exp_avg", "gram_of_exp_avg"}


def test_a_gram_of_the_mean_is_no_mean_of_grams(fast_backend):
    """Taken for one it made steps a sixteenth as long."""
    pairs = leaf_pairs(SHAPES, torch.float32)
    state = trained(pairs, moments="momentum", backend=fast_backend).state_dict()
    optimizer = trained(pairs, backend=fast_backend)
    with refused("expected exp_avg_gram, a mean of Grams, got gram_of_exp_avg", of=optimizer):
        optimizer.load_state_dict(state)


def test_without_memory_the_second_moments_are_the_last_gram(fast_backend):
    """What was larger before leaves no rounding behind, which a small damping would show."""
    ((A, B),) = pairs = leaf_pairs(SHAPES)
    optimizer = InvariantAdamW(pairs, lr=1e-2, betas=(0.9, 0.0), backend=fast_backend)
    for size in (10.0, 1e-3):
        random_grads((A, B), torch.Generator().manual_seed(int(size)))
        A.grad.mul_(size), B.grad.mul_(size)
        optimizer.step()
    for g, factor in ((A.grad, A), (B.grad.mT, B)):
        wanted = g @ g.mT / g.shape[1]
        torch.testing.assert_close(optimizer.state[factor]["exp_avg_gram"], wanted, rtol=1e-12, atol=0)


@LONE
def test_squares_of_the_mean_are_those_of_each_expert_and_of_the_factors_own_group(fast_backend):
    E, r, A, B = 3, 2, torch.randn(6, 11), torch.randn(7, 6)
    A, B = A.requires_grad_(), B.requires_grad_()
    groups = [{"params": [A]}, {"params": [B], "betas": (0.8, 0.99)}]
    pairs = [LoRAPair("moe", A, B, f"experts({E})")]
    optimizer = InvariantAdamW(groups, pairs=pairs, lr=1e-2, moments="momentum", backend=fast_backend)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        random_grads((A, B), generator)
        optimizer.step()
    means = (optimizer.state[B]["exp_avg"].double() / (1 - 0.8**3)).unflatten(1, (r, E))
    before = means.square().mean(0) * (1 - 0.99**3)
    random_grads((A, B), generator)
    A.grad = None
    optimizer.step()
    g = B.grad.double().unflatten(1, (r, E))
    wanted = 0.99 * before + 0.01 * g.square()
    squares = optimizer.state[B]["exp_avg_sq"].unflatten(1, (r, E))
    torch.testing.assert_close(squares.double(), wanted, rtol=1e-5, atol=1e-9)


@LONE
def test_a_lone_gradient_before_any_step_is_adamws_first(fast_backend):
    """Of a factor whose loaded state has counted no step, squares of its mean would be 0 / 0."""
    ((A, B),) = pairs = leaf_pairs(SHAPES, torch.float32)
    optimizer = InvariantAdamW(pairs, lr=1e-2, weight_decay=0.0, moments="momentum", backend=fast_backend)
    state = trained(clones(pairs), 1, moments="momentum", backend=fast_backend).state_dict()
    for entries in state["state"].values():
        for value in entries.values():
            value.zero_()
    optimizer.load_state_dict(state)
    random_grads((A,), torch.Generator().manual_seed(0))
    before = A.detach().clone()
    optimizer.step()
    torch.testing.assert_close(A.detach(), before - optimizer.param_groups[0]["lr"] * A.grad.sign(), rtol=0, atol=1e-4)


def test_the_gram_of_the_mean_is_loaded_in_its_own_dtype_and_shape(fast_backend):
    pairs = leaf_pairs(SHAPES, torch.bfloat16)
    state = trained(pairs, moments="momentum", backend=fast_backend).state_dict()
    optimizer = InvariantAdamW(clones(pairs), lr=1e-2, moments="momentum", backend=fast_backend)
    optimizer.load_state_dict(copy.deepcopy(state))
    loaded = optimizer.state[optimizer.param_groups[0]["params"][0]]["gram_of_exp_avg"]
    assert loaded.dtype == torch.float64 and torch.equal(loaded, state["state"][0]["gram_of_exp_avg"])
    for cls in (wrap(torch.optim.AdamW), RefLoRAAdamW):
        other = cls(factors(pairs), pairs=pairs, lr=1e-2)
        with refused("gram_of_exp_avg", of=other):
            other.load_state_dict(state)
    state["state"][0]["gram_of_exp_avg"] = torch.zeros(3, 3)
    with refused("loaded state 'gram_of_exp_avg'", of=optimizer):
        optimizer.load_state_dict(state)
