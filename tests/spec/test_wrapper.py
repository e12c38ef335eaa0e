"""create_reflora_optimizer over any torch optimizer class: what a step does, exact resumes, refusals."""

import copy
import io

import pytest
import torch
from refusals import each_refused, unchanged
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop
from wrapping import (
    assert_same,
    backward,
    factors,
    make_pairs,
    name_of,
    precondition_by_reference,
    targets,
    twins,
    wrap,
)

import reflora
from reflora import reference
from reflora.optim.wrapper import reflora_class

CLASSES = [
    (SGD, {}), (SGD, {"momentum": 0.9, "nesterov": True}), (Adam, {}), (Adam, {"fused": True}),
    (Adam, {"amsgrad": True, "weight_decay": 0.1}), (RMSprop, {}), (RAdam, {}), (NAdam, {}), (Adagrad, {}),
]  # fmt: skip


@pytest.mark.parametrize("cls, kwargs", CLASSES, ids=name_of)
def test_a_step_is_the_base_step_of_preconditioned_gradients(cls, kwargs, fast_backend):
    ours, optimizer, plain, base, goals = twins(cls, kwargs, {"backend": fast_backend})
    assert isinstance(optimizer, cls) and type(optimizer).__name__ == f"Wrapped{cls.__name__}"
    assert type(optimizer) is reflora_class(cls)
    for _ in range(5):
        backward(ours, goals)
        optimizer.step()
        backward(plain, goals)
        precondition_by_reference(plain)
        base.step()
    assert_same(factors(ours), factors(plain))
    assert optimizer.diagnostics().refactored == 8


