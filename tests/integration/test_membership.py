"""Whatever is LoRA and is not stepped as RefLoRA is said; what is added later is stepped."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_cases import assert_equal, trainable
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import reflora

CLASSES: dict[str, Callable[..., Any]] = {
    "RefLoRAAdamW": reflora.RefLoRAAdamW, "over AdamW": reflora.wrap(torch.optim.AdamW),
    "over SGD": reflora.wrap(torch.optim.SGD),
}  # fmt: skip
CONFIG = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
by_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


def build(*adapters: str) -> Any:
    """Two layers; every adapter with random factors, all of them active and trainable."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3))
    first, *others = adapters or ("default",)
    model = get_peft_model(net, CONFIG, adapter_name=first)
    for name in others:
        add(model, name)
    return model


def add(model: Any, name: str) -> list[nn.Parameter]:
    """The parameters of another adapter, made active beside the others."""
    model.add_adapter(name, CONFIG)
    model.base_model.set_adapter([*model.base_model.active_adapters, name])
    return [p for key, p in model.named_parameters() if f".{name}." in key]


def backward(model: nn.Module, step: int = 0) -> None:
    model.zero_grad()
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()


def told(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if "RefLoRA" in str(one.message)]


@by_class
@pytest.mark.parametrize("named", [False, True], ids=["looked for", "given"])
def test_an_adapter_added_later_is_stepped_as_from_the_start(cls: Callable[..., Any], named: bool) -> None:
    later = build("first")
    pairs = reflora.find_pairs(later)
    optimizer = cls(trainable(later), pairs=list(pairs) if named else pairs, lr=1e-2, warmup_steps=0)
    group: dict[str, Any] = {"params": add(later, "second")}
    if named:
        group["pairs"] = [pair for pair in reflora.find_pairs(later) if pair.name.endswith("second")]
    optimizer.add_param_group(group)
    whole = copy.deepcopy(later)
    at_once = cls(trainable(whole), pairs=reflora.find_pairs(whole), lr=1e-2, warmup_steps=0)
    for step in range(4):
        for model, own in ((later, optimizer), (whole, at_once)):
            backward(model, step)
            assert told(own.step) == []
    assert optimizer.diagnostics().refactored == at_once.diagnostics().refactored == 4
    assert_equal(trainable(later), trainable(whole))


@by_class
def test_factors_added_one_after_the_other_make_a_pair_when_both_are_there(cls: Callable[..., Any]) -> None:
    model = build("first")
    optimizer = cls(trainable(model), pairs=reflora.find_pairs(model), lr=1e-2, warmup_steps=0)
    A0, B0, A1, B1 = add(model, "second")
    optimizer.add_param_group({"params": [A0, A1]})
    assert len(optimizer.pairs) == 2
    optimizer.add_param_group({"params": [B0, B1], "lr": 1e-3})
    assert len(optimizer.pairs) == 4
    backward(model)
    optimizer.step()
    assert optimizer.diagnostics().refactored == 4


@by_class
def test_further_pairs_are_checked(cls: Callable[..., Any]) -> None:
    model = build("first")
    optimizer = cls(trainable(model), pairs=list(reflora.find_pairs(model)), lr=1e-2)
    pair = (torch.zeros(3, 10, requires_grad=True), torch.zeros(12, 3, requires_grad=True))
    with pytest.raises(ValueError, match="factors among the optimizer's parameters"):
        optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "pairs": [pair]})
    with pytest.raises(TypeError, match="lr: expected a number, got '1e-4', of type str"):
        optimizer.add_param_group({"params": list(pair), "lr": "1e-4"})
    assert len(optimizer.param_groups) == 1


@by_class
@pytest.mark.parametrize("lacks", ["a step", "a gradient"])
def test_a_pair_in_half_is_named_once(cls: Callable[..., Any], lacks: str) -> None:
    model = build()
    pairs = reflora.find_pairs(model)
    left_out = pairs[0].B if lacks == "a step" else None
    optimizer = cls([p for p in trainable(model) if p is not left_out], pairs=pairs, lr=1e-2)
    pairs[1].A.requires_grad_(lacks != "a gradient")
    backward(model)
    (said,) = told(optimizer.step)
    if lacks == "a step":
        assert f"1 LoRA pair(s) are stepped without RefLoRA ({pairs[0].name})" in said
    else:
        assert pairs[1].name in said and "has a gradient" in said
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        assert told(optimizer.step) == []
        pairs[-1].A.requires_grad_(False), pairs[-1].B.requires_grad_(False)  # of which nothing is to be said


