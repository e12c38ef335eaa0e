"""Small training problems: pairs of leaf factors, quadratic losses, random gradients."""

import torch
from conftest import spectrum_pair


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


def random_grads(parameters, generator):
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
