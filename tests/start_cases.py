"""Pairs at RefLoRA's start, and gradients that take them through it."""

from __future__ import annotations

import torch
from kernel_cases import randn
from toys import factors, leaf_pairs, random_grads

import reflora
from reflora import LoRAPair

WAYS = {
    "RefLoRAAdamW": lambda pairs, **options: reflora.RefLoRAAdamW(pairs, **{"lr": 1e-2, **options}),
    "wrap": lambda pairs, **options: reflora.wrap(torch.optim.AdamW)(
        factors(pairs), pairs=pairs, **{"lr": 1e-2, **options}
    ),
}


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


def trained(optimizer, pairs, steps, seed=0, drift=0.0):
    """Steps number steps[0] to steps[1] of random gradients; drift: the mean of B's."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps[1]):
        random_grads(factors(pairs), generator)
        for _, B in pairs:
            B.grad += drift
        if step >= steps[0]:
            optimizer.step()


def start_of(dtype=torch.float32):
    return [(A, B.detach().zero_().requires_grad_()) for A, B in leaf_pairs([(4, 30, 21), (3, 10, 17)], dtype)]
