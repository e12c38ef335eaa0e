"""Errors are short whatever the model's size; and those that hardly anything provokes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import factors, leaf_pairs, random_grads

import reflora
from reflora import doctor
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
    with pytest.warns(
        UserWarning, match=r"^39 LoRA pair.s. are stepped without RefLoRA .*, \.\.\.\): only B is trained"
    ) as told:
        reflora.find_pairs(model)
    assert len(str(told[0].message)) < 300


def test_convolutions_that_are_no_views() -> None:
    conv = torch.randn(4, 3, 5, 2).permute(0, 3, 1, 2)[..., :3]
    with pytest.raises(ValueError, match=r"that can be viewed as matrices.*\.contiguous"):
        reflora.refactor_([reflora.LoRAPair("conv", conv, torch.randn(6, 4, 1, 1), "conv")])


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
        doctor.Adapter(tmp_path)


def test_blocks_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 40)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "use_bdlora": 4}))
    with pytest.raises(ValueError, match="use_bdlora: expected an object, got 4"):
        doctor.Adapter(tmp_path)


def test_options_for_a_base_that_there_is_not() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    for cls in (None, torch.optim.AdamW, reflora.RefLoRAAdamW):
        with pytest.raises(TypeError, match="base_options"):
            reflora.create_reflora_optimizer(model, cls, lr=1e-3, base_options={"eps": 1e-6})


def test_a_second_matrix_that_is_none() -> None:
    with pytest.raises(TypeError, match="geometric_mean, Y: expected a tensor like X, got list"):
        reflora.linalg.geometric_mean(torch.eye(3), [1.0])  # type: ignore[arg-type]


def test_a_negated_gradient_in_a_step(fast_backend: str) -> None:
    """Its memory holds the ascent."""
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = reflora.RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    A: Tensor = pairs[0][0]
    A.grad = torch._neg_view(A.grad)
    before = A.detach().clone()
    with pytest.raises(ValueError, match=r"their negatives .is_neg.*resolve_neg"):
        optimizer.step()
    assert torch.equal(A, before)


def test_what_sharded_factors_cannot_do() -> None:
    ops = ShardedOps([reflora.LoRAPair("0", torch.randn(2, 5), torch.randn(4, 2))])
    with pytest.raises(ValueError, match="False for a sharded preconditioning"):
        ops.precondition([True], scalar=True)
    with pytest.raises(NotImplementedError, match="refactoring sharded factors"):
        ops.refactor([True], scalar=False)
