"""What a torch.amp.GradScaler leaves on an optimizer whose step unscales by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Scaler(NamedTuple):
    """float32 scalars; None: no scaler, or one that has unscaled already."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(cls, optimizer: Any) -> Scaler:
        return cls(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    def on(self, device: torch.device) -> Scaler:
        return Scaler(*(None if v is None else v.to(device=device, dtype=torch.float32) for v in self))


def watched(optimizer: Any) -> bool:
    """Whether accelerate wraps `step` to see if a GradScaler calls it: only a call left out tells it of a skip.

    The scaler must then decide by itself, as it does for optimizers that cannot, at the cost of a sync.
    """
    return getattr(vars(optimizer).get("step"), "__module__", None) == "accelerate.optimizer"
