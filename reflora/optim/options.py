"""Checks of what RefLoRAAdamW is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..contract import LoRAPair, check_backend, check_count, check_precision, fail


def check_hypers(lr: float, betas: Any, eps: float, weight_decay: float) -> None:
    """At construction and before every step, since schedulers write param_groups; nan fails too."""
    if not (0 <= lr < math.inf and eps >= 0 and weight_decay >= 0):
        fail("lr, eps, weight_decay", "numbers >= 0", (lr, eps, weight_decay), "Use maximize=True for ascent.")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        fail("betas", "two numbers in [0, 1)", betas, "The defaults are (0.9, 0.999).")


def check_options(
    interval: int, warmup_steps: int | None, backend: str | None, precision: str, differentiable: bool
) -> None:
    check_schedule(interval, warmup_steps)
    check_backend(backend)
    check_precision(precision)
    if differentiable:
        fail("differentiable", "False", True, "The fused step has no derivative.")


def check_schedule(interval: int, warmup_steps: int | None) -> None:
    check_count("interval", interval, 1)
    if warmup_steps is not None:
        check_count("warmup_steps", warmup_steps, 0, "enters S gradually")


def check_storage(
    state_dtype: torch.dtype | None, master_weights: bool, stochastic_rounding: bool, carry_scalar: bool
) -> None:
    if state_dtype not in (None, torch.float32):
        fail("state_dtype", "None or torch.float32", state_dtype, "None keeps the moments in the factors' dtype.")
    if master_weights and stochastic_rounding:
        fail("stochastic_rounding", "False with master_weights=True", True, "Master weights lose nothing to rounding.")
    if carry_scalar:
        fail("carry_grams", "False with scalar=True", True, "RefLoRA-S needs no Grams.")


def check_flags(flags: dict[str, Any]) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            fail(name, "True or False", repr(value), "", TypeError)


OPTIONS = (
    "scalar", "interval", "warmup_steps", "backend", "precision", "carry_grams", "check_grads", "state_dtype",
    "master_weights", "stochastic_rounding", "pairs",
)  # fmt: skip


def check_group_options(groups: Sequence[dict[str, Any]], names: Iterable[str]) -> None:
    """No group holds one of these options, which are the whole optimizer's."""
    for number, group in enumerate(groups):
        for name in names:
            if name in group:
                fail(f"parameter group {number}", f"no {name!r}", group[name], "Pass it to the optimizer itself.")


def check_groups(groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Groups hold no option of the whole optimizer, and at least one factor of the pairs, if there are any."""
    check_group_options(groups, OPTIONS)
    owned = {id(p) for group in groups for p in group["params"]}
    if pairs and not any(id(t) in owned for pair in pairs for t in (pair.A, pair.B)):
        remedy = "Find the pairs in the model whose parameters these are."
        fail("pairs", "factors that are among the parameters", f"{len(pairs)} pairs of other tensors", remedy)
