"""Optimizer state carried to refactored factors: which entries are in units of the gradient, and to which power.

Refactoring by the scalar s multiplies A by sqrt(s), hence A's gradients by 1 / sqrt(s), and does the reverse for B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from ..checks import fail
from ..pairs import LoRAPair, is_sharded, local

ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
POWERS: dict[type[Optimizer], dict[str, int]] = {
    Adam: ADAM, AdamW: ADAM, NAdam: ADAM, RAdam: ADAM, SGD: {"momentum_buffer": 1},
}  # fmt: skip
# counts and schedules, which do not depend on the gradient's unit
UNITLESS = ("step", "mu_product")
OWN = "reflora_"


def movable(cls: type[Optimizer]) -> bool:
    """Whether the state of `cls` is in the table, its own or a parent's."""
    return any(parent in POWERS for parent in cls.__mro__)


def proportional(cls: type[Optimizer]) -> bool:
    """Whether the steps of `cls` grow with the gradient, so that the scale of S is part of them."""
    return issubclass(cls, (SGD, ASGD))


def check_movable(cls: type[Optimizer]) -> None:
    """Raises ValueError for a class whose state is unknown."""
    if not movable(cls):
        known = ", ".join(parent.__name__ for parent in POWERS)
        remedy = "Use one of these or RefLoRAAdamW, or the full RefLoRA (scalar=False), which moves no state."
        fail(f"RefLoRA-S over {cls.__name__}", f"an optimizer whose state can be moved ({known})", cls.__name__, remedy)


class Transport:
    """The optimizer state in units of the gradients of `pairs`, gathered before anything changes.

    Parameters without state are left alone; with_grads includes `.grad`. A class outside the table is supported if its
    state has Adam's names and shapes (8-bit state does not). Raises ValueError for state that cannot be moved.
    """

    def __init__(self, optimizer: Optimizer, pairs: Sequence[LoRAPair], with_grads: bool = False):
        self.tensors: list[list[Tensor]] = []
        self.units: list[tuple[int, int]] = []
        for index, pair in enumerate(pairs):
            for param, views, sign in ((pair.A, pair.views_A, -1), (pair.B, pair.views_B, 1)):
                entries = _entries(optimizer, pair.name, param)
                if with_grads and param.grad is not None:
                    entries.append((param.grad, 1))
                for tensor, power in entries:
                    self.tensors.append(views(local(tensor)) if pair.experts > 1 else [local(tensor)])
                    self.units.append((index, sign * power))

    def apply(self, roots: Sequence[Tensor]) -> None:
        """Multiply by powers of sqrt(s); `roots[i]` float64 `[experts]` of pair i."""
        factors = [factor for index, power in self.units for factor in (roots[index] ** power).unbind()]
        if factors:
            torch._foreach_mul_([piece for pieces in self.tensors for piece in pieces], factors)


def _entries(optimizer: Optimizer, name: str, param: Tensor) -> list[tuple[Tensor, int]]:
    """The parts of a parameter's state in units of its gradient, with the power of the unit."""
    state: Mapping[str, Any] = optimizer.state.get(param, {})
    powers = next((POWERS[cls] for cls in type(optimizer).__mro__ if cls in POWERS), ADAM)
    entries = []
    for key, value in state.items():
        if key in UNITLESS or key.startswith(OWN) or value is None:
            continue
        plain = (
            (type(value) is Tensor or is_sharded(value)) and value.shape == param.shape and value.is_floating_point()
        )
        if key not in powers or not plain:
            what = f"{key!r} of type {type(value).__name__}"
            remedy = "Use Adam, AdamW, NAdam, RAdam or SGD, or the full RefLoRA (scalar=False), which moves no state."
            fail(f"{name}, state of {type(optimizer).__name__}", f"only {', '.join(powers)}", what, remedy)
        entries.append((value, powers[key]))
    return entries
