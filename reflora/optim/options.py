"""Checks of what RefLoRAAdamW is asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..contract import LoRAPair, check_backend, check_count, check_precision, fail


def check_hypers(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """At construction and before every step, since schedulers write param_groups; nan fails too."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_number(name, value)
    if not (0 <= lr < math.inf and eps >= 0 and weight_decay >= 0):
        fail("lr, eps, weight_decay", "numbers >= 0", (lr, eps, weight_decay), "Use maximize=True for ascent.")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        fail("betas", "two numbers in [0, 1)", typed(betas), "The defaults are (0.9, 0.999).", TypeError)
    for beta in betas:
        check_number("betas", beta)
    if not all(0 <= float(beta) < 1 for beta in betas):
        fail("betas", "two numbers in [0, 1)", betas, "The defaults are (0.9, 0.999).")


def check_number(name: str, value: Any) -> None:
    """A number, or a tensor of one; text out of a YAML file is none."""
    if type(value) is float or (isinstance(value, Real) and not isinstance(value, bool)):
        return
    if not (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()):
        fail(name, "a number", typed(value), "YAML reads 1e-4 as text and 1.0e-4 as a number.", TypeError)


def typed(value: object) -> str:
    """How an error shows a value of the wrong type."""
    return f"{str(value)[:60]!r}, of type {type(value).__name__}"


def short(value: object) -> str:
    """A value of an option, without the tensors of a list of pairs."""
    return repr(value) if isinstance(value, (Real, str, type(None))) else f"a {type(value).__name__}"


def check_like_defaults(cls: type, options: Mapping[str, Any]) -> None:
    """Options of another optimizer class have the types of its defaults, where these are numbers or flags."""
    parameters = inspect.signature(cls).parameters
    for name, value in options.items():
        default = parameters[name].default if name in parameters else None
        if isinstance(default, bool):
            check_flags({name: value})
        elif (name == "lr" or isinstance(default, Real)) and value is not None:
            check_number(name, value)
        elif isinstance(default, tuple) and isinstance(value, (tuple, list)):
            for entry, like in zip(value, default):
                if isinstance(like, Real) and entry is not None:
                    check_number(name, entry)


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
            fail(name, "True or False", typed(value), "Text and numbers are no flags.", TypeError)


def check_group_options(groups: Sequence[dict[str, Any]], own: Mapping[str, Any]) -> None:
    """No group holds one of these options of the whole optimizer, unless it is the very same.

    SAM and ZeroRedundancyOptimizer leave what they hand on in the groups, from where it is taken out.
    """
    for number, group in enumerate(groups):
        for name in own:
            if name in group and group[name] is not own[name]:
                remedy = "Pass it to the optimizer itself; further pairs go to add_param_group."
                fail(f"parameter group {number}", f"no {name!r}", short(group[name]), remedy)
    for group in groups:
        for name in own:
            group.pop(name, None)


def check_owned(groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Groups hold at least one factor of the pairs, if there are any."""
    owned = {id(p) for group in groups for p in group["params"]}
    if pairs and not any(id(t) in owned for pair in pairs for t in (pair.A, pair.B)):
        remedy = "Find the pairs in the model whose parameters these are."
        fail("pairs", "factors that are among the parameters", f"{len(pairs)} pairs of other tensors", remedy)
