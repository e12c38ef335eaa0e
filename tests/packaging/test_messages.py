"""Errors are short whatever the model's size; and those that hardly anything provokes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reflora
from reflora import adapters
from reflora.checks import fail
from reflora.optim.sharded import ShardedOps


@pytest.mark.parametrize("size", [10, 79, 80, 81, 120, 5000])
def test_errors_are_short(size: int) -> None:
    name = ".".join(["layer"] * size)
    with pytest.raises(ValueError) as caught:
        fail(name, "a tensor held whole by this process", [3.0] * size, "A remedy of some length. " * 4)
    assert len(str(caught.value)) < 300 and str(caught.value).endswith("some length. ")


def test_a_short_error_is_whole() -> None:
    with pytest.raises(KeyError) as caught:
        fail("rank", "4", 3, "Take another.", KeyError)
    assert str(caught.value.args[0]) == ("rank: expected 4, got 3. Take another.")


def test_names_of_deep_models_are_shortened() -> None:
    """Of every layer the warning has its number, of three the end of the name."""
    from peft import LoraConfig, get_peft_model

    net: nn.Module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)))
    for _ in range(30):
        net = nn.Sequential(net)
    model = get_peft_model(net, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name and not name.endswith("0.39.lora_A.default.weight"):
            parameter.requires_grad_(False)
    message = r"^39 LoRA pair.s. are stepped without RefLoRA .*, \.\.\.\): only B is trained"
    with pytest.warns(UserWarning, match=message) as told:
        reflora.find_pairs(model)
    assert len(str(told[0].message)) < 300


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 40)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    whole = Path.open

    def denied(self: Path, *given: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return whole(self, *given, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(OSError, match=f"{name}: expected a file that can be read, got Permission denied"):
        adapters.Adapter(tmp_path)


def test_options_for_a_base_that_there_is_not() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    for cls in (None, torch.optim.AdamW, reflora.RefLoRAAdamW, reflora.InvariantAdamW, reflora.RiemannianAdamW):
        with pytest.raises(TypeError, match="base_options: expected another optimizer_cls"):
            reflora.create_reflora_optimizer(model, cls, lr=1e-3, base_options={"eps": 1e-6})
    for cls in (None, torch.optim.SGD, reflora.InvariantAdamW):
        with pytest.raises(TypeError, match="pairs: expected none: they are found in the model"):
            reflora.create_reflora_optimizer(model, cls, lr=1e-3, pairs=[])


def test_what_sharded_factors_cannot_do() -> None:
    ops = ShardedOps([reflora.LoRAPair("0", torch.randn(2, 5), torch.randn(4, 2))])
    with pytest.raises(ValueError, match="False for a sharded preconditioning"):
        ops.precondition([True], scalar=True)
    with pytest.raises(NotImplementedError, match="refactoring sharded factors"):
        ops.refactor([True], scalar=False)
