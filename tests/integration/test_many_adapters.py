"""Several adapters in one optimizer: one call a step, a learning rate and a state for each, a slot that starts over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from distributed_cases import trainable
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import reflora
from reflora.backends import cpp_backend, torch_backend
from reflora.pairs import LoRAPair

RATES = {"one": 1e-2, "two": 3e-3, "three": 2e-2}
CLASSES: dict[str, Callable[..., Any]] = {
    "RefLoRA": reflora.RefLoRAAdamW,
    "RefLoRA-S": lambda *args, **kwargs: reflora.RefLoRAAdamW(*args, scalar=True, **kwargs),
    "interval": lambda *args, **kwargs: reflora.RefLoRAAdamW(*args, interval=3, **kwargs),
    "InvariantAdamW": reflora.InvariantAdamW,
    "momentum": lambda *args, **kwargs: reflora.InvariantAdamW(*args, moments="momentum", **kwargs),
    "RiemannianAdamW": reflora.RiemannianAdamW,
    "carried": lambda *args, **kwargs: reflora.RefLoRAAdamW(*args, carry_grams=True, **kwargs),
}
by_class = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


def build() -> Any:
    """Three adapters of unlike ranks in the same two layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 6))
    configs = {
        name: LoraConfig(r=2 + place, target_modules=["0", "2"], init_lora_weights=False)
        for place, name in enumerate(RATES)
    }
    first, *others = configs
    model = get_peft_model(net, configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    return model


def factors(pairs: Sequence[LoRAPair]) -> list[Tensor]:
    return [factor for pair in pairs for factor in (pair.A, pair.B)]


def backward(model: Any, names: Sequence[str], step: int) -> None:
    """Each adapter on a batch of its own, as a server trains them."""
    for name in names:
        model.set_adapter(name)
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step * 10 + len(name)))
        model(x).square().mean().backward()


def in_one(model: Any, make: Callable[..., Any]) -> Any:
    groups = [{"params": factors(reflora.find_pairs(model, name)), "lr": lr} for name, lr in RATES.items()]
    return make(groups, pairs=[pair for name in RATES for pair in reflora.find_pairs(model, name)], lr=1.0)


def alone(model: Any, make: Callable[..., Any]) -> dict[str, Any]:
    pairs = {name: reflora.find_pairs(model, name) for name in RATES}
    return {name: make(factors(own), pairs=own, lr=RATES[name]) for name, own in pairs.items()}


def lora(model: Any) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.named_parameters() if "lora_" in key}


# which adapters have a batch in a step
SCHEDULE = [["one", "two", "three"], ["one"], ["two", "three"], ["one", "two", "three"], ["three"], ["one", "two"]]


@by_class
def test_one_optimizer_is_one_for_each(make: Callable[..., Any]) -> None:
    """To the bit, also where an adapter has no batch: it is not stepped, and its state waits."""
    ours, theirs = build(), build()
    optimizer, others = in_one(ours, make), alone(theirs, make)
    for step, names in enumerate(SCHEDULE):
        optimizer.zero_grad()
        backward(ours, names, step)
        before = lora(ours)
        optimizer.step()
        backward(theirs, names, step)
        for name in names:
            others[name].step()
            others[name].zero_grad()
        after = lora(ours)
        for key, value in lora(theirs).items():
            assert torch.equal(after[key], value), (step, key)
            assert torch.equal(after[key], before[key]) != any(f".{name}." in key for name in names), (step, key)


