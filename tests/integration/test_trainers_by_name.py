"""LLaMA-Factory, ms-swift and unsloth by their calling code, and PEFT's LoRA+: the steps of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
import trainer_cases as cases
from distributed_cases import assert_equal, trained
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

import reflora

DECAY = 0.3


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    args = TrainingArguments(str(folder), **{**cases.OPTIONS, "weight_decay": DECAY, "remove_unused_columns": False})
    vars(args).update(more)
    return args


def make(cls: type[Trainer], folder: Path, arguments_of: dict[str, Any] | None = None, **given: Any) -> Any:
    """Over a model with an embedding and a head that are trained whole."""
    model, _ = cases.build(folder / "model", modules_to_save=["embed_tokens", "lm_head"])
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(12, 8)]
    given = {name: value(model) if callable(value) else value for name, value in given.items()}
    args = arguments(folder / "out", **arguments_of or {})
    return cls(model, args, train_dataset=rows, data_collator=default_collate, **given)  # type: ignore[arg-type]


def assert_a_plain_loop(
    trainer: Any, other: Any, rate_of: Callable[[str], tuple[float, float]], **options: Any
) -> None:
    """Over one group per parameter, with the learning rate and weight decay that `rate_of` gives its name."""
    calls = cases.recorded(trainer)
    groups = [
        {"params": [param], **dict(zip(("lr", "weight_decay"), rate_of(name)))}
        for name, param in other.model.named_parameters() if param.requires_grad
    ]  # fmt: skip
    optimizer = reflora.RefLoRAAdamW(groups, pairs=reflora.find_pairs(other.model), lr=1.0, **options)
    cases.replay(other, optimizer, calls)
    assert len(calls) == 3
    assert_equal(trained(trainer.model), trained(other.model))


def test_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of `create_custom_optimizer`, the factory: the rate and the decay are the arguments'."""

    def custom(model: nn.Module, training_args: Any, finetuning_args: Any) -> torch.optim.Optimizer:
        return reflora.OptimizerFactory()(model, training_args)

    monkeypatch.setattr(stand_ins, "create_custom_optimizer", custom)
    trainer, other = (make(stand_ins.LlamaFactory095, tmp_path) for _ in range(2))
    assert_a_plain_loop(trainer, other, lambda _: (cases.LR, DECAY))


def test_ms_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RefLoRACallback(stand_ins.OptimizerCallback):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            return reflora.OptimizerFactory()(self.trainer.model if model is None else model, self.args, scalar=True)

    monkeypatch.setitem(stand_ins.Swift460.optimizers_map, "reflora", RefLoRACallback)
    trainer, other = (make(stand_ins.Swift460, tmp_path) for _ in range(2))
    assert_a_plain_loop(trainer, other, lambda _: (cases.LR, DECAY), scalar=True)


def embedded(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


@pytest.mark.parametrize("ratio", [None, 16.0], ids=["embedding rate", "with LoRA+"])
def test_unsloth(ratio: float | None, tmp_path: Path) -> None:
    """Its trainer makes the groups; the class finds the pairs among its keywords."""
    rates = {"embedding_learning_rate": 1e-4, "loraplus_lr_ratio": ratio}

    def given(model: nn.Module) -> Any:
        return reflora.RefLoRAAdamW, {"lr": cases.LR, "pairs": reflora.find_pairs(model)}

    trainer, other = (
        make(stand_ins.Unsloth20261009, tmp_path, rates, optimizer_cls_and_kwargs=given) for _ in range(2)
    )
    assert_a_plain_loop(
        trainer, other,
        lambda name: (1e-4 if embedded(name) else cases.LR * (ratio or 1) if "lora_B" in name else cases.LR, DECAY),
    )  # fmt: skip
    assert len(trainer.optimizer.optimizer.param_groups) == (3 if ratio else 2)


def test_a_factory_where_a_trainer_makes_the_groups_says_what_to_do(tmp_path: Path) -> None:
    given = reflora.OptimizerFactory, {"lr": cases.LR}
    trainer = make(
        stand_ins.Unsloth20261009, tmp_path, {"embedding_learning_rate": 1e-4}, optimizer_cls_and_kwargs=given
    )
    with pytest.raises(TypeError, match=r'RefLoRAAdamW, \{"lr": ..., "pairs": reflora.find_pairs\(model\)\}'):
        trainer.train()


def by_peft(model: nn.Module) -> torch.optim.Optimizer:
    pairs = reflora.find_pairs(model)
    return create_loraplus_optimizer(model, reflora.RefLoRAAdamW, lr=cases.LR, loraplus_lr_ratio=16, pairs=pairs)  # type: ignore[arg-type]


def by_hand(model: nn.Module) -> torch.optim.Optimizer:
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    parts = [[param for name, param in named if ("lora_B" in name) is b] for b in (False, True)]
    groups = [{"params": parts[0]}, {"params": parts[1], "lr": 16 * cases.LR}]
    return reflora.create_reflora_optimizer(model, lr=cases.LR, params=groups, weight_decay=0.0)


def by_function(model: nn.Module) -> torch.optim.Optimizer:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": [p], "lr": cases.LR * (16 if "lora_B" in name else 1)}
            for name, p in model.named_parameters()
            if p.requires_grad
        ]

    return reflora.OptimizerFactory()(model, lr=cases.LR, params=groups, weight_decay=0.0)


@pytest.mark.parametrize("way", [by_peft, by_hand, by_function])
def test_lora_plus_in_a_trainer(way: Callable[[nn.Module], torch.optim.Optimizer], tmp_path: Path) -> None:
    trainer, other = (make(Trainer, tmp_path, optimizers=lambda model: (way(model), None)) for _ in range(2))
    assert_a_plain_loop(trainer, other, lambda name: (cases.LR * (16 if "lora_B" in name else 1), 0.0))
