"""What all backends agree on: names, types, when a layer is degenerate."""

from __future__ import annotations

import math

import torch

# by name, the devices that it is the first choice for; "torch" serves what the others cannot
BACKENDS = {"triton": ("cuda",), "cpp": ("cpu",), "torch": ()}
PRECISIONS = ("float64", "float32")
# of InvariantAdamW
METRICS = ("reflora", "scaled", "identity")
MOMENTS = ("gradients", "momentum")
STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# a factor is degenerate past this Frobenius condition estimate ||L||_F ||L^-1||_F of the Cholesky factor of its Gram
# (at least k, at most r k / 2 + 1), and past KAPPA_OF_RANK times sqrt(r): rounded to float32, singular Grams gave
# 830 sqrt(r) and more in 11 000 draws, n up to 32768. On every backend
KAPPA_MAX = {"float64": 1e6, "float32": 1e4}
KAPPA_OF_RANK = {"float64": math.inf, "float32": 800.0}

# steps after which a Gram counts half in S by default, see reference.shrink_weight; chosen in benchmarks/NOTES.md
START_STEPS = 400


def start_of(warmup_steps: int | None) -> int:
    """Steps after which a Gram counts half in S: START_STEPS for None, 0 (the exact S at once) for a number."""
    return START_STEPS if warmup_steps is None else 0
