"""RefLoRA in plain float64 torch: the paper's companion and the oracle of every test. It is never tuned.

Orientation is PEFT's: `A [r, n_in]`, `B [n_out, r]`, `dW = scaling * B @ A`; the paper (arXiv 2505.18877)
writes `W = A B^T`, so its A is our B and its B our A^T. Grams are `Ga = A A^T` and `Gb = B^T B`.
Every function takes any floating dtype, computes in float64 and returns float64.
"""

from .invariant import Frames, InvariantState, frames, invariant_step, whitener
from .mean import (
    MEET,
    Refactoring,
    balance_scalar,
    choose,
    condition,
    geometric_mean,
    known_smoothness,
    known_smoothness_scalar,
    meet,
    met,
    polar,
    precondition,
    present,
    refactor,
    refactoring,
    shrink_weight,
    shrunk,
    sqrtm,
    transport,
    upper_bound,
)
from .riemannian import damped_inverses
from .step import AdamWState, Hypers, Schedule, adamw_step

__all__ = [
    "MEET", "Refactoring", "balance_scalar", "choose", "condition", "geometric_mean", "known_smoothness",
    "known_smoothness_scalar", "meet", "met", "polar", "precondition", "present", "refactor", "refactoring",
    "shrink_weight", "shrunk", "sqrtm", "transport", "upper_bound", "AdamWState", "Hypers", "Schedule",
    "adamw_step", "damped_inverses", "Frames", "InvariantState", "frames", "invariant_step", "whitener",
]  # fmt: skip