@by_class
def test_without_a_whole_pair_there_is_an_error(cls: Callable[..., Any]) -> None:
    model = build()
    pairs = reflora.find_pairs(model)
    optimizer = cls([pair.A for pair in pairs], pairs=pairs, lr=1e-2)
    backward(model)
    with pytest.raises(RuntimeError, match="expected both factors of each pair.*reflora.GradientHooks"):
        optimizer.step()


@pytest.mark.parametrize("side", ["A", "B"])
def test_layers_of_which_one_factor_is_frozen_are_named(side: str) -> None:
    """LoRA-FA trains B alone, MiCA too."""
    model = build()
    layer = model.base_model.model[0]
    (layer.lora_B if side == "A" else layer.lora_A).requires_grad_(False)
    with pytest.warns(UserWarning, match=rf"1 LoRA pair.s. .*0.default.*only {side} is trained"):
        assert len(reflora.find_pairs(model)) == 1


def test_where_one_factor_is_frozen_everywhere_the_error_says_so() -> None:
    model = build()
    for pair in reflora.find_pairs(model):
        pair.A.requires_grad_(False)
    with pytest.raises(ValueError, match="2 that are not supported .*only B is trained.*Train both"):
        reflora.find_pairs(model)


@by_class
def test_state_is_made_at_the_first_gradient_as_in_torch(cls: Callable[..., Any]) -> None:
    model = build(*(f"adapter{number}" for number in range(8)))
    pairs = reflora.find_pairs(model)
    assert len(pairs) == 16
    optimizer = cls(trainable(model), pairs=pairs, lr=1e-2, warmup_steps=0)
    plain = torch.optim.AdamW(trainable(model), lr=1e-2)

    def step(adapters: list[str]) -> None:
        model.base_model.set_adapter(adapters)
        for pair in pairs:
            pair.A.requires_grad_(), pair.B.requires_grad_()
        backward(model)
        optimizer.step()

    step(["adapter3"])
    stepped = {factor for pair in pairs if pair.name.endswith("3") for factor in (pair.A, pair.B)}
    assert {p for p, state in optimizer.state.items() if state} == stepped
    assert optimizer.diagnostics().refactored == 2 and optimizer.diagnostics().inactive in (0, 14)
    step(["adapter5"])  # wakes
    step(["adapter3", "adapter5"])
    assert optimizer.diagnostics().refactored == 4
    assert sum(bool(state) for state in optimizer.state.values()) == 8
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(["adapter1"])
    plain.step()
    assert set(plain.state) < set(trainable(model))


def test_a_pair_that_wakes_late_steps_as_one_that_never_slept(fast_backend: str) -> None:
    """What lies beside it in the table changes nothing."""

    def factors() -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        shapes = [((4, 30), (21, 4)), ((5, 12), (17, 5)), ((3, 9), (8, 3))]
        return [tuple(torch.randn(s, generator=generator).requires_grad_() for s in both) for both in shapes]  # type: ignore[misc]

    pairs, alone = factors(), factors()
    optimizer = reflora.RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend, interval=2)
    other = reflora.RefLoRAAdamW([alone[1]], lr=1e-2, backend=fast_backend, interval=2)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        for (A, B), (C, D) in zip(pairs, alone):
            A.grad, B.grad = (torch.randn(t.shape, generator=generator) for t in (A, B))
            C.grad, D.grad = A.grad.clone(), B.grad.clone()
        if step < 3:
            pairs[1][0].grad = pairs[1][1].grad = None
        else:
            other.step()
        optimizer.step()
    assert_equal(pairs[1], alone[1])


def test_found_pairs_are_a_plain_list_to_copies_and_pickles() -> None:
    model = build()
    pairs = reflora.find_pairs(model)
    assert isinstance(pairs, list) and type(copy.deepcopy(pairs)) is list
    assert [p.name for p in pickle.loads(pickle.dumps(pairs))] == [p.name for p in pairs]
    optimizer = pickle.loads(pickle.dumps(reflora.RefLoRAAdamW(trainable(model), pairs=pairs, lr=1e-2)))
    optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})


@by_class
def test_a_model_that_is_gone_is_not_looked_at(cls: Callable[..., Any]) -> None:
    model = build()
    optimizer = cls(trainable(model), pairs=reflora.find_pairs(model), lr=1e-2)
    del model
    optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)]})
    assert len(optimizer.pairs) == 2


