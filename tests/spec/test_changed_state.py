"""Optimizer state that is moved, replaced or reset between steps of RefLoRAAdamW: the next step is of what there is."""

import math

import pytest
import torch
from refusals import refused
from toys import clones, factors, leaf_pairs, random_grads, run, targets

from reflora import RefLoRAAdamW
from reflora.pairs import LoRAPair


@pytest.mark.parametrize("options", [{}, {"interval": 2, "amsgrad": True}, {"scalar": True}], ids=str)
@pytest.mark.parametrize(
    "move", [lambda t: setattr(t, "data", t.clone()), lambda t: t.set_(t.clone())], ids=["data", "set_"]
)
def test_state_that_has_moved_in_memory(backend, move, options):
    """Offloading it and back keeps the tensor and replaces its memory; the old one is filled with other things."""
    pairs = leaf_pairs([(4, 30, 21), (5, 12, 70)], torch.float32)
    ends = []
    for own in (pairs, clones(pairs)):
        optimizer = RefLoRAAdamW(own, lr=1e-2, backend=backend, **options)
        generator, spoilt = torch.Generator().manual_seed(0), []
        for number in range(5):
            if own is pairs and number in (2, 3):
                for value in (v for p in factors(own) for v in optimizer.state[p].values()):
                    old = value.data
                    move(value)
                    assert value.data_ptr() != old.data_ptr()
                    spoilt.append(old.fill_(7.0))
            random_grads(factors(own), generator)
            optimizer.step()
        assert all((old == 7.0).all() for old in spoilt)
        ends.append([*factors(own), *(v for p in factors(own) for v in optimizer.state[p].values())])
    assert all(map(torch.equal, *ends))


def replace_tensors(state, params):
    for p in params:
        state[p].update({name: value.clone() for name, value in state[p].items()})


def replace_entries(state, params):
    for p in params:
        state[p] = {name: value.clone() for name, value in state[p].items()}


def exchange_entries(state, params):
    state[params[0]], state[params[1]] = state[params[1]], state[params[0]]


def rename_entries(state, params):
    """The same entries in the same order, for other parameters."""
    known = list(state.items())
    state.clear()
    other = {params[0]: params[1], params[1]: params[0]}
    state.update((other.get(p, p), entries) for p, entries in known)


@pytest.mark.parametrize("change", [replace_tensors, replace_entries, exchange_entries, rename_entries])
def test_state_that_is_replaced_between_steps(backend, change):
    """The next step is that of a new optimizer with the same state."""
    pairs = leaf_pairs([(4, 30, 21)] * 3, torch.float32)
    optimizer, generator = RefLoRAAdamW(pairs, lr=1e-2, backend=backend), torch.Generator().manual_seed(0)
    for number in range(4):
        random_grads(factors(pairs), generator)
        if number:
            change(optimizer.state, [pairs[0][0], pairs[1][0]])
        copies = clones(pairs)
        fresh = RefLoRAAdamW(copies, lr=1e-2, backend=backend)
        for p, q in zip(factors(pairs), factors(copies)):
            q.grad = p.grad.clone()
            if number:
                fresh.state[q] = {name: value.clone() for name, value in optimizer.state[p].items()}
        optimizer.step(), fresh.step()
        for p, q in zip(factors(pairs), factors(copies)):
            assert torch.equal(p, q)
            assert all(torch.equal(value, fresh.state[q][name]) for name, value in optimizer.state[p].items())


@pytest.mark.parametrize("change", ["idle pair", "group"])
def test_a_refused_step_that_is_repeated(backend, change):
    """It binds again what the refused one had begun to bind: a pair's first state, another group."""
    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        (A, B), other = pairs = leaf_pairs([(4, 30, 21), (3, 9, 8)], torch.float32)
        groups = [{"params": [A, B]}, {"params": [*other]}, {"params": [torch.zeros(1).requires_grad_()], "lr": 1e-3}]
        optimizer = RefLoRAAdamW(groups, pairs=pairs, lr=1e-2, backend=backend)
        random_grads([A, B] if change == "idle pair" else factors(pairs), torch.Generator().manual_seed(0))
        optimizer.step()
        if change == "group":
            optimizer.param_groups[2]["params"] += optimizer.param_groups[1]["params"]
            optimizer.param_groups[1]["params"] = []
        random_grads(factors(pairs), torch.Generator().manual_seed(1))
        if fails:
            moment = optimizer.state[A]["exp_avg"]
            optimizer.state[A]["exp_avg"] = torch.zeros(3, 3)
            with refused("state 'exp_avg'"):
                optimizer.step()
            optimizer.state[A]["exp_avg"] = moment
        optimizer.step()
        ends.append([*factors(pairs), *(value for p in factors(pairs) for value in optimizer.state[p].values())])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("move", ["data", "replaced"])
