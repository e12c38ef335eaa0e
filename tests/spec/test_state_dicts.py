"""torch.distributed.checkpoint's state_dict functions, in one process: saved, loaded into new ones, on bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from wrapping import backward, make_pairs, targets

import reflora


def build() -> tuple[nn.Module, list[reflora.LoRAPair]]:
    torch.manual_seed(0)
    pairs = make_pairs(2)
    model = nn.Module()
    for index, pair in enumerate(pairs):
        model.register_parameter(f"A{index}", pair.A)
        model.register_parameter(f"B{index}", pair.B)
    return model, pairs


KINDS = {
    "RefLoRAAdamW": (reflora.RefLoRAAdamW, {}),
    "RefLoRAAdamW, scalar": (reflora.RefLoRAAdamW, {"scalar": True}),
    "AdamW": (reflora.wrap(torch.optim.AdamW), {}),
    "AdamW, scalar": (reflora.wrap(torch.optim.AdamW), {"scalar": True}),
    "SGD": (reflora.wrap(torch.optim.SGD), {}),
    "SGD with momentum, scalar": (reflora.wrap(torch.optim.SGD), {"momentum": 0.9, "scalar": True}),
}


@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"warmup_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_run_goes_on_bit_for_bit(kind: str, options: dict[str, Any]) -> None:
    """Weights first: before it loads, torch takes a step of zero gradients, which RefLoRA-S refactored them in."""
    cls, more = KINDS[kind]
    model, pairs = build()
    goals = targets(pairs)
    optimizer = cls(model.parameters(), pairs=pairs, lr=1e-2, **more, **options)
    for _ in range(3):
        backward(pairs, goals), optimizer.step()
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    again, others = build()
    resumed = cls(again.parameters(), pairs=others, lr=1e-2, **more, **options)
    set_model_state_dict(again, weights)
    set_optimizer_state_dict(again, resumed, state)
    for mine, wanted in zip(again.parameters(), model.parameters()):
        assert torch.equal(mine, wanted)
    for _ in range(3):
        backward(pairs, goals), optimizer.step()
        backward(others, goals), resumed.step()
    for mine, wanted in zip(again.parameters(), model.parameters()):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("options", [{}, {"interval": 3}, {"warmup_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", ["RefLoRAAdamW", "RefLoRAAdamW, scalar", "SGD", "SGD with momentum, scalar"])
def test_a_state_that_is_read_before_the_first_step_changes_nothing(kind: str, options: dict[str, Any]) -> None:
    """torch makes it by a step, which was counted: a warm-up ended early, and RefLoRA-S never refactored at first."""
    cls, more = KINDS[kind]
    found = []
    for read in (False, True):
        model, pairs = build()
        optimizer = cls(model.parameters(), pairs=pairs, lr=1e-2, **more, **options)
        if read:
            get_state_dict(model, optimizer)
        goals = targets(pairs)
        torch.manual_seed(5)
        goals = [torch.randn_like(goal) for goal in goals]
        for _ in range(4):
            backward(pairs, goals), optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_at_learning_rate_zero_is_a_step(kind: str) -> None:
    """As schedules with a warm-up begin: the moments are filled."""
    cls, more = KINDS[kind]
    model, pairs = build()
    optimizer = cls(model.parameters(), pairs=pairs, lr=0.0, warmup_steps=0, **more)
    goals = targets(pairs)
    backward(pairs, goals), optimizer.step()
    assert optimizer.diagnostics().refactored > 0


@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
@pytest.mark.parametrize("source", [{}, {"fused": True}, {"foreach": False}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("kind", ["RefLoRAAdamW", "RefLoRAAdamW, scalar", "AdamW"])
def test_a_state_of_torchs_adamw_is_loaded(kind: str, source: dict[str, Any], full: bool) -> None:
    """Key by key: its groups have options of torch's that a fused step has no use for."""
    cls, more = KINDS[kind]
    model, pairs = build()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2, **source)
    goals = targets(pairs)
    for _ in range(2):
        backward(pairs, goals), plain.step()
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    saved = get_optimizer_state_dict(model, plain, options=options)
    again, others = build()
    optimizer = cls(again.parameters(), pairs=others, lr=1e-2, amsgrad=source.get("amsgrad", False), **more)
    set_optimizer_state_dict(again, optimizer, saved, options=options)
    for mine, wanted in zip(again.parameters(), model.parameters()):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[mine][name].max(), plain.state[wanted][name].max())
    backward(others, goals), optimizer.step()
    assert optimizer.diagnostics().skipped == 0
