"""GradientHooks in one process: RefLoRA's steps in front of an optimizer that knows nothing of it."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from refusals import refused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reflora
from reflora.optim.pairs import PairOps


def build() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 24))
    return get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def factors(model: nn.Module, name: str) -> list[Tensor]:
    return [p.detach() for path, p in model.named_parameters() if f"lora_{name}" in path]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    hooks: Any = None,
    clip: float = 0.0,
    slow: int = 1,
) -> None:
    """slow: steps over which the learning rate rises to its 1e-3, from 0."""
    x, y = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(1)).to(next(model.parameters())).unbind()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / slow)
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 64).backward()
        if clip:
            nn.utils.clip_grad_norm_(trained(model), clip)
        optimizer.step()
        if hooks is not None:
            hooks.refresh()


def taken(hooks: reflora.GradientHooks) -> list[float]:
    """Steps of each layer."""
    return [float(state[0, 3]) for state in hooks.state_dict().values()]


def adamw(model: nn.Module, eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-3, eps=eps)


@pytest.mark.parametrize("warmup_steps", [None, 0, 7])
def test_without_following_the_steps_are_those_of_the_optimizer(warmup_steps: int | None) -> None:
    model, other = build().double(), build().double()
    hooks = reflora.GradientHooks(model, warmup_steps=warmup_steps, follow=False)
    train(model, adamw(model, 1e-30), range(40), hooks, slow=10)
    optimizer = reflora.create_reflora_optimizer(other, lr=1e-3, eps=1e-30, warmup_steps=warmup_steps)
    train(other, optimizer, range(40), slow=10)
    for mine, wanted in zip(trained(model), trained(other)):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)


def test_a_clipped_norm_leaves_both_factors_training() -> None:
    """From B = 0 under a slow learning rate c grows a thousandfold: A stood still while the norm was all B's."""
    moved = {}
    for kind in ("optimizer", "hooks", "first c"):
        model = build()
        start = [A.clone() for A in factors(model, "A")]
        if kind == "optimizer":
            exact = reflora.create_reflora_optimizer(model, lr=1e-3, warmup_steps=0)
            train(model, exact, range(300), clip=1.0, slow=150)
        else:
            hooks = reflora.GradientHooks(model, warmup_steps=0, follow=kind == "hooks")
            train(model, adamw(model), range(300), hooks, clip=1.0, slow=150)
        moved[kind] = [float((A - old).norm()) for A, old in zip(factors(model, "A"), start)]
    for ours, first, wanted in zip(moved["hooks"], moved["first c"], moved["optimizer"]):
        assert 0.5 * wanted < ours < 2 * wanted and first < wanted / 10


def test_a_factor_that_had_no_gradient_keeps_no_unit() -> None:
    """A's gradients were scaled by the tiny c of the second step, and vanished in Adam's eps."""
    model = build()
    hooks = reflora.GradientHooks(model, warmup_steps=0, follow=False)
    train(model, adamw(model), range(20), hooks, slow=10**6)
    for units in hooks.state_dict().values():
        of_A, of_B, settled, _ = units[0].tolist()
        assert of_A == 1 and 0 < of_B < 1e-4 and settled == 1


def test_a_refresh_without_a_backward_pass_before_it_is_no_step() -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    for _ in range(3):
        hooks.refresh()
    assert taken(hooks) == [0, 0]
    train(model, adamw(model), range(5), hooks)
    hooks.refresh()
    assert taken(hooks) == [4, 4]  # the first, of rate 0, has left B at 0


def test_a_state_from_before_steps_were_counted_is_loaded() -> None:
    hooks = reflora.GradientHooks(build())
    hooks.load_state_dict({name: state[:, :3] for name, state in hooks.state_dict().items()})
    assert taken(hooks) == [0, 0]


@pytest.mark.parametrize("warmup_steps", [None, 100])
@pytest.mark.parametrize("follow", [False, True])
def test_gradients_stay_in_the_units_of_a_loaded_state(warmup_steps: int | None, follow: bool) -> None:
    """One in which S had its scale c, where the run goes on with an S that has none."""
    model = build().double()
    hooks = reflora.GradientHooks(model, warmup_steps=0, follow=follow)
    train(model, adamw(model), range(20), hooks)
    state = copy.deepcopy(hooks.state_dict())
    train(model, torch.optim.SGD(trained(model), lr=0.0), range(1))
    before = [float(p.grad.norm()) for p in trained(model)]
    hooks.remove()
    hooks = reflora.GradientHooks(model, warmup_steps=warmup_steps)
    hooks.load_state_dict(state)
    if warmup_steps is None:
        for group in hooks._groups:
            group.counts += 10**6  # the exact S over c
    hooks.refresh()
    train(model, torch.optim.SGD(trained(model), lr=0.0), range(1))
    for grad, old in zip((p.grad for p in trained(model)), before):
        assert float(grad.norm()) == pytest.approx(old, rel=1e-6 if warmup_steps is None else 0.7)


