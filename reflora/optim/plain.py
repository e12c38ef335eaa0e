"""Parameters in no active pair, by torch's own fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..constants import STORAGE_DTYPES
from ..engine import mark_written
from ..overlap import extent
from .scaler import Scaler
from .state import LIKE_TORCH, MASTER, fit, init_param

State = MutableMapping[Tensor, Any]
# a parameter's gradient, or None
GradOf = Callable[[Tensor], Tensor | None]
TORCH_STEPS = {*STORAGE_DTYPES, torch.complex32, torch.complex64, torch.complex128}
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def step_stray(
    state: State, param: Tensor, grad_of: GradOf, group: dict[str, Any], scaler: Scaler, check: bool
) -> None:
    """One step of a factor whose partner has no gradient; with check, none if it or its gradient is not finite."""
    grad, (scale, found_inf) = grad_of(param), scaler.on(param.device)
    if check and grad is not None:
        bad = (~(grad.isfinite().all() & param.detach().isfinite().all())).float()
        found_inf = bad if found_inf is None else torch.maximum(bad, found_inf)
    step_plain(state, [param], grad_of, group, Scaler(scale, found_inf))


def prepare_plain(state: State, params: Sequence[Tensor], grad_of: GradOf, amsgrad: bool) -> None:
    """Make or fit the state of those with a gradient."""
    for p in params:
        if grad_of(p) is not None:
            init_param(state[p], p, amsgrad, 1, LIKE_TORCH)
            fit(state[p], p, 1, LIKE_TORCH)


def step_plain(
    state: State, params: Sequence[Tensor], grad_of: GradOf, group: dict[str, Any], scaler: Scaler
) -> None:  # fmt: skip
    """One step of the parameters that have a gradient. Their state is prepared."""
    stepped = [p for p in params if grad_of(p) is not None]
    for device in {p.device for p in stepped}:
        own = [p for p in stepped if p.device == device]
        _step_device([state[p] for p in own], own, [grad_of(p) for p in own], group, scaler.on(device))


def _step_device(
    states: list[dict[str, Any]], params: list[Tensor], grads: Sequence[Tensor | None], group: dict[str, Any],
    scaler: Scaler,
) -> None:  # fmt: skip
    has_complex = any(p.is_complex() for p in params)
    device = params[0].device.type
    fused = device in FUSED_DEVICES and not has_complex
    names = LIKE_TORCH.moments_of(group["amsgrad"])
    rows = [_row(p.detach(), grad, state, names) for p, grad, state in zip(params, grads, states) if grad is not None]
    # torch's fused step goes through memory in order, whatever the strides
    stepped = [row if _in_one_order(row) else [t.contiguous() for t in row] for row in rows]
    wide, like, firsts, seconds, *largest = map(list, zip(*stepped))
    counts = [state["step"] for state in states]
    # a factor of experts, whose partner has no gradient, has one per expert
    counted = [count.max() if count.dim() else count for count in counts]
    lr = group["lr"] if fused and isinstance(group["lr"], Tensor) else float(group["lr"])
    adamw(
        wide, like, firsts, seconds, largest[0] if largest else [], counted,
        fused=fused, foreach=not fused, capturable=device == "cuda",
        grad_scale=scaler.grad_scale, found_inf=scaler.found_inf, has_complex=has_complex,
        amsgrad=group["amsgrad"], maximize=group["maximize"], lr=lr, weight_decay=float(group["weight_decay"]),
        beta1=float(group["betas"][0]), beta2=float(group["betas"][1]), eps=float(group["eps"]),
    )  # fmt: skip
    for count, now in zip(counts, counted):
        if count.dim():
            count += now - count.max()
    for p, row, own in zip(params, rows, stepped):
        for t, made in zip((row[0], *row[2:]), (own[0], *own[2:])):
            if made is not t:
                t.copy_(made)
        if row[0].data_ptr() != p.data_ptr():
            p.copy_(row[0])
    mark_written(params)  # torch's fused AdamW does not


def _row(p: Tensor, grad: Tensor, state: dict[str, Any], names: Sequence[str]) -> list[Tensor]:
    """Weights, gradient and moments, in the dtype of the moments: a factor's may be wider than its own."""
    wide = _wide(p, state)
    return [wide, grad.to(wide.dtype).resolve_conj().resolve_neg(), *(state[name] for name in names)]


def _in_one_order(tensors: Sequence[Tensor]) -> bool:
    """Whether all of a parameter's tensors have its elements in one order of memory, without gaps."""
    begin, end = extent(tensors[0])
    return end - begin == tensors[0].nbytes and len({t.stride() for t in tensors}) == 1


def _wide(p: Tensor, state: dict[str, Any]) -> Tensor:
    """The weights to step, in their moments' dtype: the master weights where they still round to the factor."""
    if MASTER not in state:
        return p.to(state["exp_avg"].dtype)
    master: Tensor = state[MASTER]
    return master.copy_(master.where(master.to(p.dtype) == p, p.to(master.dtype)))
