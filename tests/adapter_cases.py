"""A saved adapter without PEFT, and ways to spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reflora import adapters

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
A0, B0 = "base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight"


def save(folder: Path) -> Path:
    """Three linear layers of rank 4; the factors are of unlike sizes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("layers.0.q", "layers.0.v", "layers.1.q"):
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(4, 12, generator=generator)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = 0.1 * torch.randn(10, 4, generator=generator)
    save_file(tensors, folder / adapters.WEIGHTS, {"format": "pt"})
    (folder / adapters.CONFIG).write_text(json.dumps(CONFIG))
    return folder


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / adapters.CONFIG).write_text(json.dumps({**CONFIG, **values}))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / adapters.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / adapters.WEIGHTS, {"format": "pt"})

    return rewrite


def put(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: value(tensors[key])})


def add(tensors: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda found: found.update(tensors)


def spot(value: float) -> Callable[[Tensor], Tensor]:
    return lambda factor: factor.index_fill(1, torch.tensor([1]), value)
