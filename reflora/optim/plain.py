"""Parameters in no active pair, by torch's own fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..engine import mark_written
from .scaler import Scaler
from .state import LIKE_TORCH, MASTER, Storage, fit, init_param

State = MutableMapping[Tensor, Any]
# a parameter's gradient, or None
GradOf = Callable[[Tensor], Tensor | None]
ADAMW = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def step_stray(
    state: State, param: Tensor, storage: Storage, grad_of: GradOf, group: dict[str, Any], scaler: Scaler, check: bool
) -> None:
    """One step of a factor whose partner has no gradient; with check, none if it or its gradient is not finite."""
    grad, (scale, found_inf) = grad_of(param), scaler.on(param.device)
    if check and grad is not None:
        bad = (~(grad.isfinite().all() & param.detach().isfinite().all())).float()
        found_inf = bad if found_inf is None else torch.maximum(bad, found_inf)
    step_plain(state, [(param, storage)], grad_of, group, Scaler(scale, found_inf))


def prepare_plain(
    state: State, params: Sequence[Tensor], grad_of: GradOf, amsgrad: bool, storage: Storage = LIKE_TORCH
) -> None:
    """Make or fit the state of those with a gradient, before anything is written: this is what may fail."""
    for p in params:
        if grad_of(p) is not None:
            init_param(state[p], p, amsgrad, 1, storage)
            fit(state[p], p, 1, storage)


def step_plain(
    state: State, params: Sequence[tuple[Tensor, Storage]], grad_of: GradOf, group: dict[str, Any], scaler: Scaler
) -> None:
    """One step of the parameters that have a gradient; each comes with how its moments are stored."""
    stepped = [(p, storage) for p, storage in params if grad_of(p) is not None]
    for p, storage in stepped:
        prepare_plain(state, [p], grad_of, group["amsgrad"], storage)
    for device in {p.device for p, _ in stepped}:
        own = [p for p, _ in stepped if p.device == device]
        _step_device([state[p] for p in own], own, [grad_of(p) for p in own], group, scaler.on(device))


def _step_device(
    states: list[dict[str, Any]], params: list[Tensor], grads: Sequence[Tensor | None], group: dict[str, Any],
    scaler: Scaler,
) -> None:  # fmt: skip
    # a factor whose moments have another dtype is stepped in that dtype
    wide = [_wide(p.detach(), state) for p, state in zip(params, states)]
    like = [grad.to(w.dtype) for grad, w in zip(grads, wide) if grad is not None]
    firsts, seconds, largest = ([state[name] for state in states if name in state] for name in ADAMW)
    has_complex = any(p.is_complex() for p in params)
    device = params[0].device.type
    fused = device in FUSED_DEVICES and not has_complex
    adamw(
        wide, like, firsts, seconds, largest if group["amsgrad"] else [], [state["step"] for state in states],
        fused=fused, foreach=not fused, capturable=device == "cuda",
        grad_scale=scaler.grad_scale, found_inf=scaler.found_inf, has_complex=has_complex,
        amsgrad=group["amsgrad"], maximize=group["maximize"], beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"] if fused else float(group["lr"]), weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    for p, w in zip(params, wide):
        if w.data_ptr() != p.data_ptr():
            p.copy_(w)
    mark_written(params)  # torch's fused AdamW does not


def _wide(p: Tensor, state: dict[str, Any]) -> Tensor:
    """The weights to step, in their moments' dtype: the master weights where they still round to the factor."""
    if MASTER not in state:
        return p.to(state["exp_avg"].dtype)
    master: Tensor = state[MASTER]
    return master.copy_(master.where(master.to(p.dtype) == p, p.to(master.dtype)))
