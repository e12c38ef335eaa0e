"""accelerate with a gradient scaler: a step that it skips changes nothing, is seen, and the scheduler waits."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import batch, build
from torch import nn

import reflora

FUSED = {"optimizer_cls": reflora.wrap(torch.optim.AdamW), "fused": True}


@pytest.mark.parametrize(
    "options",
    [{}, {"scalar": True}, {"optimizer_cls": torch.optim.NAdam}, {"optimizer_cls": torch.optim.SGD}, FUSED],
    ids=str,
)
def test_a_skipped_step(options: dict[str, object]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    model = build(start="gaussian", dtype=torch.float32)
    optimizer = reflora.create_reflora_optimizer(model, lr=1e-2, **options)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, wrapped, schedule = accelerator.prepare(model, optimizer, schedule)

    def step(number: int, factor: float) -> None:
        wrapped.zero_grad()
        tokens, labels = batch(number)
        accelerator.backward(nn.functional.cross_entropy(model(tokens), labels) * factor)
        wrapped.step()
        schedule.step()

    step(0, 1.0)
    assert not wrapped.step_was_skipped and schedule.get_last_lr() == [5e-3]
    before = [p.detach().clone() for p in model.parameters()]
    state = {p: {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)} for p, s in optimizer.state.items()}
    step(1, 1e36)  # overflows once it is scaled
    assert wrapped.step_was_skipped and schedule.get_last_lr() == [5e-3]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    for parameter, entries in state.items():
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in entries.items())
    step(2, 1.0)
    assert not wrapped.step_was_skipped and schedule.get_last_lr()[0] < 5e-3
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
    assert any(moved) and all(p.isfinite().all() for p in model.parameters())
