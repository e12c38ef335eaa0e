"""A wrong type is refused with its name, at construction and where a scheduler writes it; a step is all or nothing."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from refusals import OF_ARGUMENTS, refused, unchanged
from torch.optim import SGD, Adam, AdamW, NAdam
from toys import backward, clones, factors, leaf_pairs, random_grads, run, targets

import reflora

HUGE = 10**5000  # Python does not tell its digits
NAN = float("nan")
# the first of each is of a wrong type
WRONG = {
    "lr": ["1e-4", None, True, [1e-4], torch.zeros(2), -1.0, NAN, float("inf")],
    "eps": ["1e-8", None, NAN],
    "weight_decay": ["0", False, NAN],
    "betas": [("0.9", 0.999), (0.9, None), 0.9, "ab", (0.9,), (0.9, 1.0)],
    "amsgrad": [1, 0, "false", None],
    "maximize": [0, "no"],
    "scalar": ["false", 0, None],
    "check_grads": [1],
    "carry_grams": ["true"],
    "master_weights": [1],
    "stochastic_rounding": [1],
    "fused": ["False", 0],
    "foreach": ["no"],
    "capturable": [1],
    "interval": ["2", 1.5, True, 0],
    "warmup_steps": ["100", 2.0, True, -1, "x" * 999, 2**31, 10**400, HUGE],
    "backend": ["gpu"],
    "precision": ["half"],
    "differentiable": [True],
    "state_dtype": [torch.bfloat16],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


def id_of(value: Any) -> str:
    return "huge" if value is HUGE else str(value)[:40]


def expected(name: str) -> str:
    """How an error of this option begins; numbers below 0, infinite or NaN have one for all three."""
    return f"^(lr, eps, weight_decay|{name}): expected "


@pytest.mark.parametrize("name, value", CASES, ids=id_of)
def test_reflora_adamw(name: str, value: Any) -> None:
    with refused(f"{expected(name)}.*got ", error=OF_ARGUMENTS):
        reflora.RefLoRAAdamW(leaf_pairs([(4, 30, 21)]), **{name: value})


@pytest.mark.parametrize("name, other", [("stochastic_rounding", "master_weights"), ("carry_grams", "scalar")])
def test_options_that_contradict(name: str, other: str) -> None:
    with refused(f"^{name}: expected False with {other}=True"):
        reflora.RefLoRAAdamW(leaf_pairs([(4, 30, 21)]), **{name: True, other: True})


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas", "amsgrad", "maximize"])
def test_a_group(name: str) -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    with refused(f"^{name}: expected ", error=TypeError):
        reflora.RefLoRAAdamW([{"params": factors(pairs), name: WRONG[name][0]}], pairs=pairs)


WRAPPED = [
    (NAdam, "scalar", "false"), (NAdam, "lr", "1e-4"), (NAdam, "betas", ("0.9", 0.999)), (Adam, "betas", (0.9,)),
    (NAdam, "eps", "1e-8"),
    (NAdam, "momentum_decay", "4e-3"), (NAdam, "decoupled_weight_decay", 1), (AdamW, "amsgrad", 1),
    (AdamW, "maximize", 0), (Adam, "amsgrad", "no"), (SGD, "nesterov", 1), (SGD, "momentum", "0.9"), (SGD, "lr", True),
    (SGD, "interval", 0), (SGD, "backend", "fortran"),
    *((AdamW, "warmup_steps", value) for value in WRONG["warmup_steps"]),
]  # fmt: skip


@pytest.mark.parametrize("cls, name, value", WRAPPED, ids=id_of)
def test_a_wrapped_optimizer(cls: Any, name: str, value: Any) -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    with refused(f"^{name}: expected ", error=OF_ARGUMENTS):
        reflora.wrap(cls)(factors(pairs), pairs=pairs, **{"lr": 1e-3, name: value})
    optimizer: Any = reflora.wrap(cls)(factors(pairs), pairs=pairs, lr=1e-3)
    if name in optimizer.defaults:
        with refused(f"^{name}: expected ", error=TypeError):
            optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], name: value})


def test_what_counts_as_a_number() -> None:
    import numpy

    for lr in (1, 1e-3, numpy.float32(1e-3), torch.tensor(1e-3), torch.tensor([1e-3])):
        reflora.RefLoRAAdamW(leaf_pairs([(4, 30, 21)]), lr=lr, betas=[0.9, numpy.float64(0.99)])  # type: ignore[arg-type]


WRITTEN = [(name, WRONG[name][0]) for name in ("lr", "eps", "weight_decay", "betas", "amsgrad", "maximize")]
WRITTEN += [(name, NAN) for name in ("lr", "eps", "weight_decay")]


@pytest.mark.parametrize("name, value", WRITTEN, ids=str)
def test_what_a_scheduler_writes_is_refused_before_anything_moves(name: str, value: Any, fast_backend: str) -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    other = torch.randn(5, requires_grad=True)
    optimizer = reflora.RefLoRAAdamW([*factors(pairs), other], pairs=pairs, lr=1e-2, backend=fast_backend)
    backward(pairs, targets(pairs))
    other.grad = torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    with refused(expected(name), of=optimizer, error=OF_ARGUMENTS):
        optimizer.step()


def failing(base: Any) -> Any:
    """Wrapped, a class whose step raises while it is `broken`."""

    class Fails(base):  # type: ignore[misc]
        broken = False

        def step(self, closure=None):  # type: ignore[no-untyped-def]
            if self.broken:
                raise MemoryError
            return super().step(closure)

    return reflora.wrap(Fails)


def test_a_base_step_that_fails_does_not_have_its_gradients_preconditioned_twice() -> None:
    pairs = leaf_pairs([(4, 30, 21), (5, 12, 9)])
    twins = clones(pairs)
    goals = targets(pairs)
    fails = failing(SGD)(factors(pairs), pairs=pairs, lr=1e-2, interval=2)
    plain = reflora.wrap(SGD)(factors(twins), pairs=twins, lr=1e-2, interval=2)
    for broken in (True, False, True):
        backward(pairs, goals)
        fails.broken = broken
        if broken:
            with pytest.raises(MemoryError):
                fails.step()
            fails.broken = False
        fails.step()
        backward(twins, goals)
        plain.step()
    assert all(map(torch.equal, factors(pairs), factors(twins)))


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize("warmup_steps", [0, 1])
@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_base_step_that_fails_leaves_state_whose_units_are_known(base, interval, warmup_steps, when, resumed) -> None:
    """The step is taken again with gradients of its own; later the run goes on from a checkpoint."""
    options = {"warmup_steps": warmup_steps, "interval": interval, **({"momentum": 0.9} if base is SGD else {})}
    start, ends = [(30 * A.detach(), B.detach()) for A, B in leaf_pairs([(4, 30, 21), (5, 12, 9)], torch.float32)], []
    for fails in (False, True):
        pairs = clones(start)
        make = partial(failing(base), factors(pairs), pairs=pairs, lr=1e-3, **options)
        optimizer, generator = make(), torch.Generator().manual_seed(0)
        for number in range(6):
            if resumed and number == 4:
                saved, optimizer = copy.deepcopy(optimizer.state_dict()), make()
                optimizer.load_state_dict(saved)
            random_grads(factors(pairs), generator)
            if fails and number == when:
                again = [p.grad.clone() for p in factors(pairs)]
                optimizer.broken = True
                with pytest.raises(MemoryError):
                    optimizer.step()
                optimizer.broken = False
                for p, grad in zip(factors(pairs), again):
                    p.grad = grad
            optimizer.step()
        ends.append(factors(pairs))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("base, options", [(SGD, {"momentum": 0.9}), (NAdam, {}), (torch.optim.Adagrad, {})], ids=str)
def test_a_base_step_that_fails_twice_before_one_factor_has_state(base, options, resumed) -> None:
    """Its partner's state is moved once, and says so once there is an entry to say it in."""
    start, ends = [(30 * A.detach(), B.detach()) for A, B in leaf_pairs([(4, 30, 21)], torch.float32)], []
    for failures in (0, 1, 2):
        ((A, B),) = pairs = clones(start)
        make = partial(failing(base), [A, B], pairs=pairs, lr=1e-3, warmup_steps=0, **options)
        optimizer, generator = make(), torch.Generator().manual_seed(0)
        B.grad = torch.randn(21, 4, generator=generator)
        optimizer.step()
        for number in range(4):
            if resumed and number == 2:
                saved, optimizer = copy.deepcopy(optimizer.state_dict()), make()
                optimizer.load_state_dict(saved)
            random_grads([A, B], generator)
            again = [A.grad.clone(), B.grad.clone()]
            for _ in range(failures if number == 0 else 0):
                optimizer.broken = True
                with pytest.raises(MemoryError):
                    optimizer.step()
                optimizer.broken = False
                A.grad, B.grad = (grad.clone() for grad in again)
            optimizer.step()
        ends.append([A, B])
    assert all(map(torch.equal, ends[0], ends[1])) and all(map(torch.equal, ends[0], ends[2]))


