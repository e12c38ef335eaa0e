"""Refactorer: the published package's behaviour, and where it broke."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from refusals import refused
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from benchmarks.baselines import published_reflora as published
from reflora import Refactorer

BOTH = pytest.mark.parametrize("scalar", [False, True], ids=["RefLoRA", "RefLoRA-S"])


class Layers(nn.Module):
    """LoRA layers alone, as PEFT keeps them, with the loss `sum |x^T A^T B^T - y|^2`."""

    def __init__(self, count, dtype=torch.float64, zero=False, rank=4):
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(count):
            layer = nn.Module()
            layer.lora_A = nn.ModuleDict({"default": nn.Linear(12 + i, rank, bias=False, dtype=dtype)})
            layer.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 8 + i, bias=False, dtype=dtype)})
            for factor, std in ((layer.lora_A, 0.4), (layer.lora_B, 0.0 if zero else 0.7)):
                nn.init.normal_(factor["default"].weight, std=std)
            self.layers.append(layer)
        self.goals = [torch.randn(8 + i, 12 + i, dtype=dtype) for i in range(count)]

    def pairs(self):
        return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in self.layers]

    def backward(self):
        self.zero_grad()
        loss = sum((B @ A - goal).square().mean() for (A, B), goal in zip(self.pairs(), self.goals))
        loss.backward()
        return loss.item()


def largest_difference(model, other):
    return max((p - q).abs().max().item() for p, q in zip(model.parameters(), other.parameters()))


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        losses.append(model.backward())
        optimizer.step()
    return losses


@BOTH
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_parity_with_the_published_package(scalar, warmup, cls):
    ours = Layers(20)
    theirs = copy.deepcopy(ours)
    optimizer, base = (cls(model.parameters(), lr=1e-2) for model in (ours, theirs))
    Refactorer(ours, warmup_steps=warmup, use_scalar=scalar).integrate_into_optimizer(optimizer)
    published.attach(base, theirs.pairs(), warmup_steps=warmup, scalar=scalar)
    for _ in range(10):
        train(ours, optimizer, 1)
        train(theirs, base, 1)
        assert largest_difference(ours, theirs) < 1e-10


@BOTH
def test_starting_from_zero_without_warmup(scalar):
    """Where the published loop stands still, and its scalar variant turns NaN: bench/test_benchmarks.py."""
    model = Layers(4, torch.float32, zero=True)
    optimizer = Adam(model.parameters(), lr=1e-2)
    Refactorer(model, use_scalar=scalar).integrate_into_optimizer(optimizer)
    losses = train(model, optimizer, 60)
    assert losses[-1] < 0.8 * losses[0]


def test_attributes():
    model = Layers(3)
    refactorer = Refactorer(model, warmup_steps=4, interval=2, use_scalar=True)
    assert (refactorer.warmup_steps, refactorer.interval, refactorer.use_scalar) == (4, 2, True)
    assert all(A is C and B is D for (A, B), (C, D) in zip(refactorer.lora_weights, model.pairs()))
    assert refactorer.skip_steps == 4


@BOTH
def test_plain_steps_between_and_no_moments_moved(scalar):
    """interval=3: one refactoring, then two plain steps; only RefLoRA-S moves moments."""
    ours = Layers(2)
    theirs = copy.deepcopy(ours)
    optimizer, base = (Adam(model.parameters(), lr=1e-2) for model in (ours, theirs))
    Refactorer(ours, interval=3, use_scalar=scalar).integrate_into_optimizer(optimizer)
    if scalar:
        published.refactor_scalar_(theirs.pairs())
    for step in range(7):
        train(ours, optimizer, 1)
        theirs.backward()
        if not scalar and step % 3 == 0:
            published.precondition_(theirs.pairs())
        base.step()
        if scalar and step % 3 == 2:
            published.refactor_scalar_(theirs.pairs(), base)
        assert largest_difference(ours, theirs) < 1e-10


def test_by_hand():
    """dummy_step and step without an optimizer's hooks."""
    ours = Layers(3)
    theirs = copy.deepcopy(ours)
    refactorer = Refactorer(ours)
    ours.backward()
    theirs.backward()
    refactorer.dummy_step()
    published.precondition_(theirs.pairs())
    for (A, B), (C, D) in zip(ours.pairs(), theirs.pairs()):
        torch.testing.assert_close(A.grad, C.grad)
        torch.testing.assert_close(B.grad, D.grad)
    refactorer.step(SGD(ours.parameters(), lr=0.1))
    for (A, B), (C, D) in zip(ours.pairs(), theirs.pairs()):
        torch.testing.assert_close(B @ A, D @ C)
        torch.testing.assert_close(A @ A.T, B.T @ B)


