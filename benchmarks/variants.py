"""What of a model is trained: LoRA and its relatives as PEFT builds them, all weights, or the biases alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models import Loaded

NAMES = ("lora", "dora", "pissa", "adalora", "full", "bitfit")
HEADS = ("classifier", "score")  # what transformers calls the part that no checkpoint has


@dataclass(frozen=True)
class Adapter:
    """LoRA's size and place, drawn from `seed`; steps: of the whole training, of which AdaLoRA makes a schedule.

    dropout: in front of A.
    """

    rank: int
    alpha: int
    targets: str | tuple[str, ...]
    seed: int
    steps: int
    dropout: float = 0.0


def build(name: str, loaded: Loaded, adapter: Adapter) -> nn.Module:
    """The variant `name` of NAMES: frozen weights shared with `loaded` and all other variants, the trainable ones new.

    PiSSA and full fine-tuning change every weight and get copies. Raises ValueError for targets that name no layer,
    RuntimeError for a model without biases under "bitfit" and where memory is short.
    """
    own = name in ("pissa", "full")
    shared = {} if own else {id(t): t for t in (*loaded.model.parameters(), *loaded.model.buffers())}
    model = copy.deepcopy(loaded.model, shared)
    if name == "full":
        return model.requires_grad_(True)
    if name == "bitfit":
        return _with_own_biases(model)
    _check_targets(model, adapter.targets)
    from peft import get_peft_model

    torch.manual_seed(adapter.seed)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute that has been renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return get_peft_model(model, _config(name, loaded.kind, adapter))


def _check_targets(model: nn.Module, targets: str | tuple[str, ...]) -> None:
    """PEFT asks for one match alone, and a slip in the others would go unseen."""
    paths = [f".{path}" for path, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets:
        if not target or not any(path.endswith(f".{target}") for path in paths):
            raise ValueError(f"--targets: expected names of layers, got {target!r}, which no layer has.")


def _config(name: str, kind: str, adapter: Adapter) -> Any:
    from peft import AdaLoraConfig, LoraConfig

    options: dict[str, Any] = {
        "task_type": {"text": "SEQ_CLS", "causal": "CAUSAL_LM", "image": None}[kind],
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        "modules_to_save": list(HEADS[:1]) if kind == "image" else None,
    }
    if name == "adalora":
        # the budget is spent until the last step: past it an iteration costs less
        start, last = adapter.steps // 10, 1
        size = {"init_r": -(-3 * adapter.rank // 2), "target_r": adapter.rank}
        return AdaLoraConfig(**options, **size, total_step=max(adapter.steps, 3), tinit=start, tfinal=last)
    more = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa_niter_4"}}.get(name, {})
    return LoraConfig(**options, r=adapter.rank, **more)


def _with_own_biases(model: nn.Module) -> nn.Module:
    """New parameters for the biases and for what the head consists of."""
    found = False
    for path, module in model.named_modules():
        head = any(part in HEADS for part in path.split("."))
        for name, parameter in module._parameters.items():
            if parameter is not None and (name == "bias" or head):
                found |= name == "bias" and not head
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    if not found:
        raise RuntimeError("bitfit trains biases, and this model has none")
    return model


def forward_of(model: nn.Module) -> nn.Module:
    """What to call with a batch: AdaLoRA's penalty is added by a module that some of PEFT's wrappers go around."""
    config = getattr(model, "peft_config", {}).get("default")
    return model.base_model if config is not None and config.peft_type == "ADALORA" else model


def pairs_of(model: nn.Module, adapter: str = "default") -> list[tuple[Tensor, Tensor]]:
    """`(A [r, n_in], B [n_out, r])` of every PEFT layer that has the adapter: all that a baseline needs to know."""
    return [(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for layer in _layers(model, adapter)]


def base_weights(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    """The frozen `W [n_out, n_in]` of each pair, in the order of `pairs_of`."""
    return [layer.get_base_layer().weight for layer in _layers(model, adapter)]


def _layers(model: nn.Module, adapter: str) -> list[Any]:
    sides = ("lora_A", "lora_B")
    return [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, side, None), nn.ModuleDict) for side in sides) and adapter in module.lora_A
    ]


class Trainables:
    """The trainable parameters of a model as places, so that several sets of values can share its frozen weights."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._slots = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        # a weight that is tied has several places, and stays tied
        self._distinct = list({id(parameter): parameter for _, _, parameter in self._slots}.values())
        self._place = {id(parameter): index for index, parameter in enumerate(self._distinct)}
        self._pairs = [(self._place[id(A)], self._place[id(B)]) for A, B in pairs_of(model)]

    def copies(self) -> list[nn.Parameter]:
        """New parameters with the values that the model came with."""
        return [nn.Parameter(parameter.detach().clone()) for parameter in self._distinct]

    def pairs(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The LoRA pairs among `parameters`."""
        return [(parameters[a], parameters[b]) for a, b in self._pairs]

    def install(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make `parameters` the ones that the model uses."""
        for module, name, original in self._slots:
            module._parameters[name] = parameters[self._place[id(original)]]
