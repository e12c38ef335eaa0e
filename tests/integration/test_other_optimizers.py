"""Optimizers of other packages around RefLoRA, and which cannot have it in front."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from refusals import refused
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer
from wrapping import assert_same, backward, factors, make_pairs, targets, wrap

import reflora

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")


@pytest.mark.parametrize("given", [{"warmup_steps": 5}, {"warmup_steps": 0}])
def test_a_name_that_two_have_is_refused_until_both_are_said(given: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="base_options=.'warmup_steps'.*AdaGC's .default 100"):
        wrap(pytorch_optimizer.AdaGC, make_pairs(), **given)
    optimizer = wrap(pytorch_optimizer.AdaGC, make_pairs(), **given, base_options={"warmup_steps": 7})
    assert optimizer.warmup_steps == given["warmup_steps"] and optimizer.param_groups[0]["warmup_steps"] == 7


def test_the_default_of_the_base_class_stands_where_neither_is_given() -> None:
    pairs = make_pairs()
    optimizer: Any = reflora.wrap(pytorch_optimizer.AdaGC)(factors(pairs), pairs, lr=1e-2)
    assert optimizer.warmup_steps is None and optimizer.param_groups[0]["warmup_steps"] == 100


def test_a_base_class_that_keeps_an_attribute_of_ours_is_refused() -> None:
    with pytest.raises(TypeError, match="without an attribute 'warmup_steps', got ApolloDQN"):
        reflora.wrap(pytorch_optimizer.ApolloDQN)(factors(pairs := make_pairs()), pairs, lr=1e-2)


CLOSURE = ", which requires a closure.*reflora.RefLoRAAdamW"
UNWRAPPED = {name: name + CLOSURE for name in ("SAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM", "AliG")}
UNWRAPPED |= {name: f"first-order optimizer, got {name}" for name in ("AdaHessian", "SophiaH")}
UNWRAPPED |= {name: rf"steps in step\(\), got {name}. It steps in the backward pass" for name in ("LOMO", "AdaLOMO")}


@pytest.mark.parametrize("name", UNWRAPPED)
def test_optimizers_that_need_their_closure_or_differentiate_gradients_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=UNWRAPPED[name]):
        reflora.wrap(getattr(pytorch_optimizer, name))


class StepsInBackward(SGD):
    """As prodigyplus and optimi: with the option, `step` has nothing left to do."""

    def __init__(self, params, lr, fused_back_pass=False):  # type: ignore[no-untyped-def]
        super().__init__(params, lr)
        for group in self.param_groups:
            group["fused_back_pass"] = fused_back_pass

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        return None if self.param_groups[0]["fused_back_pass"] else super().step(closure)


def test_gradients_used_up_in_the_backward_pass_are_refused() -> None:
    pairs = make_pairs()
    with refused("fused_back_pass: expected False, got True", *factors(pairs)):
        wrap(StepsInBackward, pairs, fused_back_pass=True)
    optimizer = wrap(StepsInBackward, pairs)
    backward(pairs, targets(pairs))
    optimizer.param_groups[0]["fused_back_pass"] = True
    with refused("fused_back_pass: expected False, got True", of=optimizer):
        optimizer.step()


def test_classes_that_build_others_are_refused() -> None:
    """They copy the gradients, or some of the factors, before the wrapper's step."""
    offload = pytest.importorskip("torchao.optim").CPUOffloadOptimizer
    for cls in (offload, ZeroRedundancyOptimizer):
        with refused(f"{cls.__name__}, which builds others. Put reflora.GradientHooks", error=TypeError):
            reflora.wrap(cls)


@pytest.mark.parametrize(
    "inner", [reflora.RefLoRAAdamW, reflora.wrap(AdamW), reflora.wrap(SGD)], ids=lambda c: c.__name__
)
def test_sam_around_reflora(inner: type[Optimizer]) -> None:
    """The gradients of the perturbed weights, preconditioned by those that are stepped."""
    ours, plain = make_pairs(), make_pairs()
    for mine, other in zip(factors(ours), factors(plain)):
        other.data.copy_(mine.data)
    goals, rho = targets(ours), 0.05
    optimizer = pytorch_optimizer.SAM(factors(ours), inner, rho=rho, lr=1e-2, pairs=ours, warmup_steps=0)
    assert "pairs" not in optimizer.param_groups[0]
    step: Any = inner(factors(plain), pairs=plain, lr=1e-2, warmup_steps=0)  # type: ignore[call-arg]
    for _ in range(4):
        backward(ours, goals)
        optimizer.step(lambda: backward(ours, goals))
        backward(plain, goals)
        old = [factor.detach().clone() for factor in factors(plain)]
        norm = torch.stack([factor.grad.norm() for factor in factors(plain)]).norm()
        for factor in factors(plain):
            factor.data += rho * factor.grad / (norm + 1e-12)
        backward(plain, goals)
        for factor, before in zip(factors(plain), old):
            factor.data.copy_(before)
        step.step()
    assert_same(factors(ours), factors(plain), 1e-9)
    assert optimizer.base_optimizer.diagnostics().refactored == 8


def test_lookahead_around_reflora() -> None:
    ours = make_pairs()
    inner = reflora.RefLoRAAdamW(factors(ours), pairs=ours, lr=1e-2)
    optimizer = pytorch_optimizer.Lookahead(inner, k=2)
    goals = targets(ours)
    for _ in range(4):
        backward(ours, goals)
        optimizer.step()
    assert inner.diagnostics().refactored == 8


class Asks(SGD):
    """Evaluates the closure after it has changed the gradients."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        return None if closure is None else closure()


class Reevaluates(SGD):
    """Has its own way to the gradients."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        return super().step()


def test_another_evaluation_is_an_error_and_other_gradients_are_warned_of() -> None:
    pairs = make_pairs()
    goals = targets(pairs)
    optimizer = wrap(Asks, pairs)
    with pytest.raises(RuntimeError, match="closure: expected one evaluation per step"):
        optimizer.step(lambda: backward(pairs, goals))
    optimizer = wrap(Reevaluates, pairs)
    backward(pairs, goals)
    with pytest.warns(UserWarning, match="Reevaluates has replaced the gradients"):
        optimizer.step()
    backward(pairs, goals)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once is enough


def test_the_loss_of_a_closure_reaches_the_base_class() -> None:
    class Keeps(SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            self.seen = closure()
            return super().step()

    pairs = make_pairs()
    goals = targets(pairs)
    optimizer = wrap(Keeps, pairs)
    loss = optimizer.step(lambda: backward(pairs, goals))
    assert optimizer.seen is loss


def test_peft_optimizers_that_precondition_are_refused() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_riemannian_optimizer

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    for cls in (reflora.RefLoRAAdamW, reflora.wrap(SGD)):
        with pytest.raises(TypeError, match="got PEFT's RiemannianPreconditionedOptimizer.*twice"):
            create_riemannian_optimizer(model, cls, lr=1e-2, pairs=reflora.find_pairs(model))
    inner = type(create_riemannian_optimizer(model, AdamW, lr=1e-2))
    with pytest.raises(TypeError, match="got PEFT's RiemannianPreconditionedOptimizer.*twice"):
        reflora.create_reflora_optimizer(model, inner, lr=1e-2)
