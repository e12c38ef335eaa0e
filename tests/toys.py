"""Small training problems: pairs of leaf factors, quadratic losses, random gradients."""

import functools

import torch
from conftest import spectrum_pair

import reflora


def leaf_pairs(shapes, dtype=torch.float64, k=(2.0, 20.0)):
    return [tuple(t.requires_grad_() for t in spectrum_pair(*shape, *k, dtype)) for shape in shapes]


def factors(pairs):
    return [t for pair in pairs for t in pair]


def clones(pairs):
    return [tuple(t.detach().clone().requires_grad_() for t in pair) for pair in pairs]


def targets(pairs):
    return [torch.randn(B.shape[0], A.shape[1], dtype=A.dtype) for A, B in pairs]


def backward(pairs, goals):
    """Gradients of sum ||B A - W||^2 / 2, fresh tensors as after zero_grad."""
    for t in factors(pairs):
        t.grad = None
    loss = sum(0.5 * (B @ A - W).square().sum() for (A, B), W in zip(pairs, goals))
    loss.backward()
    return float(loss.detach())


def run(optimizer, pairs, goals, steps=2):
    for _ in range(steps):
        backward(pairs, goals)
        optimizer.step()


def random_grads(parameters, generator):
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def step_alike(ones, a, others, b, generator):
    """One step of each of two optimizers, from the same random gradients."""
    random_grads(factors(ones), generator)
    for p, q in zip(factors(ones), factors(others)):
        q.grad = p.grad.clone()
    a.step(), b.step()


def step_sizes(make, before=lambda step, optimizer: None):
    """Mean |step| of A and of B, for 90 steps from B = 0 under a noisy gradient, and the optimizer, `make(A, B)`."""
    torch.manual_seed(3)
    W, A = torch.randn(64, 96) / 96**0.5, (3 * torch.randn(8, 96) / 96**0.5).requires_grad_()
    B = torch.zeros(64, 8, requires_grad=True)
    optimizer, sizes = make(A, B), []
    for step in range(90):
        before(step, optimizer)
        X = torch.randn(96, 64)
        optimizer.zero_grad()
        (B @ (A @ X) - W @ X).square().mean().backward()
        old = A.detach().clone(), B.detach().clone()
        optimizer.step()
        sizes.append([float((t.detach() - was).abs().mean()) for t, was in zip((A, B), old)])
    return sizes, optimizer


def worst_jolt(sizes):
    """The largest factor by which a later step differs from the first of these, either way."""
    return max(max(later / first, first / later) for step in sizes for later, first in zip(step, sizes[0]))


OPTIMIZERS = {
    "RefLoRA": reflora.RefLoRAAdamW,
    "RefLoRA-S": functools.partial(reflora.RefLoRAAdamW, scalar=True),
    "InvariantAdamW": reflora.InvariantAdamW,
    "RiemannianAdamW": reflora.RiemannianAdamW,
}