def test_a_layer_that_joins_late_starts_gently() -> None:
    """Each counts its own steps."""
    model = build()
    late = [p for path, p in model.named_parameters() if "lora" in path and ".2." in path]
    hooks = reflora.GradientHooks(model)
    for p in late:
        p.requires_grad_(False)
    train(model, adamw(model), range(5), hooks)
    for p in late:
        p.requires_grad_()
    train(model, adamw(model), range(3), hooks)
    assert taken(hooks) == [7, 2]
    hooks.load_state_dict(hooks.state_dict())
    assert taken(hooks) == [7, 2]


def test_a_layer_whose_B_stays_0_is_still_to_start() -> None:
    """As an expert's that no token was sent to: none of these steps brings S in."""
    model = build()
    hooks = reflora.GradientHooks(model)
    train(model, torch.optim.SGD([torch.zeros(1)]), range(5), hooks)
    assert taken(hooks) == [0, 0]


@pytest.mark.parametrize("done", [3, 5, 8])
def test_layers_that_take_turns_resume_in_the_middle_of_a_warm_up(done: int) -> None:
    """Each has steps of its own, of which the warm-up takes six."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, hooks: reflora.GradientHooks, steps: range) -> None:
        for step in steps:
            for path, p in model.named_parameters():
                p.requires_grad_("lora" in path and (".2." in path) == bool(step % 2))
            train(model, optimizer, range(step, step + 1), hooks)

    straight, model, again = build(), build(), build()
    run(straight, adamw(straight), reflora.GradientHooks(straight, warmup_steps=6), range(16))
    optimizer, hooks = adamw(model), reflora.GradientHooks(model, warmup_steps=6)
    run(model, optimizer, hooks, range(done))
    again.load_state_dict(model.state_dict())
    resumed, new = adamw(again), reflora.GradientHooks(again, warmup_steps=6)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    new.load_state_dict(copy.deepcopy(hooks.state_dict()))
    run(again, resumed, new, range(done, 16))
    for a, b in zip(straight.parameters(), again.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("warmup_steps", [None, 0, 6])
def test_a_stopped_run_goes_on_bit_for_bit(warmup_steps: int | None) -> None:
    def hooked(model: nn.Module) -> reflora.GradientHooks:
        return reflora.GradientHooks(model, warmup_steps=warmup_steps)

    model, straight = build(), build()
    train(straight, adamw(straight), range(8), hooked(straight))
    optimizer, hooks = adamw(model), hooked(model)
    train(model, optimizer, range(4), hooks)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), hooks.state_dict()))
    again = build()
    again.load_state_dict(saved[0])
    resumed, hooks = adamw(again), hooked(again)
    resumed.load_state_dict(saved[1])
    hooks.load_state_dict(saved[2])
    train(again, resumed, range(4, 8), hooks)
    for mine, wanted in zip(trained(again), trained(straight)):
        assert torch.equal(mine, wanted)


def test_layers_are_named_alike_compiled_or_not() -> None:
    model = build()
    names = set(reflora.GradientHooks(model).state_dict())
    assert set(reflora.GradientHooks(torch.compile(build())).state_dict()) == names  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [None, torch.optim.SGD])
def test_hooks_under_an_optimizer_that_preconditions_are_refused_at_its_first_step(cls: Any) -> None:
    model = build()
    optimizer = reflora.create_reflora_optimizer(model, cls, lr=1e-3)
    reflora.GradientHooks(model)
    with refused("S would be applied twice", *trained(model)):
        train(model, optimizer, range(1))


def test_a_refactorer_on_an_optimizer_that_refactors_is_refused() -> None:
    for cls in (None, torch.optim.SGD):
        model = build()
        optimizer = reflora.create_reflora_optimizer(model, cls, lr=1e-3)
        with refused("expected one that does not refactor by itself"):
            reflora.Refactorer(model).integrate_into_optimizer(optimizer)


def test_s_is_applied_once() -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    create = functools.partial(reflora.create_reflora_optimizer, lr=1e-3)
    for again in (reflora.GradientHooks, reflora.Refactorer, create, lambda m: create(m, torch.optim.SGD)):
        with refused(r"GradientHooks on the model. Call their remove\(\) first"):
            again(model)
    hooks.remove()
    reflora.GradientHooks(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied: Any) -> None:
    with refused("over the copy", error=TypeError):
        copied(reflora.GradientHooks(build()))


def test_with_a_factor_frozen_the_other_takes_plain_steps() -> None:
    model, plain = build(), build()
    for one in (model, plain):
        for B in factors(one, "B"):
            B.normal_(generator=torch.Generator().manual_seed(3))
    hooks = reflora.GradientHooks(model)
    for one in (model, plain):
        for name, param in one.named_parameters():
            param.requires_grad_("lora_B" in name)
    train(model, adamw(model), range(3), hooks)
    train(plain, adamw(plain), range(3))
    for mine, wanted in zip(trained(model), trained(plain)):
        assert torch.equal(mine, wanted)


def test_a_model_turned_to_float64_before_the_next_refresh() -> None:
    model = build()
    hooks = reflora.GradientHooks(model)
    train(model, adamw(model), range(2), hooks)
    model.double()
    train(model, adamw(model), range(2, 4), hooks)
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in trained(model))


def backward(model: nn.Module) -> list[float]:
    """Norms of the gradients of a fixed batch."""
    model.zero_grad()
    x = torch.linspace(-1, 1, 48).view(2, 24).to(next(model.parameters()))
    model(x).square().sum().backward()
    return [float(p.grad.norm()) for p in trained(model)]


@pytest.mark.parametrize("warmup_steps", [None, 5])
def test_a_model_that_moves_before_a_refresh_has_taken_one_step(warmup_steps: int | None) -> None:
    model = build()
    hooks = reflora.GradientHooks(model, warmup_steps=warmup_steps)
    for factor in factors(model, "B"):
        factor.normal_()
    for move in (False, True, False):
        backward(model)
        if move:
            model.double()
        hooks.refresh()
    assert taken(hooks) == [3, 3]


def test_a_refresh_that_fails_leaves_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    hooks = reflora.GradientHooks(model, warmup_steps=0)
    train(model, adamw(model), range(5), hooks)
    wanted, state = backward(model), copy.deepcopy(hooks.state_dict())

    def fail(self: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    for factor in factors(model, "B"):
        factor.mul_(3)
    with monkeypatch.context() as patch:
        patch.setattr(PairOps, "reports", fail)
        with pytest.raises(torch.OutOfMemoryError):
            hooks.refresh()
    for factor in factors(model, "B"):
        factor.div_(3)
    assert backward(model) == pytest.approx(wanted, rel=1e-6)
    for old, new in zip(state.values(), hooks.state_dict().values()):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_hooks_made_in_inference_mode_go_on_outside() -> None:
    model, other = build(), build()
    with torch.inference_mode():
        hooks = reflora.GradientHooks(model)
        hooks.load_state_dict(hooks.state_dict())
    train(model, adamw(model), range(3), hooks)
    train(other, adamw(other), range(3), reflora.GradientHooks(other))
    assert all(map(torch.equal, trained(model), trained(other)))


class Launches(TorchDispatchMode):
    """Operations that do more than look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("warmup_steps", [None, 0, 2, 100])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_refresh_takes_as_many_launches_for_any_number_of_layers(warmup_steps: int | None, loaded: bool) -> None:
    found = []
    for layers in (2, 9):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(24, 24) for _ in range(layers)])
        model = get_peft_model(net, LoraConfig(r=4, target_modules=[str(i) for i in range(layers)]))
        hooks = reflora.GradientHooks(model, warmup_steps=0)
        train(model, adamw(model), range(5), hooks)
        state = hooks.state_dict()
        hooks.remove()
        hooks = reflora.GradientHooks(model, warmup_steps=warmup_steps)
        if loaded:
            hooks.load_state_dict(state)
        with Launches() as launches:
            for _ in range(2):
                train(model, adamw(model), range(1))
                before = len(launches.found)
                hooks.refresh()
        found.append(launches.found[before:])
    assert found[0] == found[1] and len(found[0]) < 100