def test_fused_false_is_the_switch_of_who_unscales() -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    ways = {fused: reflora.RefLoRAAdamW(pairs, fused=fused)._step_supports_amp_scaling for fused in (None, True, False)}
    assert ways == {None: True, True: True, False: False}


@pytest.mark.parametrize("make", [reflora.RefLoRAAdamW, reflora.wrap(AdamW)], ids=["RefLoRAAdamW", "over AdamW"])
def test_options_that_other_optimizers_leave_in_the_groups_are_taken_out(make: Any) -> None:
    """SAM and ZeroRedundancyOptimizer keep what they hand on in the groups that they share with it."""
    pairs = leaf_pairs([(4, 30, 21)])
    options = {"pairs": pairs, "interval": 500, "scalar": False}
    groups = [{"params": factors(pairs), **options}]
    optimizer = make(groups, lr=1e-2, **options)
    assert not {"pairs", "interval", "scalar"} & optimizer.param_groups[0].keys()
    with refused("parameter group 0: expected no 'pairs', got a list"):
        make([{"params": factors(pairs), "pairs": leaf_pairs([(4, 30, 21)] * 40)}], lr=1e-2, pairs=pairs)


@pytest.mark.parametrize(
    "name, value", [("lr", "1e-2"), ("lr", float("nan")), ("lr", -1.0), ("momentum", "0.9"), ("maximize", "no")]
)
def test_what_a_scheduler_writes_for_a_wrapped_class_is_refused(name: str, value: Any) -> None:
    pairs = leaf_pairs([(4, 30, 21), (5, 12, 9)])
    groups = [{"params": factors(pairs[:1])}, {"params": factors(pairs[1:])}]
    optimizer: Any = reflora.wrap(SGD)(groups, pairs=pairs, lr=1e-2)
    backward(pairs, targets(pairs))
    optimizer.param_groups[1][name] = value
    grads = [p.grad for p in factors(pairs)]
    with refused(f"^{name}: expected ", *factors(pairs), *grads, error=OF_ARGUMENTS):
        optimizer.step()