@pytest.mark.parametrize("cls, kwargs", CLASSES[:3], ids=["SGD", "momentum", "Adam"])
def test_warmup_is_the_base_optimizer_bit_for_bit(cls, kwargs):
    ours, optimizer, plain, base, goals = twins(cls, kwargs, {"warmup_steps": 3})
    for step in range(4):
        backward(ours, goals)
        optimizer.step()
        backward(plain, goals)
        base.step()
        assert all(map(torch.equal, factors(ours), factors(plain))) == (step < 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_interval_reuses_the_last_S(dtype, fast_backend):
    ours, optimizer, plain, base, goals = twins(SGD, {}, {"interval": 3, "backend": fast_backend}, dtype=dtype)
    saved = None
    for step in range(7):
        backward(ours, goals)
        backward(plain, goals)
        if step % 3 == 0:
            sides = [(p.views_A(p.A.detach()), p.views_B(p.B.detach())) for p in plain]
            saved = [[reference.choose(A, B)[:2] for A, B in zip(*views)] for views in sides]
        for pair, solved in zip(plain, saved):
            for gA, gB, (S, S_inv) in zip(pair.views_A(pair.A.grad), pair.views_B(pair.B.grad), solved):
                gA.copy_(S_inv @ gA.double())
                gB.copy_(gB.double() @ S)
        optimizer.step()
        base.step()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert_same(factors(ours), factors(plain), tolerance)


@pytest.mark.parametrize("scalar", [False, True])
def test_training_from_zero_with_no_warmup(scalar):
    pairs = make_pairs(dtype=torch.float32)
    for pair in pairs:
        pair.B.data.zero_()
    optimizer, goals = wrap(Adam, pairs, scalar=scalar), targets(pairs)
    losses = []
    for _ in range(60):
        losses.append(backward(pairs, goals).item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


OPTIONS = [
    {}, {"interval": 3}, {"warmup_steps": 4}, {"warmup_steps": 2, "interval": 4}, {"scalar": True},
    {"scalar": True, "warmup_steps": 4, "interval": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()) or "default")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_resume_is_exact(options, dtype):
    pairs = make_pairs(dtype=dtype)
    goals = targets(pairs)
    optimizer = wrap(Adam, pairs, **options)
    for step in range(9):
        if step in (3, 5):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            loaded, clone = torch.load(file, weights_only=True), copy.deepcopy(pairs)
            resumed = wrap(Adam, clone, **options)
            resumed.load_state_dict(loaded)
            for _ in range(4):
                backward(clone, goals)
                resumed.step()
            if step == 3:
                ahead = clone
        backward(pairs, goals)
        optimizer.step()
        if step == 6:
            assert all(map(torch.equal, factors(pairs), factors(ahead)))
    assert all(map(torch.equal, factors(pairs), factors(clone)))
    assert optimizer.state_dict()["param_groups"] == resumed.state_dict()["param_groups"]


def test_state_of_the_base_class_loads():
    ours, optimizer, plain, base, goals = twins(Adam, {}, {"interval": 2})
    backward(plain, goals)
    base.step()
    optimizer.load_state_dict(base.state_dict())
    backward(ours, goals)
    optimizer.step()
    assert all(float(state["step"]) == 2 for state in optimizer.state.values())


def test_copies_and_pickles_carry_their_own_pairs():
    pairs = make_pairs()
    goals = targets(pairs)
    optimizer = wrap(Adam, pairs, interval=2)
    backward(pairs, goals)
    optimizer.step()
    clone = copy.deepcopy(optimizer)
    assert isinstance(clone, Adam) and clone.interval == 2
    for opt in (optimizer, clone):
        backward(opt.pairs, goals)
        opt.step()
    assert clone.pairs[0].A is not pairs[0].A
    assert all(map(torch.equal, factors(pairs), factors(clone.pairs)))


def test_closure_runs_once_and_hooks_run_once():
    SGD([nn.Parameter(torch.ones(1))], lr=1.0)  # torch has now put its hook runner around SGD.step too
    pairs = make_pairs()
    goals, seen = targets(pairs), []
    optimizer = wrap(SGD, pairs, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        seen.append("closure")
        return backward(pairs, goals)

    loss = optimizer.step(closure)
    assert loss.requires_grad and seen == ["before", "closure", "after"]


def test_a_non_finite_gradient_skips_the_whole_step():
    pairs = make_pairs()
    optimizer, goals = wrap(Adam, pairs), targets(pairs)
    backward(pairs, goals)
    optimizer.step()
    backward(pairs, goals)
    pairs[1].B.grad[0, 0] = torch.nan
    with unchanged(pairs[0].A.grad, of=optimizer):
        optimizer.step()
    assert optimizer.skipped_steps == 1 and optimizer.param_groups[0]["reflora_steps"] == 1
    report = optimizer.diagnostics()
    assert report.skipped == len(report.names) == 8 and report.refactored == 0
    backward(pairs, goals)
    optimizer.step()
    assert optimizer.diagnostics().refactored == 8


@pytest.mark.parametrize("interval", [1, 2])
def test_gradient_scaling(interval):
    ours, optimizer, plain, base, goals = twins(Adam, {"fused": True}, {"interval": interval}, dtype=torch.float32)
    assert optimizer._step_supports_amp_scaling and not hasattr(wrap(RMSprop, ours), "_step_supports_amp_scaling")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for broken in (False, True, False):
        backward(ours, goals)
        for factor in factors(ours):
            factor.grad *= scaler.get_scale()
        if broken:
            ours[2].A.grad[0, 0] = torch.inf
        scaler.scale(torch.ones(()))  # sets the scaler up
        with unchanged(*(factors(ours) if broken else ())):
            scaler.step(optimizer)
        scaler.update()
        if broken:
            continue
        backward(plain, goals)
        if interval == 1 or optimizer.param_groups[0]["reflora_steps"] == 1:
            precondition_by_reference(plain)
            base.step()
            assert_same(factors(ours), factors(plain), 1e-5)
    assert optimizer.param_groups[0]["reflora_steps"] == 2


def test_a_step_the_scaler_skips_for_another_parameter_changes_nothing():
    pairs, other = make_pairs(dtype=torch.float32), nn.Parameter(torch.ones(2))
    optimizer = reflora_class(Adam)([*factors(pairs), other], pairs, lr=1e-2, fused=True, interval=2)
    backward(pairs, targets(pairs))
    other.grad = torch.tensor([1.0, torch.inf])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with unchanged(*factors(pairs), *(factor.grad for factor in factors(pairs))):
        scaler.step(optimizer)
    assert optimizer.param_groups[0]["reflora_steps"] == 0


def test_missing_gradients_are_left_alone():
    ours, optimizer, plain, base, goals = twins(SGD, {}, {})
    backward(ours, goals)
    gradient = ours[1].B.grad.clone()
    ours[0].A.grad = ours[0].B.grad = ours[1].A.grad = None
    wanted = ours[1].B.detach() - 1e-2 * gradient
    with unchanged(*factors(ours)[:3]):
        optimizer.step()
    assert_same([ours[1].B], [wanted])
    assert (optimizer.diagnostics().status[:2] == 3).all()


def test_parameters_in_no_pair_groups_added_later_and_schedulers():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    model[0].lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
    model[0].lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})
    extra = nn.Parameter(torch.ones(3))
    optimizer = reflora.create_reflora_optimizer(model, SGD, lr=0.5)
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    bias = model[1].bias
    for param in (*model.parameters(), extra):
        param.grad = torch.ones_like(param)
    start = bias.item()
    optimizer.step()
    schedule.step()
    assert bias.item() == pytest.approx(start - 0.5) and extra[0].item() == pytest.approx(0.9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    clone = reflora.create_reflora_optimizer(model, SGD, lr=0.5)
    clone.add_param_group({"params": [extra], "lr": 0.1})
    clone.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert [group["reflora_steps"] for group in optimizer.param_groups] == [2, 2]


def test_adamw_is_the_fused_one():
    model = nn.Module()
    model.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
    model.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})
    for cls in (None, AdamW, reflora.RefLoRAAdamW):
        optimizer = reflora.create_reflora_optimizer(model, cls, lr=1e-3, weight_decay=0.1)
        assert type(optimizer) is reflora.RefLoRAAdamW and optimizer.defaults["weight_decay"] == 0.1
    assert type(reflora.create_reflora_optimizer(model, AdamW, lr=1e-3, fused=True)) is reflora.RefLoRAAdamW


def test_refused_classes():
    each_refused({
        "ValueError: LBFGS.*closure.*AdamW or SGD": lambda: reflora_class(LBFGS),
        "TypeError: a subclass of torch.optim.Optimizer": lambda: reflora_class(nn.Linear),
    })  # fmt: skip
