"""Checks of what RefLoRAAdamW is asked for."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..contract import LoRAPair, check_backend, check_count, check_precision, fail


def check_hypers(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """At construction and before every step, since schedulers write param_groups; nan fails too."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_number(name, value)
    if not (0 <= lr < math.inf and 0 <= eps < math.inf and 0 <= weight_decay < math.inf):
        fail("lr, eps, weight_decay", "finite numbers >= 0", (lr, eps, weight_decay), "Use maximize=True for ascent.")
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
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()):
        remedy = "YAML reads 1e-4 as text and 1.0e-4 as a number." if isinstance(value, str) else "Pass a float."
        fail(name, "a number", typed(value), remedy, TypeError)


def typed(value: object) -> str:
    """How an error shows a value of the wrong type."""
    return f"{str(value)[:60]!r}, of type {type(value).__name__}"


def short(value: object) -> str:
    """A value of an option, without the tensors of a list of pairs."""
    return repr(value) if isinstance(value, (Real, str, type(None))) else f"a {type(value).__name__}"


def check_like_defaults(cls: type, options: Mapping[str, Any]) -> None:
    """Options of another optimizer class have the types of its defaults, where these are numbers or flags."""
    defaults = _defaults_of(cls)
    for name, value in options.items():
        default = defaults.get(name)
        if isinstance(default, bool):
            check_flags({name: value})
        elif isinstance(default, Real) or (name == "lr" and (value is not None or name not in defaults)):
            check_number(name, value)
        elif isinstance(default, tuple):
            if not isinstance(value, (tuple, list)) or len(value) != len(default):
                fail(name, f"{len(default)} values", typed(value), f"The defaults are {default}.", TypeError)
            for entry, like in zip(value, default):
                if isinstance(like, Real) and entry is not None:
                    check_number(name, entry)
        if name == "lr" and on_host(value) and not 0 <= float(value) < math.inf:
            fail("lr", "a finite number >= 0", value, "Use maximize=True for ascent.")


def on_host(value: Any) -> bool:
    """Whether it is a number that can be read without a wait for a device."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.device.type == "cpu")


@functools.cache
def _defaults_of(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def check_options(
    interval: int, warmup_steps: int | None, backend: str | None, precision: str, differentiable: bool
) -> None:
    check_schedule(interval, warmup_steps)
    check_backend(backend)
    check_precision(precision)
    if differentiable:
        fail("differentiable", "False", repr(differentiable), "The fused step has no derivative.")


def check_schedule(interval: int, warmup_steps: int | None) -> None:
    check_count("interval", interval, 1)
    if warmup_steps is not None:
        check_count("warmup_steps", warmup_steps, 0, "enters S gradually")


def check_storage(
    state_dtype: torch.dtype | None, master_weights: bool, stochastic_rounding: bool, carry_scalar: bool
) -> None:
    if state_dtype not in (None, torch.float32):
        fail(
            "state_dtype", "None or torch.float32", typed(state_dtype), "None keeps the moments in the factors' dtype."
        )
    if master_weights and stochastic_rounding:
        fail("stochastic_rounding", "False with master_weights=True", True, "Master weights lose nothing to rounding.")
    if carry_scalar:
        fail("carry_grams", "False with scalar=True", True, "RefLoRA-S needs no Grams.")


def check_flags(flags: dict[str, Any], or_none: bool = False) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool) and not (or_none and value is None):
            expected = "True, False or None" if or_none else "True or False"
            fail(name, expected, typed(value), "Text and numbers are no flags.", TypeError)


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


def check_added(group: Mapping[str, Any], names: Iterable[str]) -> None:
    """A group that is added later holds none of these options of the whole optimizer."""
    for name in names:
        if name in group:
            remedy = "It is the whole optimizer's: pass it to the constructor."
            fail("add_param_group", f"no {name!r}", short(group[name]), remedy)


def check_owned(groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Groups hold at least one factor of the pairs, if there are any."""
    owned = {id(p) for group in groups for p in group["params"]}
    if pairs and not any(id(t) in owned for pair in pairs for t in (pair.A, pair.B)):
        remedy = "Find the pairs in the model whose parameters these are."
        fail("pairs", "factors that are among the parameters", f"{len(pairs)} pairs of other tensors", remedy)
