"""torchtitan's containers (one optimizer per model part, a flat state by name) and accelerate: a plain loop's steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from distributed_cases import assert_equal
from peft import LoraConfig, inject_adapter_in_model
from stand_ins import LoRALinear, Part, parts
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import reflora

RATE = {"lr": 1e-2, "weight_decay": 0.1}


def torchtitan() -> Any:
    """Its own module where it is installed."""
    try:
        return import_module("torchtitan.components.optimizer")
    except ImportError:
        return import_module("stand_ins")


def pairs_of(model_parts: list[nn.Module], params: set[nn.Parameter]) -> list[reflora.LoRAPair]:
    return [
        reflora.LoRAPair(name, module.lora_a.weight, module.lora_b.weight)
        for part in model_parts for name, module in part.named_modules()
        if isinstance(module, LoRALinear) and module.lora_a.weight in params
    ]  # fmt: skip


def factory(cls: Callable[..., Any], model_parts: list[nn.Module], **options: Any) -> Callable[..., Any]:
    def make(groups: list[dict[str, Any]], **more: Any) -> torch.optim.Optimizer:
        params = {param for group in groups for param in group["params"]}
        return cls(groups, pairs=pairs_of(model_parts, params), **options, **more)

    return make


def container(model_parts: list[nn.Module], cls: Callable[..., Any], **options: Any) -> Any:
    """The page's recipe: a container that knows its parts when it is asked for a class."""
    base: Any = torchtitan().OptimizersContainer

    class RefLoRAOptimizers(base):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):  # type: ignore[misc]
            pass

        def _resolve_optimizer_factory(self, name: str) -> Callable[..., Any]:
            return factory(cls, self.model_parts, **options)

    groups = [torchtitan().ParamGroupConfig(pattern="lora_", optimizer_name="AdamW", optimizer_kwargs=RATE)]
    config = RefLoRAOptimizers.Config(param_groups=groups, implementation="for-loop")
    return config.build(model_parts=model_parts)


def train(model_parts: list[nn.Module], optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.Sequential(*model_parts)(x).square().mean().backward()
        optimizer.step()


def weights(model_parts: list[nn.Module]) -> list[Tensor]:
    return [p.detach().clone() for part in model_parts for p in part.parameters()]


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "RefLoRAAdamW": (reflora.RefLoRAAdamW, {}),
    "RefLoRA-S": (reflora.RefLoRAAdamW, {"scalar": True}),
    "interval": (reflora.RefLoRAAdamW, {"interval": 2}),
    "wrap(AdamW)": (reflora.wrap(torch.optim.AdamW), {}),
    "wrap(AdamW), scalar": (reflora.wrap(torch.optim.AdamW), {"scalar": True}),
    "InvariantAdamW": (reflora.InvariantAdamW, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_optimizer_per_model_part(kind: str) -> None:
    """Two parts, each with its own optimizer, take the steps of one optimizer over both."""
    cls, options = KINDS[kind]
    mine, whole = parts(), parts()
    train(mine, container(mine, cls, **options), range(6))
    params = [p for part in whole for p in part.parameters() if p.requires_grad]
    train(whole, cls(params, pairs=pairs_of(whole, set(params)), **RATE, **options), range(6))
    assert_equal(weights(mine), weights(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_state_continues_bit_for_bit(kind: str) -> None:
    """Weights, then the state that the container keeps by parameters' names, in a new process's objects."""
    cls, options = KINDS[kind]
    mine, again = parts(), parts()
    optimizer = container(mine, cls, **options)
    train(mine, optimizer, range(3))
    saved = copy.deepcopy(([part.state_dict() for part in mine], optimizer.state_dict()))
    train(mine, optimizer, range(3, 6))
    resumed = container(again, cls, **options)
    for part, state in zip(again, saved[0]):
        part.load_state_dict(state)
    resumed.load_state_dict(saved[1])
    assert_equal(weights(again), [tensor for state in saved[0] for tensor in state.values()])
    train(again, resumed, range(3, 6))
    assert_equal(weights(again), weights(mine))


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_flattened_state_of_parts_continues_bit_for_bit(kind: str) -> None:
    """One dictionary for the optimizers of both parts, as containers made it before torchtitan 0.3."""
    cls, options = KINDS[kind]
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    mine, again = parts(), parts()
    optimizer = container(mine, cls, **options)
    train(mine, optimizer, range(3))
    saved: dict[str, Any] = {}
    for part, one in zip(mine, optimizer.optimizers):
        saved |= copy.deepcopy(get_optimizer_state_dict(part, one, options=flat))
    before = copy.deepcopy([part.state_dict() for part in mine])
    train(mine, optimizer, range(3, 6))
    resumed = container(again, cls, **options)
    for part, state, one in zip(again, before, resumed.optimizers):
        part.load_state_dict(state)
        set_optimizer_state_dict(part, one, saved, options=flat)
    train(again, resumed, range(3, 6))
    assert_equal(weights(again), weights(mine))


def peft_parts() -> list[nn.Module]:
    """Stages with PEFT's layers, B random."""
    torch.manual_seed(0)
    layers = {str(i): nn.Linear(8, 8) for i in range(4)}
    config = LoraConfig(r=3, target_modules=["0", "1", "2", "3"], init_lora_weights="gaussian")
    made = [inject_adapter_in_model(config, Part({i: layers[i] for i in chosen})) for chosen in ("01", "23")]
    for part in made:
        for name, param in part.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param)
    return made


def test_gradient_hooks_in_front_of_a_stock_container() -> None:
    """The container makes torch's own AdamW, and S is refreshed after its step: RefLoRAAdamW's steps up to eps."""
    mine, whole = peft_parts(), peft_parts()
    rate = {**RATE, "eps": 1e-15}
    base: Any = torchtitan().OptimizersContainer
    groups = [torchtitan().ParamGroupConfig(pattern="lora_", optimizer_name="AdamW", optimizer_kwargs=rate)]
    optimizer = base(base.Config(param_groups=groups, implementation="for-loop"), model_parts=mine)
    hooks = reflora.GradientHooks(nn.ModuleList(mine), warmup_steps=0, follow=False)
    other = reflora.create_reflora_optimizer(nn.ModuleList(whole), warmup_steps=0, **rate)
    for step in range(4):
        train(mine, optimizer, range(step, step + 1))
        hooks.refresh()
    train(whole, other, range(4))
    torch.testing.assert_close(weights(mine), weights(whole), rtol=0, atol=1e-5)
    assert hooks.diagnostics().refactored == 4