@BOTH
def test_a_resume_is_exact_and_does_not_warm_up_again(scalar):
    for warmup, interval in ((3, 1), (0, 3)):
        model = Layers(3)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        options = {"warmup_steps": warmup, "interval": interval, "use_scalar": scalar}
        refactorer = Refactorer(model, **options)
        refactorer.integrate_into_optimizer(optimizer)
        train(model, optimizer, 4)
        clone = copy.deepcopy(model)
        resumed = AdamW(clone.parameters(), lr=1e-2)
        again = Refactorer(clone, **options)
        again.integrate_into_optimizer(resumed)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert again.skip_steps == refactorer.skip_steps
        train(model, optimizer, 5)
        train(clone, resumed, 5)
        assert largest_difference(model, clone) == 0


def test_weights_loaded_after_integration_are_kept():
    model = Layers(2)
    saved = copy.deepcopy(model.state_dict())
    optimizer = Adam(model.parameters(), lr=1e-2)
    state = optimizer.state_dict()
    Refactorer(model, use_scalar=True).integrate_into_optimizer(optimizer)
    loaded = {name: torch.randn_like(value) for name, value in saved.items()}
    model.load_state_dict(loaded)
    optimizer.load_state_dict(state)
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_own_state_passed_through_before_the_first_step_is_no_resume():
    """accelerate does so as it prepares an optimizer; the first refactoring was taken back."""
    model = Layers(2)
    before = copy.deepcopy(model)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    Refactorer(model, use_scalar=True).integrate_into_optimizer(optimizer)
    balanced = copy.deepcopy(model)
    optimizer.load_state_dict(optimizer.state_dict())
    assert largest_difference(model, balanced) == 0 < largest_difference(model, before)


@BOTH
def test_missing_gradients_are_left_alone(scalar):
    model = Layers(3)
    optimizer = Adam(model.parameters(), lr=1e-2)
    Refactorer(model, use_scalar=scalar).integrate_into_optimizer(optimizer)
    model.backward()
    A, B = model.pairs()[1]
    A.grad = None
    gradient = B.grad.clone()
    optimizer.step()
    assert torch.equal(B.grad, gradient) and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_scalar_with_every_implementation_of_adam(options):
    ours = Layers(3)
    theirs = copy.deepcopy(ours)
    optimizer, base = Adam(ours.parameters(), lr=1e-2, **options), Adam(theirs.parameters(), lr=1e-2, foreach=False)
    Refactorer(ours, use_scalar=True).integrate_into_optimizer(optimizer)
    published.attach(base, theirs.pairs(), scalar=True)
    train(ours, optimizer, 4 if "amsgrad" not in options else 1)
    train(theirs, base, 4 if "amsgrad" not in options else 1)
    assert largest_difference(ours, theirs) < 1e-10


def test_scalar_over_unknown_state():
    model = Layers(2)
    optimizer = RMSprop(model.parameters(), lr=1e-2)
    with refused("RefLoRA-S over RMSprop.*scalar=False", *model.parameters()):
        Refactorer(model, use_scalar=True).integrate_into_optimizer(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_full_variant_over_any_state():
    model = Layers(2)
    optimizer = RMSprop(model.parameters(), lr=1e-2)
    Refactorer(model).integrate_into_optimizer(optimizer)
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0]


