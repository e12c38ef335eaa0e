"""Parameters in no active pair, by torch's own fused AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..engine import mark_written
from .state import LIKE_TORCH, MASTER, MOMENTS, Storage, fit, init_param

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def amp_scalar(optimizer: Any, name: str, device: torch.device) -> Tensor | None:
    """grad_scale or found_inf, where a gradient scaler has left them, as float32 on `device`."""
    value = getattr(optimizer, name, None)
    return None if value is None else value.to(device=device, dtype=torch.float32)


def step_stray(optimizer: Any, param: Tensor, storage: Storage, group: dict[str, Any], check: bool) -> None:
    """One step of a factor whose partner has no gradient; none, for check, where it or its gradient is not finite."""
    found_inf = amp_scalar(optimizer, "found_inf", param.device)
    if check and param.grad is not None:
        bad = ~(param.grad.isfinite().all() & param.detach().isfinite().all())
        found_inf = bad.float() if found_inf is None else torch.maximum(bad.float(), found_inf)
    step_plain(optimizer, [(param, storage)], group, found_inf)


def prepare_plain(optimizer: Any, params: Sequence[Tensor], amsgrad: bool, storage: Storage = LIKE_TORCH) -> None:
    """Make or fit the state of those with a gradient, in front of everything that writes: it is what may fail."""
    for p in params:
        if p.grad is not None:
            init_param(optimizer.state[p], p, amsgrad, 1, storage)
            fit(optimizer.state[p], p, 1, storage)


def step_plain(
    optimizer: Any, params: Sequence[tuple[Tensor, Storage]], group: dict[str, Any], found_inf: Tensor | None = None
) -> None:
    """One step of the parameters that have a gradient; each comes with how its moments are stored.

    found_inf: float32 scalar, not 0 for no step at all; None: what a gradient scaler has left.
    """
    stepped = [(p, storage) for p, storage in params if p.grad is not None]
    for p, storage in stepped:
        prepare_plain(optimizer, [p], group["amsgrad"], storage)
    for device in {p.device for p, _ in stepped}:
        found = amp_scalar(optimizer, "found_inf", device) if found_inf is None else found_inf
        _step_device(optimizer, [p for p, _ in stepped if p.device == device], device, group, found)


def _step_device(
    optimizer: Any, params: list[Tensor], device: torch.device, group: dict[str, Any], found_inf: Tensor | None
) -> None:
    states = [optimizer.state[p] for p in params]
    # a factor with its moments in another type is stepped in that type
    wide = [_wide(p.detach(), state) for p, state in zip(params, states)]
    grads = [p.grad.to(w.dtype) for p, w in zip(params, wide) if p.grad is not None]
    firsts, seconds, largest = ([state.get(name) for state in states] for name in MOMENTS)
    has_complex = any(p.is_complex() for p in params)
    fused = device.type in FUSED_DEVICES and not has_complex
    adamw(
        wide, grads, firsts, seconds, largest if group["amsgrad"] else [], [state["step"] for state in states],
        fused=fused, foreach=not fused, capturable=device.type == "cuda",
        grad_scale=amp_scalar(optimizer, "grad_scale", device),
        found_inf=found_inf, has_complex=has_complex,
        amsgrad=group["amsgrad"], maximize=group["maximize"], beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"] if fused else float(group["lr"]), weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
    for p, w in zip(params, wide):
        if w.data_ptr() != p.data_ptr():
            p.copy_(w)
    mark_written(params)  # torch's fused AdamW does not


def _wide(p: Tensor, state: dict[str, Any]) -> Tensor:
    """What is stepped: the weights in their moments' type, the master weights where they still round to the factor."""
    if MASTER not in state:
        return p.to(state["exp_avg"].dtype)
    master: Tensor = state[MASTER]
    return master.copy_(master.where(master.to(p.dtype) == p, p.to(master.dtype)))


def watched(optimizer: Any) -> bool:
    """Whether accelerate stands in front of `step`, to see whether a GradScaler calls it: only a skipped call tells it.

    The scaler must then decide by itself, as it does for optimizers that cannot, and pays its wait for the device.
    """
    return getattr(vars(optimizer).get("step"), "__module__", None) == "accelerate.optimizer"
