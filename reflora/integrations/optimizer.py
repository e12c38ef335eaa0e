"""`create_reflora_optimizer`, in the convention of `peft.optimizers.create_riemannian_optimizer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..optim.adamw import RefLoRAAdamW
from ..optim.wrapper import reflora_class
from .peft import find_pairs

# how torch's own AdamW computes, not what: RefLoRAAdamW is one fused call whatever they say
_IMPLEMENTATIONS = ("fused", "foreach")


def create_reflora_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] | None = None,
    *,
    lr: float,
    scalar: bool = False,
    interval: int = 1,
    warmup_steps: int = 0,
    backend: str | None = None,
    precision: str = "float64",
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over the trainable parameters of `model` that steps its LoRA pairs as RefLoRA does.

    optimizer_cls: None and torch.optim.AdamW both give RefLoRAAdamW, which is AdamW with the preconditioning fused in
        (torch's `fused` and `foreach` are accepted and change nothing). Any other class gives a subclass of it that
        preconditions inside `step`: see `reflora.optim.wrapper.Wrapped` for what that costs.
    kwargs: for the optimizer, such as betas, weight_decay or momentum.

    The other arguments are RefLoRAAdamW's. Parameters in no pair take plain steps. Raises as `find_pairs`, ValueError
    for a class whose closure is required or, with scalar=True, whose state cannot be moved, TypeError for no optimizer
    class.
    """
    if optimizer_cls is None or optimizer_cls is torch.optim.AdamW:
        optimizer_cls = RefLoRAAdamW
        kwargs = {name: value for name, value in kwargs.items() if name not in _IMPLEMENTATIONS}
    is_ours = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, RefLoRAAdamW)
    cls: Any = optimizer_cls if is_ours else reflora_class(optimizer_cls)
    params = [param for param in model.parameters() if param.requires_grad]
    return cls(
        params, pairs=find_pairs(model), lr=lr, scalar=scalar, interval=interval, warmup_steps=warmup_steps,
        backend=backend, precision=precision, **kwargs,
    )  # fmt: skip
