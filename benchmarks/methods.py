"""The methods under test, each an optimizer over parameters of its own that take turns in one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .baselines import peft_riemannian, published_reflora

LABELS = {
    "lora": "LoRA",
    "reflora": "RefLoRA",
    "reflora-carried": "RefLoRA, carried Grams",
    "reflora-s": "RefLoRA-S",
    "published": "published RefLoRA",
    "published-s": "published RefLoRA-S",
    "riemannian": "PEFT Riemannian",
}
DEFAULT = ("lora", "reflora", "reflora-s", "published")


@dataclass(frozen=True)
class Setting:
    """Hyperparameters that all methods of a run share; warmup_steps are plain AdamW steps of the RefLoRA variants."""

    lr: float
    warmup_steps: int
    weight_decay: float = 0.01
    backend: str | None = None


def build(
    name: str, parameters: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], setting: Setting
) -> Optimizer:
    """The optimizer of the method `name` of LABELS. `parameters` include the factors of `pairs`."""
    common: dict[str, Any] = {"lr": setting.lr, "weight_decay": setting.weight_decay}
    if name in ("reflora", "reflora-carried", "reflora-s"):
        import reflora

        return reflora.RefLoRAAdamW(
            parameters,
            pairs=pairs,
            scalar=name == "reflora-s",
            carry_grams=name == "reflora-carried",
            warmup_steps=setting.warmup_steps,
            backend=setting.backend,
            **common,
        )
    if name == "riemannian":
        return peft_riemannian.optimizer(parameters, pairs, **common)
    optimizer = torch.optim.AdamW(parameters, fused=True, **common)
    if name in ("published", "published-s"):
        published_reflora.attach(optimizer, pairs, setting.warmup_steps, scalar=name == "published-s")
    return optimizer


def missing(names: Sequence[str]) -> str | None:
    """Why one of the methods cannot be built from what is installed, or None. For a parser to ask."""
    if "riemannian" in names:
        try:
            from peft.optimizers import create_riemannian_optimizer  # noqa: F401
        except ImportError as error:
            return f"--methods: riemannian needs a PEFT with create_riemannian_optimizer ({error})"
    return None


def unserved(backend: str | None, device: torch.device) -> str | None:
    """Why reflora's `backend` cannot serve `device`, or None. For a parser to ask before anything is loaded."""
    if backend is None:
        return None
    from reflora.backends import load

    reason = load(backend).unavailable(device)
    return f"--backend: expected one that can serve {device}, got {backend}: {reason}" if reason else None


class Trainables:
    """The trainable parameters of a model as places, so that several sets of values can share its frozen weights."""

    def __init__(self, model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]):
        self._slots = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        place = {id(parameter): index for index, (_, _, parameter) in enumerate(self._slots)}
        self._pairs = [(place[id(A)], place[id(B)]) for A, B in pairs]

    def copies(self) -> list[nn.Parameter]:
        """New parameters with the values that the model came with."""
        return [nn.Parameter(parameter.detach().clone()) for _, _, parameter in self._slots]

    def pairs(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The LoRA pairs among `parameters`."""
        return [(parameters[a], parameters[b]) for a, b in self._pairs]

    def install(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make `parameters` the ones that the model uses."""
        for (module, name, _), parameter in zip(self._slots, parameters, strict=True):
            module._parameters[name] = parameter
