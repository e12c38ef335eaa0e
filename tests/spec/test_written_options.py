"""Options written to attributes of an optimizer: the next step follows them, or refuses before anything moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from refusals import OF_ARGUMENTS, refused
from torch.optim import ASGD, SGD, Adagrad, RMSprop, Rprop
from toys import clones, factors, leaf_pairs, random_grads

import reflora

FUSED = (reflora.RefLoRAAdamW, reflora.InvariantAdamW, reflora.RiemannianAdamW)
ATTRIBUTES = [
    (reflora.RefLoRAAdamW, "scalar", "no"), (reflora.RefLoRAAdamW, "interval", 0),
    (reflora.RefLoRAAdamW, "warmup_steps", -1), (reflora.RefLoRAAdamW, "precision", "half"),
    (reflora.RefLoRAAdamW, "carry_grams", 1), (reflora.RefLoRAAdamW, "check_grads", 1),
    (reflora.InvariantAdamW, "metric", "euclid"), (reflora.InvariantAdamW, "moments", "mean"),
    (reflora.InvariantAdamW, "damping", 0.0), (reflora.RiemannianAdamW, "reg", 0.0),
    (reflora.wrap(SGD), "scalar", "no"), (reflora.wrap(SGD), "interval", 0), (reflora.wrap(SGD), "warmup_steps", -1),
    (reflora.wrap(SGD), "precision", "half"), (reflora.InvariantAdamW, "moments", "momentum"),
    (reflora.InvariantAdamW, "damping", "much"),
    *((cls, "stochastic_rounding", value) for cls in FUSED for value in (True, "False")),
    *((cls, "backend", "gpu") for cls in (*FUSED, reflora.wrap(SGD))),
]  # fmt: skip


@pytest.mark.parametrize("cls, name, value", ATTRIBUTES, ids=str)
def test_what_is_written_to_an_attribute_is_refused_before_anything_moves(
    cls: Any, name: str, value: Any, fast_backend: str
) -> None:  # fmt: skip
    """Plain parameters are stepped first: they were, where pairs then failed."""
    pairs = leaf_pairs([(4, 30, 21)])
    other = torch.randn(5, requires_grad=True)
    optimizer = cls([*factors(pairs), other], pairs=pairs, lr=1e-2, backend=fast_backend)
    random_grads([*factors(pairs), other], torch.Generator().manual_seed(0))
    optimizer.step()
    setattr(optimizer, name, value)
    with refused(f"{name}: expected ", of=optimizer, error=OF_ARGUMENTS):
        optimizer.step()


def test_carried_grams_are_not_written_to_RefLoRA_S() -> None:
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = reflora.RefLoRAAdamW(pairs, scalar=True)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.carry_grams = True
    with refused("^carry_grams: expected False with scalar=True", of=optimizer):
        optimizer.step()


@pytest.mark.parametrize("cls", [*FUSED, reflora.wrap(SGD)], ids=lambda cls: cls.__name__)
def test_a_backend_that_is_written_is_taken(cls: Any) -> None:
    """Triton serves no CPU."""
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = cls(factors(pairs), pairs=pairs, lr=1e-2, backend="torch")
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.step()
    saved, before = copy.deepcopy(optimizer.state_dict()), optimizer.diagnostics().status
    optimizer.backend = "triton"
    with refused("backend 'triton': expected", of=optimizer, error=RuntimeError):
        optimizer.step()
    if cls in FUSED:
        with refused("backend 'triton': expected", of=optimizer, error=RuntimeError):
            optimizer.load_state_dict(saved)
    optimizer.backend = "torch"
    assert torch.equal(optimizer.diagnostics().status, before)
    optimizer.step()


@pytest.mark.parametrize("cls", FUSED, ids=lambda cls: cls.__name__)
def test_a_load_that_a_written_backend_refuses_leaves_no_state(cls: Any) -> None:
    """It left half of it: moments in the dtype of the factors."""
    pairs = leaf_pairs([(4, 30, 21)], torch.bfloat16)
    first, second = (cls(clones(pairs), state_dtype=torch.float32) for _ in range(2))
    random_grads(first.param_groups[0]["params"], torch.Generator().manual_seed(0))
    first.step()
    second.backend = "triton"
    with refused("backend 'triton': expected", of=second, error=RuntimeError):
        second.load_state_dict(first.state_dict())
    assert not second.state


@pytest.mark.parametrize("cls", [RMSprop, ASGD, Adagrad, Rprop])
@pytest.mark.parametrize("steps", [0, 1])
def test_RefLoRA_S_is_not_written_in_front_of_a_class_that_cannot_take_it(cls: Any, steps: int) -> None:
    """The base class's step was taken before the state turned out not to move."""
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = reflora.wrap(cls)(factors(pairs), pairs=pairs, lr=1e-2, warmup_steps=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        random_grads(factors(pairs), generator)
        optimizer.step()
    random_grads(factors(pairs), generator)
    optimizer.scalar = True
    grads = [t.grad for t in factors(pairs) if t.grad is not None]
    with refused("^RefLoRA-S over", *grads, of=optimizer):
        optimizer.step()


@pytest.mark.parametrize("cls", [reflora.RefLoRAAdamW, reflora.wrap(SGD)], ids=lambda cls: cls.__name__)
def test_an_interval_of_1_forgets_the_S_that_a_longer_one_has_kept(cls: Any) -> None:
    """It came back when the interval was raised again, of any age."""
    pairs = leaf_pairs([(4, 30, 21)])
    optimizer = cls(factors(pairs), pairs=pairs, lr=1e-2, interval=10, warmup_steps=0)
    generator, kept = torch.Generator().manual_seed(0), []
    for interval in (10, 1, 1, 1000):
        optimizer.interval = interval
        random_grads(factors(pairs), generator)
        optimizer.step()
        kept.append(optimizer.state[pairs[0][0]].get("reflora_S"))
    assert kept[1] is None and not torch.equal(kept[0], kept[3])


def test_RefLoRA_S_and_full_steps_may_alternate() -> None:
    """As if each stretch had its own optimizer, which loads the state of the one before."""
    start, ends = leaf_pairs([(4, 30, 21)]), []
    for rebuilt in (False, True):
        pairs, generator = clones(start), torch.Generator().manual_seed(0)

        def built(scalar: bool) -> Any:
            return reflora.wrap(SGD)(factors(pairs), pairs=pairs, lr=1e-2, momentum=0.9, scalar=scalar)  # noqa: B023

        optimizer = built(False)
        for scalar in (False, True, False, True):
            state = copy.deepcopy(optimizer.state_dict())
            if rebuilt:
                optimizer = built(scalar)
                optimizer.load_state_dict(state)
            optimizer.scalar = scalar
            for _ in range(2):
                random_grads(factors(pairs), generator)
                optimizer.step()
        ends.append([t.detach() for t in factors(pairs)])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_stochastic_rounding_is_not_written_beside_master_weights() -> None:
    pairs = leaf_pairs([(4, 30, 21)], torch.bfloat16)
    optimizer = reflora.InvariantAdamW(pairs, master_weights=True)
    optimizer.load_state_dict(reflora.InvariantAdamW(clones(pairs), stochastic_rounding=True).state_dict())
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.stochastic_rounding = True
    with refused("^stochastic_rounding: expected False with master_weights=True", of=optimizer):
        optimizer.step()


@pytest.mark.parametrize("cls", [*FUSED, reflora.wrap(SGD)], ids=lambda cls: cls.__name__)
def test_a_precision_that_is_written_is_that_of_the_next_step(cls: Any) -> None:
    start, ends = leaf_pairs([(4, 30, 21)]), {}
    for built, written in (("float64", "float64"), ("float64", "float32"), ("float32", "float32")):
        pairs = clones(start)
        optimizer = cls(factors(pairs), pairs=pairs, lr=1e-2, precision=built, backend="torch")
        optimizer.precision = written
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            random_grads(factors(pairs), generator)
            optimizer.step()
        ends[built, written] = torch.cat([t.detach().flatten() for t in factors(pairs)])
    assert torch.equal(ends["float64", "float32"], ends["float32", "float32"])
    assert not torch.equal(ends["float64", "float32"], ends["float64", "float64"])
