"""The state RefLoRAAdamW keeps for a parameter: how it is made, and how a loaded one is fitted to its parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import LoRAPair, fail

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
PHASE, SAVED = "reflora_phase", "reflora_S"


def zeros_like(param: Tensor) -> Tensor:
    """Zeros with the parameter's own strides, which the kernels rely on."""
    zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
    if zeros.stride() != param.stride():
        zeros = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device).zero_()
    return zeros


def init_param(state: dict[str, Any], param: Tensor, amsgrad: bool, experts: int) -> None:
    """torch.optim.AdamW's entries; `step` has one count an expert for experts pairs, `[E]`, else it is a scalar."""
    if "step" not in state:
        state["step"] = torch.zeros((experts,) if experts > 1 else (), dtype=torch.float32, device=param.device)
    for name in MOMENTS[: 3 if amsgrad else 2]:
        if name not in state:
            state[name] = zeros_like(param)


def init_pair(state: dict[str, Any], pair: LoRAPair, keep_S: bool) -> None:
    """Entries of A for its pair.

    reflora_phase `[E]` float32: 1 where the moments are in units of a refactored layer, 0 where S = I was last used.
    reflora_S `[E, 2, r, r]`: the last S and S^-1, kept only for interval > 1.
    """
    device, experts, r = pair.A.device, pair.experts, pair.rank
    if PHASE not in state:
        state[PHASE] = torch.zeros(experts, dtype=torch.float32, device=device)
    if keep_S and SAVED not in state:
        dtype = torch.float64 if pair.A.dtype == torch.float64 else torch.float32
        state[SAVED] = torch.eye(r, dtype=dtype, device=device).expand(experts, 2, r, r).contiguous()


def adopt(state: dict[str, Any], raw: dict[str, Any], param: Tensor, experts: int) -> None:
    """Fit a loaded state to its parameter.

    torch casts every loaded tensor to the parameter's dtype, which would round S and the phase: take those from `raw`.
    Raises ValueError for a moment whose shape is not the parameter's.
    """
    for name in MOMENTS:
        if name not in state:
            continue
        if state[name].shape != param.shape:
            remedy = "The state belongs to another model or rank."
            fail(f"loaded state {name!r}", tuple(param.shape), tuple(state[name].shape), remedy)
        if state[name].stride() != param.stride():
            state[name] = zeros_like(param).copy_(state[name])
    if "step" in state:
        step = torch.as_tensor(raw["step"]).to(device=param.device, dtype=torch.float32)
        state["step"] = (step.expand(experts) if experts > 1 else step.reshape(())).clone()
    for name in (PHASE, SAVED):
        if name in raw:
            state[name] = raw[name].to(param.device).clone()
