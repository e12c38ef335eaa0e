"""Every kind of layer trains: a few steps of the model itself are those of the reference in front of torch's AdamW."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import trainable
from peft import LoraConfig, get_peft_model
from test_peft import KINDS, adapted
from torch import Tensor, nn
from wrapping import precondition_by_reference

import reflora
from reflora import reference
from reflora.constants import START_STEPS
from reflora.integrations.peft import find_sites

INPUTS: dict[str, Any] = {
    "linear": lambda: torch.randn(5, 10),
    "embedding": lambda: torch.randint(11, (5, 3)),
    "conv1d": lambda: torch.randn(2, 5, 6),
    "conv2d": lambda: torch.randn(2, 5, 6, 6),
    "conv3d": lambda: torch.randn(2, 5, 4, 4, 4),
    "attention": lambda: torch.randn(2, 3, 8),
}


def input_of(kind: str) -> Tensor:
    return next((make for name, make in INPUTS.items() if name in kind), INPUTS["linear"])()


def loss_of(model: nn.Module, kind: str, x: Tensor) -> Tensor:
    """Of the layer's output; attention takes three inputs, experts have their weight used by hand."""
    layer = model.base_model.model.layer  # type: ignore[union-attr]
    if kind.startswith("experts"):
        with layer._activate_lora(layer.active_adapters):  # type: ignore[operator, union-attr]
            weight = layer.get_base_layer().weight  # type: ignore[operator, union-attr]
            return torch.tanh(x @ (weight if weight.shape[1] == x.shape[1] else weight.mT)).square().mean()
    made = layer(x, x, x)[0] if kind == "attention" else layer(x)  # type: ignore[operator]
    return torch.tanh(made).square().mean()


def assert_trains(
    model: nn.Module, kind: str, other: nn.Module | None = None, groups: Callable[[nn.Module], Any] | None = None
) -> None:
    """Four steps as RefLoRA takes them, and of the reference with torch's AdamW on a copy, or on `other`."""
    other = other or copy.deepcopy(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    if groups is None:
        groups = trainable
        ours = reflora.create_reflora_optimizer(model, lr=1e-2, weight_decay=0.01)
    else:
        ours = reflora.RefLoRAAdamW(groups(model), pairs=reflora.find_pairs(model), lr=1e-2)
    theirs = torch.optim.AdamW(groups(other), lr=1e-2)
    pairs = [site.pair for site in find_sites(other)]
    for step in range(4):
        torch.manual_seed(step)
        x = input_of(kind)
        for one in (model, other):
            one.zero_grad()
            loss_of(one, kind, x).backward()
        ours.step()
        precondition_by_reference(pairs, reference.shrink_weight(step, START_STEPS))
        theirs.step()
    moved = 0.0
    for (name, mine), expected in zip(model.named_parameters(), other.parameters()):
        if name in frozen and kind == "attention":  # PEFT merges it in every forward, and takes it out again
            torch.testing.assert_close(mine, frozen[name], rtol=0, atol=1e-6)
        elif name in frozen:
            assert torch.equal(mine, frozen[name]), name
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}")
            moved += mine.grad.abs().sum().item() if mine.grad is not None else 0.0
    assert moved > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "quantised"])
def test_a_layer_trains(kind: str) -> None:
    make, config, _ = KINDS[kind]
    assert_trains(adapted(make(), **config), kind)


def mixed(**config: Any) -> nn.Module:
    """Two linear layers and a head."""
    torch.manual_seed(0)
    base = nn.Module()
    base.layer = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    lora = LoraConfig(r=2, target_modules=["layer.0", "layer.2"], init_lora_weights=False, **config)
    return get_peft_model(base, lora)


def test_modules_to_save_and_other_parameters_take_plain_steps() -> None:
    model = mixed(modules_to_save=["layer.4"])
    assert sum(p.requires_grad for p in model.parameters()) == 6
    assert_trains(model, "linear")
    assert_trains(mixed(bias="all"), "linear")


@pytest.mark.parametrize("active, ranks", [(["other"], [3]), (["default", "other"], [2, 2, 3])], ids=["one", "both"])
def test_only_the_active_adapter_is_trained(active: list[str], ranks: list[int]) -> None:
    model = mixed()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layer.0"], init_lora_weights=False))  # type: ignore[operator]
    model.base_model.set_adapter(active)  # type: ignore[operator, union-attr]
    assert sorted(pair.rank for pair in reflora.find_pairs(model)) == ranks
    assert_trains(model, "linear")