@pytest.mark.parametrize("backend", [cpp_backend, torch_backend], ids=["cpp", "torch"])
def test_all_adapters_are_stepped_in_one_call(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := backend.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    calls, adamw = list[int](), backend.adamw
    monkeypatch.setattr(backend, "adamw", lambda plan, step: calls.append(len(plan.rows)) or adamw(plan, step))
    model = build()
    optimizer = in_one(model, lambda *args, **kwargs: reflora.RefLoRAAdamW(*args, backend=backend.NAME, **kwargs))
    for step in range(3):
        backward(model, list(RATES), step)
        optimizer.step()
    assert calls == [6, 6, 6] and optimizer.diagnostics().refactored == 6


def overwrite(model: Any, name: str) -> None:
    """Another user's adapter goes into the slot."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for pair in reflora.find_pairs(model, name):
            pair.A.copy_(torch.randn(pair.A.shape, generator=generator) * 0.3)
            pair.B.zero_()


@by_class
def test_a_slot_starts_over_and_the_others_go_on(make: Callable[..., Any]) -> None:
    model = build()
    optimizer = in_one(model, make)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, list(RATES), step)
        optimizer.step()
    witness = copy.deepcopy(model)  # in it the slot has an optimizer of its own, made now
    overwrite(witness, "two")
    fresh = alone(witness, make)["two"]
    others = in_one(witness, make)
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    overwrite(model, "two")
    at = {key: kept.data_ptr() for own in optimizer.state.values() for key, kept in enumerate(own.values())}
    optimizer.reset(reflora.find_pairs(model, "two"))
    assert at == {key: kept.data_ptr() for own in optimizer.state.values() for key, kept in enumerate(own.values())}
    for step in range(4, 8):
        for one in (model, witness):
            one.zero_grad()
            backward(one, list(RATES), step)
        optimizer.step()
        fresh.step()
        for pair in reflora.find_pairs(witness, "two"):
            pair.A.grad = pair.B.grad = None
        others.step()
        found = lora(model)
        for key, value in lora(witness).items():
            assert torch.equal(found[key], value), (step, key)


def test_master_weights_start_over_from_the_new_factors() -> None:
    model = build().to(torch.bfloat16)
    make = lambda *args, **kwargs: reflora.RefLoRAAdamW(*args, master_weights=True, **kwargs)  # noqa: E731
    optimizer = in_one(model, make)
    for pair in optimizer.pairs:
        for factor in (pair.A, pair.B):
            factor.grad = torch.randn_like(factor)
    optimizer.step()
    overwrite(model, "two")
    optimizer.reset(reflora.find_pairs(model, "two"))
    for pair in reflora.find_pairs(model, "two"):
        for factor in (pair.A, pair.B):
            own = optimizer.state[factor]
            assert torch.equal(own["master"], factor.float()) and not own["exp_avg"].any() and not own["step"].any()
    assert all(optimizer.state[pair.A]["step"] == 1 for pair in reflora.find_pairs(model, "one"))


def test_a_plain_parameter_starts_over() -> None:
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    optimizer = reflora.RefLoRAAdamW(model.parameters(), pairs=[], lr=1e-2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.load_state_dict(twin.state_dict())
    optimizer.reset(model.parameters())
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=optimizer.defaults["weight_decay"])
    twin(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other.step()
    for one, two in zip(model.parameters(), twin.parameters()):
        assert torch.allclose(one, two, atol=1e-7)


def test_before_the_first_step_there_is_nothing_to_reset() -> None:
    model = build()
    optimizer = in_one(model, reflora.RefLoRAAdamW)
    optimizer.reset(optimizer.pairs)
    assert not optimizer.state


def test_what_cannot_be_reset() -> None:
    model = build()
    model.set_adapter("one")
    optimizer = reflora.create_reflora_optimizer(model, lr=1e-2)
    backward(model, ["one"], 0)
    optimizer.step()
    kept = {param: {key: value.clone() for key, value in own.items()} for param, own in optimizer.state.items()}
    first = reflora.find_pairs(model, "one")[0]
    wrong: list[tuple[Any, type[Exception], str]] = [
        (first, TypeError, "expected a list of pairs or parameters, got LoRAPair. Wrap a single one"),
        ([first, "two"], TypeError, "expected pairs or parameters, got str"),
        ([first, *reflora.find_pairs(model, "two")], ValueError, "parameters of this optimizer, got one of shape"),
        ([first, *trainable(model)[2:3]], ValueError, "expected both factors, got one of them. Pass the pair"),
    ]
    for given, error, said in wrong:
        with pytest.raises(error, match=said):
            optimizer.reset(given)
    for param, own in kept.items():
        assert all(torch.equal(value, optimizer.state[param][key]) for key, value in own.items())
    optimizer.state[first.B]["exp_avg"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.reset([first])
    assert torch.equal(optimizer.state[first.A]["exp_avg"], kept[first.A]["exp_avg"])
