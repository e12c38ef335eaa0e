"""A small problem for wrapped optimizers: pairs of every layout, a quadratic loss of their products."""

import torch
from torch import nn

from reflora import LoRAPair, reference
from reflora.optim.wrapper import reflora_class


def name_of(value):
    return value.__name__ if isinstance(value, type) else "-".join(value) or "default"


def make_pairs(count=4, dtype=torch.float64, rank=4):
    """Linear pairs of different shapes, one convolution and one stack of three experts."""
    shapes = [((rank, 9 + i), (7 + i, rank), "linear") for i in range(count)]
    shapes += [((rank, 3, 2, 2), (6, rank, 1, 1), "conv"), ((3 * rank, 8), (9, rank * 3), "experts(3)")]
    return [
        LoRAPair(f"layer {i}", *(nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in (A, B)), layout)
        for i, (A, B, layout) in enumerate(shapes)
    ]


def factors(pairs):
    return [factor for pair in pairs for factor in (pair.A, pair.B)]


def products(pairs):
    sides = [(pair.views_A(pair.A), pair.views_B(pair.B)) for pair in pairs]
    return [(B @ A).detach() for As, Bs in sides for A, B in zip(As, Bs)]


def targets(pairs):
    return [torch.randn_like(product) for product in products(pairs)]


def backward(pairs, goals):
    """A quadratic loss of every product; returns it."""
    loss = 0
    for pair in pairs:
        pair.A.grad = pair.B.grad = None
    goal = iter(goals)
    for pair in pairs:
        for A, B in zip(pair.views_A(pair.A), pair.views_B(pair.B)):
            loss = loss + (B @ A - next(goal)).square().mean()
    loss.backward()
    return loss


def precondition_by_reference(pairs, weight=None):
    for pair in pairs:
        tensors = (pair.A.detach(), pair.A.grad, pair.B.detach(), pair.B.grad)
        views = (pair.views_A, pair.views_A, pair.views_B, pair.views_B)
        for A, gA, B, gB in zip(*(view(tensor) for view, tensor in zip(views, tensors))):
            new_A, new_B = reference.precondition(A, B, gA, gB, weight)
            gA.copy_(new_A)
            gB.copy_(new_B)


def wrap(cls, pairs, lr=1e-2, **kwargs):
    """With the exact S from the first step on, unless warmup_steps is among kwargs."""
    kwargs.setdefault("warmup_steps", 0)
    return reflora_class(cls)(factors(pairs), pairs, lr=lr, **kwargs)


def twins(cls, kwargs, wrapper, **pair_options):
    """The same problem for a wrapped and for a plain optimizer."""
    ours, plain = (make_pairs(**pair_options) for _ in range(2))
    for mine, other in zip(factors(ours), factors(plain)):
        other.data.copy_(mine.data)
    return ours, wrap(cls, ours, **kwargs, **wrapper), plain, cls(factors(plain), lr=1e-2, **kwargs), targets(ours)


def assert_same(ours, others, atol=1e-10):
    for mine, other in zip(ours, others):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=atol)
