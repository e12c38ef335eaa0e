"""accelerate: accumulation is a plain loop's, and a step that its scaler skips changes nothing and is seen."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import assert_equal, batch, build, trainable, trained
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


WAYS = {
    "create_reflora_optimizer": lambda model: (reflora.create_reflora_optimizer(model, lr=1e-2), None),
    "wrap": lambda model: (
        reflora.wrap(torch.optim.NAdam)(trainable(model), pairs=reflora.find_pairs(model), lr=1e-2), None
    ),
    "GradientHooks": lambda model: (
        torch.optim.AdamW(trainable(model), lr=1e-2), reflora.GradientHooks(model, warmup_steps=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_three_ways_accumulate(way: str) -> None:
    """prepare, accumulate, clip: the steps of a plain loop over batches of twice the size."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    mine, plain = (build(start="gaussian", dtype=torch.float32) for _ in range(2))
    optimizer, hooks = WAYS[way](mine)
    model, optimizer = accelerator.prepare(mine, optimizer)
    for number in range(8):
        tokens, labels = batch(number)
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(tokens), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if accelerator.sync_gradients and hooks:
                hooks.refresh()
            optimizer.zero_grad()
    other, others_hooks = WAYS[way](plain)
    for number in range(4):
        other.zero_grad()
        for part in (2 * number, 2 * number + 1):
            tokens, labels = batch(part)
            (nn.functional.cross_entropy(plain(tokens), labels) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        other.step()
        if others_hooks:
            others_hooks.refresh()
    assert_equal(trained(mine), trained(plain))