class Decayed(Adam):
    """A subclass with a step of its own: torch runs its hooks once for it and once for Adam."""

    def step(self, closure=None):
        return super().step(closure)


@BOTH
def test_hooks_of_subclasses_act_once(scalar):
    Adam([nn.Parameter(torch.ones(1))])
    ours = Layers(2)
    theirs = copy.deepcopy(ours)
    optimizer, base = Decayed(ours.parameters(), lr=1e-2), Adam(theirs.parameters(), lr=1e-2)
    for model, opt in ((ours, optimizer), (theirs, base)):
        Refactorer(model, warmup_steps=2, use_scalar=scalar).integrate_into_optimizer(opt)
    train(ours, optimizer, 5)
    train(theirs, base, 5)
    assert largest_difference(ours, theirs) == 0


@BOTH
def test_integrating_twice_acts_once(scalar):
    ours = Layers(2)
    theirs = copy.deepcopy(ours)
    for model, times in ((ours, 2), (theirs, 1)):
        optimizer = Adam(model.parameters(), lr=1e-2)
        refactorer = Refactorer(model, use_scalar=scalar)
        for _ in range(times):
            refactorer.integrate_into_optimizer(optimizer)
        train(model, optimizer, 3)
    assert largest_difference(ours, theirs) < 1e-12


def test_integrating_into_another_optimizer_lets_go_of_the_first():
    model = Layers(2)
    first, second = (SGD(model.parameters(), lr=0.0) for _ in range(2))
    refactorer = Refactorer(model)
    refactorer.integrate_into_optimizer(first)
    refactorer.integrate_into_optimizer(second)
    model.backward()
    A, B = model.pairs()[0]
    gradient = A.grad.clone()
    first.step()
    assert torch.equal(A.grad, gradient)
    second.step()
    assert not torch.equal(A.grad, gradient)


def test_an_optimizer_of_other_parameters_is_refused():
    model = Layers(2)
    refactorer = Refactorer(model)
    with refused("DeepSpeed, FSDP1", error=RuntimeError):
        refactorer.integrate_into_optimizer(SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    refactorer.integrate_into_optimizer(optimizer)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    with refused("DeepSpeed, FSDP1", error=RuntimeError):
        optimizer.step()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.conv, self.linear = nn.Embedding(9, 6), nn.Conv2d(1, 4, 3, padding=1), nn.Linear(24, 5)

    def forward(self, tokens):
        return self.linear(self.conv(self.embedding(tokens).unsqueeze(1)).amax(2).flatten(1))


def mixed(**config):
    config.setdefault("init_lora_weights", True)
    return get_peft_model(Mixed(), LoraConfig(r=3, target_modules=["embedding", "conv", "linear"], **config))


@BOTH
def test_embedding_and_convolution(scalar):
    model = mixed()
    refactorer = Refactorer(model, use_scalar=scalar)
    assert [pair.layout for pair in refactorer.pairs] == ["embedding", "conv", "linear"]
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    refactorer.integrate_into_optimizer(optimizer)
    tokens, labels = torch.randint(9, (32, 7)), torch.randint(5, (32,))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens), labels)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("initial", [True, False])
def test_re_init_keeps_the_function(initial):
    model = mixed(init_lora_weights=initial)
    tokens = torch.randint(9, (4, 7))
    before = model(tokens)
    refactorer = Refactorer(model, re_init=True)
    assert all(B.abs().max() > 0 for _, B in refactorer.lora_weights)
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-5)


def test_re_init_of_a_quantised_layer_is_refused():
    model = mixed()
    base = model.base_model.model.linear.base_layer
    base.weight = nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)
    with refused("re_init of .*linear.*re_init=False"):
        Refactorer(model, re_init=True)