@by_class
@pytest.mark.parametrize("how", ["unfrozen", "another adapter"])
def test_pairs_whose_first_gradient_comes_later_are_stepped(cls: Callable[..., Any], how: str) -> None:
    """Their parameters were there from the start, and in no pair: they were frozen when the pairs were looked for."""
    model = build("first", "second")
    params, layer = trainable(model), model.base_model.model[0]
    if how == "unfrozen":
        layer.lora_A.requires_grad_(False), layer.lora_B.requires_grad_(False)
    else:
        model.base_model.set_adapter("first")
    optimizer = cls(params, pairs=reflora.find_pairs(model), lr=1e-2, warmup_steps=0)
    assert len(optimizer.pairs) == 2
    backward(model)
    optimizer.step()
    if how == "unfrozen":
        layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()
    else:
        model.base_model.set_adapter(["first", "second"])
    backward(model)
    assert told(optimizer.step) == []
    assert len(optimizer.pairs) == 4 and optimizer.diagnostics().refactored == 4


@pytest.mark.parametrize("cls", [*CLASSES.values(), reflora.InvariantAdamW], ids=[*CLASSES, "InvariantAdamW"])
def test_a_load_does_not_end_the_search_for_pairs(cls: Callable[..., Any]) -> None:
    model = build("first", "second")
    params = trainable(model)
    model.base_model.set_adapter("first")
    optimizer = cls(params, pairs=reflora.find_pairs(model), lr=1e-2)
    backward(model)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    model.base_model.set_adapter(["first", "second"])
    backward(model)
    assert told(optimizer.step) == []
    assert len(optimizer.pairs) == 4


RESUMED = {
    "RefLoRAAdamW": reflora.RefLoRAAdamW, "InvariantAdamW": reflora.InvariantAdamW,
    "with master weights": functools.partial(reflora.RefLoRAAdamW, master_weights=True),
    "with float32 moments": functools.partial(reflora.InvariantAdamW, state_dtype=torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
def test_the_state_of_pairs_that_are_found_later_is_loaded_whole(make: Callable[..., Any]) -> None:
    """In the resumed run, too, their adapter is activated after the load."""
    saved: dict[str, Any] = {}
    models = [build("first", "second").to(torch.bfloat16) for _ in range(2)]
    for model in models:
        params = trainable(model)
        model.base_model.set_adapter("first")
        optimizer = make(params, pairs=reflora.find_pairs(model), lr=1e-2)
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        model.base_model.set_adapter(["first", "second"])
        if not saved:
            for _ in range(2):
                backward(model)
                optimizer.step()
            saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        backward(model)
        optimizer.step()
        assert len(optimizer.pairs) == 4
    for p, q in zip(*map(trainable, models)):
        assert torch.equal(p, q)


@by_class
def test_pairs_of_another_model_are_named(cls: Callable[..., Any]) -> None:
    model, other = build(), build()
    pairs = [*reflora.find_pairs(model)[:1], *reflora.find_pairs(other)[1:]]
    optimizer = cls(trainable(model), pairs=pairs, lr=1e-2)
    backward(model)
    said = told(optimizer.step)
    assert any(pairs[1].name in one and "neither factor" in one for one in said)


@by_class
def test_factors_in_the_wrong_order_are_named(cls: Callable[..., Any]) -> None:
    pairs = [(torch.randn(16, 4, requires_grad=True), torch.randn(4, 16, requires_grad=True))]
    said = told(lambda: cls([t for pair in pairs for t in pair], pairs=pairs, lr=1e-2))
    assert len(said) == 1 and "Is B given before A?" in said[0]


def test_factors_that_are_replaced_in_model_and_optimizer_are_no_further_pairs() -> None:
    """As accelerate does when it shards a model whose optimizer exists."""
    ours, plain = build(), build()
    optimizers: list[Any] = [reflora.create_reflora_optimizer(m, torch.optim.SGD, lr=0.1) for m in (ours, plain)]
    for module in ours.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.requires_grad:
                setattr(module, name, nn.Parameter(param.detach().clone()))
    optimizers[0].param_groups[0]["params"] = [p for p in ours.parameters() if p.requires_grad]

    def step() -> None:
        for model, optimizer in zip((ours, plain), optimizers):
            for number in range(2):
                backward(model, number)
                optimizer.step()

    assert told(step) == []
    assert [len(optimizer.pairs) for optimizer in optimizers] == [2, 2]
    assert_equal(trainable(ours), trainable(plain))