@pytest.mark.parametrize("make", [reflora.RefLoRAAdamW, reflora.wrap(AdamW)], ids=["RefLoRAAdamW", "over AdamW"])
@pytest.mark.parametrize("name, value", [("scalar", True), ("interval", 2), ("warmup_steps", 3), ("backend", "torch")])
def test_an_option_of_the_whole_optimizer_in_an_added_group_is_refused(make: Any, name: str, value: Any) -> None:
    """And in one that is there from the start."""
    pairs = leaf_pairs([(4, 30, 21)])
    groups = [{"params": factors(pairs)}, {"params": [torch.zeros(3, requires_grad=True)], name: value}]
    with refused(f"parameter group 1: expected no '{name}', got {value!r}"):
        make(groups, pairs=pairs, lr=1e-2)
    optimizer = make(factors(pairs), pairs=pairs, lr=1e-2)
    group = {"params": [torch.zeros(3, requires_grad=True)], name: value, "pairs": []}
    with refused(f"add_param_group: expected no '{name}'"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1 and "pairs" in group


def test_base_options_that_are_none() -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    with refused("base_options: expected a dictionary, got str", error=TypeError):
        reflora.wrap(SGD)(factors(pairs), pairs=pairs, lr=1e-2, base_options="momentum")
    with refused("base_options: expected 'momentum' once", error=TypeError):
        reflora.wrap(SGD)(factors(pairs), pairs=pairs, lr=1e-2, momentum=0.5, base_options={"momentum": 0.9})


def test_classes_with_reflora_in_them() -> None:
    cls = reflora.wrap(SGD)
    assert reflora.wrap(cls) is cls
    with refused("a class without RefLoRA, got RefLoRAAdamW", error=TypeError):
        reflora.wrap(reflora.RefLoRAAdamW)
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    for name in ("Lookahead", "TRAC", "OrthoGrad"):
        with refused(f"{name}, which wraps optimizers. Put RefLoRA inside", error=TypeError):
            reflora.wrap(getattr(pytorch_optimizer, name))


def test_a_bad_gradient_outside_the_pairs_skips_a_wrapped_step() -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    head = torch.randn(5, requires_grad=True)
    optimizer: Any = reflora.wrap(SGD)([*factors(pairs), head], pairs=pairs, lr=1e-2)
    backward(pairs, targets(pairs))
    head.grad = torch.full((5,), torch.nan)
    with unchanged(*factors(pairs), head):
        optimizer.step()
    assert optimizer.skipped_steps == 1


OTHER_STATES = {
    "SGD": lambda params: SGD(params, lr=0.5, momentum=0.9),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-2),
}


@pytest.mark.parametrize("name", OTHER_STATES)
def test_a_state_of_another_optimizer_is_refused(name: str) -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    other = OTHER_STATES[name](factors(pairs))
    run(other, pairs, targets(pairs), 1)
    optimizer = reflora.RefLoRAAdamW(pairs, lr=1e-2)
    with refused("loaded state: expected step and exp_avg"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2 and not optimizer.state


@pytest.mark.parametrize("cls", [reflora.RefLoRAAdamW, reflora.InvariantAdamW])
def test_a_state_without_second_moments_is_refused(cls: Any) -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    other, optimizer = AdamW(factors(pairs)), cls(pairs, lr=1e-2)
    run(other, pairs, targets(pairs), 1)
    for entries in other.state.values():
        del entries["exp_avg_sq"]
    with refused("loaded state: expected second moments: exp_avg_sq"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("step", ["3", torch.tensor(float("nan")), -1, torch.zeros(0)])
def test_a_count_that_is_none_is_refused(step: Any) -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = reflora.RefLoRAAdamW(pairs, lr=1e-2)
    run(optimizer, pairs, targets(pairs), 1)
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    with refused("loaded state 'step': expected a count"):
        optimizer.load_state_dict(state)
