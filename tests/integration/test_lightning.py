"""Lightning and Fabric: a plain loop's steps, and clipping under fp16, which asks for fused=False as of torch's own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from distributed_cases import assert_equal, batch, build, trained
from torch import Tensor, nn

import reflora

lightning = pytest.importorskip("pytorch_lightning")
fabric = pytest.importorskip("lightning_fabric")
CLIP, STEPS = 0.5, 4
pytestmark = pytest.mark.filterwarnings("ignore")


def make(model: nn.Module, kind: str, **options: Any) -> torch.optim.Optimizer:
    cls = {"RefLoRAAdamW": None, "over NAdam": torch.optim.NAdam}[kind]
    return reflora.create_reflora_optimizer(model, cls, lr=1e-2, **options)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens, labels = batch(step)
    return nn.functional.cross_entropy(model(tokens), labels)


class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.model, self.kind, self.options = build("gaussian", torch.float32), kind, options

    def training_step(self, _: Any, index: int) -> Tensor:
        return loss_of(self.model, index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make(self.model, self.kind, **self.options)


def fit(module: Any, **options: Any) -> dict[str, Tensor]:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, gradient_clip_val=CLIP, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS)))  # type: ignore[arg-type]
    return trained(module.model)


def by_hand(kind: str, scaler: Any = None, **options: Any) -> dict[str, Tensor]:
    """A plain loop that unscales, clips and steps."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model = build("gaussian", torch.float32)
    optimizer = make(model, kind, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=scaler.is_enabled()):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
    return trained(model)


@pytest.mark.parametrize("kind", ["RefLoRAAdamW", "over NAdam"])
def test_lightning(kind: str) -> None:
    assert_equal(fit(Module(kind)), by_hand(kind))


def half(scaler: torch.amp.GradScaler) -> Any:
    from pytorch_lightning.plugins.precision import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", scaler)


def scaler_of() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**8)


@pytest.mark.parametrize("kind, options", [("RefLoRAAdamW", {"fused": False}), ("over NAdam", {})], ids=str)
def test_lightning_clips_under_fp16(kind: str, options: dict[str, Any]) -> None:
    found = fit(Module(kind, **options), plugins=[half(scaler_of())])
    assert_equal(found, by_hand(kind, scaler_of(), **options))


def test_lightning_refuses_to_clip_what_unscales_by_itself() -> None:
    """As it refuses torch's fused AdamW."""
    with pytest.raises(RuntimeError, match="gradient clipping"):
        fit(Module("RefLoRAAdamW"), plugins=[half(scaler_of())])


def test_fabric_clips_under_fp16() -> None:
    from lightning_fabric.plugins.precision import MixedPrecision

    run = fabric.Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler_of())])
    run.launch()
    model = build("gaussian", torch.float32)
    wrapped, optimizer = run.setup(model, make(model, "RefLoRAAdamW", fused=False))
    for step in range(STEPS):
        optimizer.zero_grad()
        run.backward(loss_of(wrapped, step))
        run.clip_gradients(wrapped, optimizer, max_norm=CLIP)
        optimizer.step()
    assert_equal(trained(model), by_hand("RefLoRAAdamW", scaler_of(), fused=False))
    assert optimizer.optimizer.diagnostics().refactored == 3