def test_lora_plus_ratio() -> None:
    """A and B in groups of different learning rates, from PEFT's own grouping."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        pairs = reflora.find_pairs(model)
        return [{"params": [p.A for p in pairs]}, {"params": [p.B for p in pairs], "lr": 0.16}]

    assert_trains(mixed(), "linear", groups=groups)


# ---- quantised bases and 8-bit states


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def build() -> nn.Module:
        torch.manual_seed(0)
        base = nn.Module()
        if bits == 4:
            base.layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        else:
            base.layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        base.to("cpu")
        setattr(base, f"is_loaded_in_{bits}bit", True)
        return get_peft_model(base, LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))

    INPUTS[f"{bits} bits"] = lambda: torch.randn(5, 64)
    model = build()
    layer = model.base_model.model.layer  # type: ignore[union-attr]
    assert "bnb" in type(layer).__module__ and not layer.get_base_layer().weight.is_floating_point()  # type: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes: inputs are cast to float16
        assert_trains(model, f"{bits} bits", build())


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
def test_eight_bit_states(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From B = 0, through the wrapper: as with float32 states, up to their eight bits; and a resume is exact."""
    cls = pytest.importorskip(f"{name}.optim").AdamW8bit
    # torchao traces its step; the C++ that Inductor would make of it takes 10 s to compile
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def build() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 300), nn.Tanh(), nn.Linear(300, 256))
        return get_peft_model(net, LoraConfig(r=16, target_modules=["0", "2"]))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            x = torch.randn(64, 256)
            optimizer.zero_grad()
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()

    exact, ours = build(), build()
    train(exact, reflora.create_reflora_optimizer(exact, lr=3e-3), range(12))
    optimizer = reflora.create_reflora_optimizer(ours, cls, lr=3e-3, weight_decay=0.01)
    train(ours, optimizer, range(6))
    kinds = {
        type(v).__name__ if name == "torchao" else v.dtype
        for v in optimizer.state[optimizer.pairs[0].A].values()
        if isinstance(v, Tensor) and v.numel() > 4000
    }
    assert kinds & {"OptimState8bit", torch.uint8}
    clone = copy.deepcopy(ours)
    resumed = reflora.create_reflora_optimizer(clone, cls, lr=3e-3, weight_decay=0.01)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
    train(ours, optimizer, range(6, 12))
    train(clone, resumed, range(6, 12))
    for mine, again, wanted in zip(ours.parameters(), clone.parameters(), exact.parameters()):
        assert torch.equal(mine, again)
        if mine.requires_grad:
            assert (mine - wanted).norm() < 0.1 * wanted.norm()


def test_hooks_leave_an_overflow_to_be_seen() -> None:
    """A loss scaler looks for inf and NaN in the gradients; the saturation of large products must not hide them."""
    model = mixed()
    pairs = reflora.find_pairs(model)
    pairs[0].A.register_hook(lambda grad: grad.index_fill(1, torch.tensor([3]), torch.inf))
    reflora.GradientHooks(model)
    loss_of(model, "linear", torch.randn(5, 10)).backward()
    assert not pairs[0].A.grad.isfinite().all() and pairs[1].A.grad.isfinite().all()  # type: ignore[union-attr]


class KohyaLayer(nn.Module):
    """As `LoRAModule` of kohya's sd-scripts: it stands beside the layer whose forward it replaces."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, r: int = 4, alpha: float = 2.0):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.lora_down: nn.Module = nn.Conv2d(layer.in_channels, r, layer.kernel_size, padding=1, bias=False)
            self.lora_up: nn.Module = nn.Conv2d(r, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, r, bias=False)
            self.lora_up = nn.Linear(r, layer.out_features, bias=False)
        self.scale, self.org_forward = alpha / r, layer.forward
        self.register_buffer("alpha", torch.tensor(alpha))
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) + self.scale * self.lora_up(self.lora_down(x))


class SplitLayer(nn.Module):
    """As that of a fused projection, split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_down = nn.ModuleList(nn.Linear(6, 2, bias=False) for _ in range(2))
        self.lora_up = nn.ModuleList(nn.Linear(2, 5, bias=False) for _ in range(2))


def test_a_network_of_kohya() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 16, 5)).requires_grad_(False)
    network = nn.Module()
    for name in ("0", "2"):
        network.add_module(f"lora_unet_{name}", KohyaLayer(base.get_submodule(name)))  # type: ignore[arg-type]
    network.add_module("lora_unet_qkv", SplitLayer())
    pairs = reflora.find_pairs(network)
    assert [(pair.name, pair.layout) for pair in pairs] == [
        ("lora_unet_0", "conv"), ("lora_unet_2", "linear"), ("lora_unet_qkv.0", "linear"), ("lora_unet_qkv.1", "linear")
    ]  # fmt: skip
    assert [pair.name for pair in reflora.find_pairs(network, "default")] == [pair.name for pair in pairs]
    network.lora_unet_2.lora_mid = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="lora_mid stands between B and A"):
        assert len(reflora.find_pairs(network)) == 3
    del network.lora_unet_2.lora_mid
    optimizer = reflora.create_reflora_optimizer(network, lr=1e-2, eps=1e-12)
    x, goal, losses = torch.randn(8, 3, 4, 4), torch.randn(8, 5), []
    for _ in range(30):
        losses.append(float((loss := (base(x) - goal).square().mean()).detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0] and optimizer.diagnostics().refactored == 2
