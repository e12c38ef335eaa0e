"""Checks of what RefLoRAAdamW is asked for."""

from __future__ import annotations

from typing import Any

import torch

from ..contract import check_backend, check_count, check_precision, fail


def check_hypers(lr: float, betas: Any, eps: float, weight_decay: float) -> None:
    """At construction and before every step, since schedulers write param_groups; nan fails too."""
    if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
        fail("lr, eps, weight_decay", "numbers >= 0", (lr, eps, weight_decay), "Use maximize=True for ascent.")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        fail("betas", "two numbers in [0, 1)", betas, "The defaults are (0.9, 0.999).")


def check_options(interval: int, warmup_steps: int, backend: str | None, precision: str, differentiable: bool) -> None:
    check_count("interval", interval, 1)
    check_count("warmup_steps", warmup_steps, 0)
    check_backend(backend)
    check_precision(precision)
    if differentiable:
        fail("differentiable", "False", True, "The fused step has no derivative.")


def check_storage(
    state_dtype: torch.dtype | None, master_weights: bool, stochastic_rounding: bool, carry_scalar: bool
) -> None:
    if state_dtype not in (None, torch.float32):
        fail("state_dtype", "None or torch.float32", state_dtype, "None keeps the moments in the factors' dtype.")
    if master_weights and stochastic_rounding:
        fail("stochastic_rounding", "False with master_weights=True", True, "Master weights lose nothing to rounding.")
    if carry_scalar:
        fail("carry_grams", "False with scalar=True", True, "RefLoRA-S needs no Grams.")
