"""How trainers that are not among the requirements make their optimizers: enough of each to run a recipe on.

Each follows the calling code of the release that it names; docs/howto/trainers_by_name.md says what was run on the
releases themselves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer


def create_custom_optimizer(*_: Any) -> Any:
    """LLaMA-Factory 0.9.5, imported by every `train/*/trainer.py`: None leaves it to Trainer."""
    return None


class LlamaFactory095(Trainer):
    """Its trainers look for it in their module."""

    finetuning_args = SimpleNamespace(loraplus_lr_ratio=None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = create_custom_optimizer(self.model, self.args, self.finetuning_args)
        return super().create_optimizer(*args, **kwargs)


class OptimizerPlugin:
    """LLaMA-Factory 0.9.5, `v1/utils/plugin.py`: functions by name."""

    registered: dict[str, Callable[..., Any]] = {}

    def __init__(self, name: str):
        self.name = name

    def register(self) -> Callable[..., Any]:
        return lambda function: self.registered.setdefault(self.name, function)

    def __call__(self, *args: Any) -> Any:
        return self.registered[self.name](*args)


class OptimizerCallback:
    """ms-swift 4.6.0, `optimizers/base.py`: made by name with the trainer's arguments and the trainer."""

    def __init__(self, args: Any, trainer: Any):
        self.args, self.trainer = args, trainer


class Swift460(Trainer):
    """ms-swift 4.6.0, `trainers/mixin.py`: empty groups are dropped of what a callback has made."""

    optimizers_map: dict[str, type[OptimizerCallback]] = {}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        callback: Any = self.optimizers_map["reflora"](self.args, self)
        self.optimizer = callback.create_optimizer(model=model)
        self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
        return self.optimizer


class Unsloth20261009(Trainer):
    """unsloth 2026.10.9: embeddings and parameters without decay in groups of their own, for a class and keywords.

    With neither `embedding_learning_rate` nor `loraplus_lr_ratio` it is Trainer.
    """

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        rate, ratio = (getattr(self.args, name, None) for name in ("embedding_learning_rate", "loraplus_lr_ratio"))
        if (rate is None and ratio is None) or self.optimizer is not None:
            return super().create_optimizer(model)
        decayed, groups = self.get_decay_parameter_names(self.model), {}
        for name, param in self.model.named_parameters():
            embedding = name.endswith("modules_to_save.default.weight")
            if param.requires_grad:
                key = embedding, ratio is not None and ".lora_B." in name, name in decayed
                groups.setdefault(key, []).append(param)
        cls, options = self.optimizer_cls_and_kwargs
        lr = options["lr"]
        self.optimizer = cls(
            [
                {
                    "params": params,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                    "lr": rate or lr if embedding else lr * ratio if plus else lr,
                }
                for (embedding, plus, decays), params in groups.items()
            ],
            **options,
        )
        return self.optimizer


@dataclass
class ParamGroupConfig:
    """torchtitan 0.3.0: the parameters whose names a pattern is found in, and what their optimizer is made with."""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer:
    """torchtitan 0.3.0, `components/optimizer`: one optimizer per model part, and a flat state by parameters' names."""

    @dataclass
    class Config:
        owner: ClassVar[Any] = None
        param_groups: list[ParamGroupConfig] = field(default_factory=list)
        implementation: str = "fused"

        def build(self, model_parts: list[nn.Module]) -> OptimizersContainer:
            return self.owner(self, model_parts=model_parts)

    def __init_subclass__(cls) -> None:
        """A subclass without a Config of its own is not what its parent's Config builds."""
        if "Config" in vars(cls):
            cls.Config.owner = cls

    def __init__(self, config: Config, *, model_parts: list[nn.Module]):
        self.model_parts = model_parts
        how = {name: config.implementation == name for name in ("fused", "foreach")}
        self.optimizers = []
        for part in model_parts:
            groups = []
            for group in config.param_groups:
                named = [(n, p) for n, p in part.named_parameters() if p.requires_grad and re.search(group.pattern, n)]
                names, params = (list(column) for column in zip(*named))
                groups.append({"params": params, "param_names": names, **how, **group.optimizer_kwargs})
            self.optimizers.append(self._resolve_optimizer_factory(config.param_groups[0].optimizer_name)(groups))

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        return {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for optimizer in self.optimizers:
            self._make_state(optimizer)
            groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]
            for group, live in zip(groups, optimizer.param_groups):
                for name, param in zip(group["param_names"], live["params"]):
                    found |= {f"state.{name}.{key}": value for key, value in optimizer.state[param].items()}
                    words = group.keys() - {"params", "param_names"}
                    found |= {f"param_groups.{name}.{key}": group[key] for key in words}
        return found

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        """What the optimizer's own state, made by a step of zeros, has names for; a name that is missing raises."""
        for optimizer in self.optimizers:
            self._make_state(optimizer)
            groups, state, count = [], {}, 0
            for group in optimizer.param_groups:
                names = group["param_names"]
                for name, param in zip(names, group["params"]):
                    state[count] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state.get(param, ())}
                    count += 1
                words = group.keys() - {"params", "param_names"}
                kept = {key: flat[f"param_groups.{names[0]}.{key}"] for key in words}
                groups.append({"params": list(range(count - len(names), count)), **kept})
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    @staticmethod
    def _make_state(optimizer: torch.optim.Optimizer) -> None:
        if optimizer.state:
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        optimizer.zero_grad()


OptimizersContainer.Config.owner = OptimizersContainer


class LoRALinear(nn.Linear):
    """torchtitan 0.3.0, `components/lora.py`: a frozen layer with two of its own beside it."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out)
        self.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(n_in, 3, bias=False), nn.Linear(3, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_b(self.lora_a(x))


class Part(nn.Module):
    """A stage of a pipeline: the layers keep the numbers they have in the whole."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def parts() -> list[nn.Module]:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {str(i): LoRALinear(8, 8) for i in range(4)}
    return [Part({i: layers[i] for i in "01"}), Part({i: layers[i] for i in "23"})]


def module(name: str, **names: Any) -> None:
    """An entry in sys.modules, with those of its packages that are not there yet."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        sys.modules.setdefault(path, ModuleType(path))
    vars(sys.modules[name]).update(names)