def test_master_weights_that_have_moved_beside_wider_factors(backend, move):
    """Only the 16-bit factors have them."""
    start, ends = leaf_pairs([(4, 30, 21)], torch.bfloat16) + leaf_pairs([(5, 12, 70)], torch.float32), []
    for moved in (False, True):
        pairs = clones(start)
        optimizer = RefLoRAAdamW(pairs, lr=1e-2, master_weights=True, backend=backend)
        generator = torch.Generator().manual_seed(0)
        for number in range(4):
            random_grads(factors(pairs), generator)
            if moved and number:
                for p in pairs[0]:
                    old = optimizer.state[p]["master"]
                    new = old.clone()
                    if move == "data":
                        spoilt, old.data = old.data, new
                        spoilt.fill_(7.0)
                    else:
                        optimizer.state[p]["master"] = new
            optimizer.step()
        ends.append([*factors(pairs), *(optimizer.state[p]["master"] for p in pairs[0])])
    assert all(map(torch.equal, *ends))


def test_a_moment_that_is_a_lazy_negative(fast_backend):
    ends = []
    for lazy in (False, True):
        torch.manual_seed(0)
        ((A, B),) = leaf_pairs([(4, 30, 21)], torch.float32)
        optimizer = RefLoRAAdamW([(A, B)], lr=1e-2, backend=fast_backend)
        for seed in range(2):
            if lazy and seed:
                optimizer.state[B]["exp_avg"] = torch._neg_view(-optimizer.state[B]["exp_avg"])
            random_grads([A, B], torch.Generator().manual_seed(seed))
            optimizer.step()
        ends.append([A, B])
    assert all(map(torch.equal, *ends))


def one_place(value):
    """The same count for all experts, in one place of memory."""
    return value[:1].expand_as(value)


@pytest.mark.parametrize("entry", ["step", "reflora_phase", "reflora_steps"])
@pytest.mark.parametrize("change", [one_place, lambda t: torch._neg_view(-t)], ids=["one place", "negated"])
def test_counts_of_experts_in_other_memory(fast_backend, entry, change):
    ends = []
    for changed in (False, True):
        torch.manual_seed(0)
        A, B = torch.randn(8, 16).requires_grad_(), torch.randn(16, 8).requires_grad_()
        pair = LoRAPair("moe", A, B, "experts(2)")
        optimizer = RefLoRAAdamW([pair], lr=1e-2, warmup_steps=0, backend=fast_backend)
        for number in range(3):
            if changed and number:
                optimizer.state[A][entry] = change(optimizer.state[A][entry])
            random_grads([A, B], torch.Generator().manual_seed(number))
            optimizer.step()
        ends.append([A, B, *optimizer.state[A].values()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (0,)])
def test_counts_of_other_experts_are_refused(fast_backend, shape):
    """They were read and written past their end."""
    A, B = torch.randn(8, 16).requires_grad_(), torch.randn(16, 8).requires_grad_()
    optimizer = RefLoRAAdamW([LoRAPair("moe", A, B, "experts(2)")], lr=1e-2, backend=fast_backend)
    random_grads([A, B], torch.Generator().manual_seed(0))
    optimizer.step()
    around = torch.full((6,), 7.0)
    optimizer.state[A]["step"] = around[: math.prod(shape)].view(shape)
    with refused("state 'step': expected .2,.", A, B, around):
        optimizer.step()


@pytest.mark.parametrize("name, shape", [("reflora_S", (1, 2, 3, 3)), ("reflora_phase", (2,)), ("reflora_steps", ())])
def test_state_of_another_shape_is_refused(fast_backend, name, shape):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, interval=2, backend=fast_backend)
    run(optimizer, pairs, targets(pairs))
    optimizer.state[pairs[0][0]][name] = torch.zeros(shape)
    with refused(f"state '{name}': expected .1,", *pairs[0]):
        run(optimizer, pairs, targets(pairs), 1)


def test_state_that_is_reset_is_made_anew(fast_backend):
    pairs = leaf_pairs([(4, 30, 21), (4, 12, 9)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend)
    goals = targets(pairs)
    run(optimizer, pairs, goals)
    A, B = pairs[1]
    optimizer.state.pop(A)
    optimizer.state[B] = {}
    run(optimizer, pairs, goals, 1)
    assert [float(optimizer.state[t]["step"]) for t in factors(pairs)] == [3, 3, 1, 1]
