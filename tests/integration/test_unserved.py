"""GradientHooks and Refactorers: pairs that they lack, and others that precondition beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_cases import trainable
from test_membership import add, backward, build, by_class, told
from torch import nn

import reflora


@by_class
def test_hooks_made_after_the_first_step_are_refused(cls: Callable[..., Any]) -> None:
    model = build()
    optimizer = cls(trainable(model), pairs=reflora.find_pairs(model), lr=1e-2)
    backward(model)
    optimizer.step()
    hooks = reflora.GradientHooks(model)
    backward(model)
    with pytest.raises(ValueError, match="reflora.GradientHooks on the model"):
        optimizer.step()
    hooks.remove()
    optimizer.step()


@pytest.mark.parametrize("change", ["adapter", "unfrozen", "replaced"])
@pytest.mark.parametrize("way", ["GradientHooks", "Refactorer"])
def test_hooks_and_refactorers_name_the_pairs_they_lack(way: str, change: str) -> None:
    model = build()
    layer = model.base_model.model[0]
    if change == "unfrozen":
        layer.lora_A.requires_grad_(False), layer.lora_B.requires_grad_(False)
    made: Any = getattr(reflora, way)(model)
    if change == "adapter":
        add(model, "second")
    elif change == "unfrozen":
        layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()
    else:
        for side in (layer.lora_A, layer.lora_B):
            side["default"].weight = nn.Parameter(side["default"].weight.detach().clone())

    def train() -> None:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        if way == "Refactorer":
            made.integrate_into_optimizer(optimizer)
        for step in range(5):
            backward(model, step)
            optimizer.step()
            if way == "GradientHooks":
                made.refresh()

    said = told(train)
    assert len(said) == 1 and "are stepped without RefLoRA" in said[0] and "made without them" in said[0]


def test_hooks_name_a_pair_of_which_one_factor_was_frozen_since() -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    hooks.pairs[0].A.requires_grad_(False)
    assert any(hooks.pairs[0].name in one for one in told(lambda: backward(model)))


def test_hooks_refuse_a_preconditioning_beside_them() -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    with pytest.raises(ValueError, match="reflora.GradientHooks on the model"):
        reflora.Refactorer(model)
    with pytest.raises(ValueError, match="reflora.GradientHooks on the model"):
        reflora.precondition_(reflora.find_pairs(model))
    hooks.remove()
    refactorer = reflora.Refactorer(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    refactorer.integrate_into_optimizer(optimizer)
    with pytest.raises(ValueError, match="one without a Refactorer, got one that has another"):
        reflora.Refactorer(model).integrate_into_optimizer(optimizer)
    reflora.GradientHooks(model)
    backward(model)
    with pytest.raises(ValueError, match="reflora.GradientHooks on the model"):
        optimizer.step()


def test_a_refactorer_on_an_optimizer_with_one_factor_of_each_says_so() -> None:
    model = build()
    refactorer = reflora.Refactorer(model)
    optimizer = torch.optim.AdamW([pair.B for pair in refactorer.pairs], lr=1e-2)
    said = told(lambda: refactorer.integrate_into_optimizer(optimizer))
    assert len(said) == 1 and "2 LoRA pair(s) are stepped without RefLoRA" in said[0]
