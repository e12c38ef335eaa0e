"""What of the integrations needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import reflora

pytestmark = pytest.mark.gpu


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    return get_peft_model(net, LoraConfig(r=8, target_modules=["0", "2"])).cuda()


def test_accelerate_sees_a_step_that_fp16_skips() -> None:
    """The first scale overflows: nothing changes, and the scheduler is not advanced."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="fp16")
    model = build()
    optimizer = reflora.create_reflora_optimizer(model, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.backward(model(torch.randn(4, 64, device="cuda")).float().square().sum() * 1e6)
    optimizer.step()
    schedule.step()
    assert optimizer.step_was_skipped and schedule.get_last_lr() == [1e-2]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    for _ in range(20):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 64, device="cuda")).float().square().mean())
        optimizer.step()
        schedule.step()
    assert not optimizer.step_was_skipped and schedule.get_last_lr()[0] < 1e-2
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_a_graphed_model_trains_as_it_does_without() -> None:
    """torch.cuda.make_graphed_callables around forward and backward; the step stays outside."""
    graphed, plain = build(), build()
    example = torch.randn(16, 64, device="cuda")
    call = torch.cuda.make_graphed_callables(graphed, (example,))
    optimizers = [reflora.create_reflora_optimizer(model, lr=1e-2) for model in (graphed, plain)]
    for step in range(5):
        x = torch.randn(16, 64, generator=torch.Generator("cuda").manual_seed(step), device="cuda")
        for run, optimizer in zip((call, plain), optimizers):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    for one, other in zip(graphed.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    make = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    base = nn.Sequential(make(256, 256), nn.Tanh(), nn.Linear(256, 8)).cuda()
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2"]))
    optimizer = reflora.create_reflora_optimizer(model, bnb.optim.AdamW8bit, lr=1e-2)
    x, y = torch.randn(64, 256, device="cuda"), torch.randint(8, (64,), device="cuda")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
