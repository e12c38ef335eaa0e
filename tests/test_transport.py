"""RefLoRA-S over optimizers whose state can be moved, and refusal of the others."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop
from wrapping import assert_same, backward, factors, make_pairs, name_of, products, targets, twins, wrap

from benchmarks.baselines import published_reflora as published
from reflora import LoRAPair, reference
from reflora.optim import units
from reflora.optim.transport import StateMove

MOVABLE = [(SGD, {"momentum": 0.9}), (Adam, {}), (Adam, {"amsgrad": True}), (RAdam, {}), (NAdam, {})]


@pytest.mark.parametrize("cls, kwargs", MOVABLE, ids=name_of)
def test_scalar_is_the_same_optimizer_in_balanced_coordinates(cls, kwargs, fast_backend):
    """The factors are balanced after every step, state and all: with hand-moved state the plain optimizer agrees."""
    ours, optimizer, plain, base, goals = twins(cls, kwargs, {"scalar": True, "backend": fast_backend})

    def refactor(with_grads=False):
        for pair in plain:
            for A, B, *views in zip(
                pair.views_A(pair.A.data), pair.views_B(pair.B.data),
                *(pair.views_A(t) for t in moments(base, pair.A)), *(pair.views_B(t) for t in moments(base, pair.B)),
            ):  # fmt: skip
                root = reference.balance_scalar(A, B).sqrt()
                A *= root
                B /= root
                half = len(views) // 2
                for unit, side in ((1 / root, views[:half]), (root, views[half:])):
                    for power, view in zip((1, 2, 2), side):
                        view *= unit**power

    refactor()
    for _ in range(5):
        backward(ours, goals)
        optimizer.step()
        backward(plain, goals)
        base.step()
        refactor()
        assert_same(factors(ours), factors(plain))


def moments(optimizer, param):
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return [optimizer.state[param][name] for name in names if name in optimizer.state.get(param, {})]


def test_scalar_adam_trains_the_published_products():
    ours = [pair for pair in make_pairs() if pair.layout == "linear"]
    plain = copy.deepcopy(ours)
    optimizer, base = wrap(AdamW, ours, scalar=True), AdamW(factors(plain), lr=1e-2)
    published.attach(base, [(pair.A, pair.B) for pair in plain], scalar=True)
    goals = targets(ours)
    for _ in range(10):
        backward(ours, goals)
        optimizer.step()
        backward(plain, goals)
        base.step()
    assert_same(products(ours), products(plain))


def test_scalar_steps_follow_warmup_and_interval():
    ours, optimizer, plain, base, goals = twins(SGD, {}, {"scalar": True, "warmup_steps": 2, "interval": 2})
    balanced = []
    for _ in range(6):
        backward(ours, goals)
        optimizer.step()
        balanced.append(math.isclose(ours[0].A.norm().item(), ours[0].B.norm().item(), rel_tol=1e-9))
    assert balanced == [False, True, False, True, False, True]


def step_sizes(how, monkeypatch, interval):
    """Mean |step| of A and B under a noisy gradient, for 30 steps from the last one of the warm-up.

    how: "moved" state, gradients "kept" in the old unit, as for state that cannot be moved, or "neither".
    """
    monkeypatch.setattr(units, "movable", lambda cls: how == "moved")
    if how == "neither":
        monkeypatch.setattr(units.Units, "leave_identity", lambda *_: {})
    torch.manual_seed(3)
    W, A = torch.randn(64, 96) / 96**0.5, nn.Parameter(3 * torch.randn(8, 96) / 96**0.5)
    B = nn.Parameter(torch.zeros(64, 8))
    optimizer = wrap(Adam, [LoRAPair("layer", A, B)], lr=1e-3, warmup_steps=60, interval=interval)
    sizes = []
    for _ in range(90):
        X = torch.randn(96, 64)
        optimizer.zero_grad()
        (B @ (A @ X) - W @ X).square().mean().backward()
        before = A.detach().clone(), B.detach().clone()
        optimizer.step()
        sizes.append([(t.detach() - old).abs().mean().item() for t, old in zip((A, B), before)])
    return sizes[59:]


@pytest.mark.parametrize("interval", [1, 2])
def test_leaving_the_warm_up_does_not_jolt_adam(monkeypatch, interval):
    def worst(sizes):
        return max(max(later / start, start / later) for step in sizes for later, start in zip(step, sizes[0]))

    for how in ("moved", "kept"):
        sizes = step_sizes(how, monkeypatch, interval)
        assert worst(sizes[:2]) < 1.1 and worst(sizes) < 1.25
    assert worst(step_sizes("neither", monkeypatch, interval)) > 2


def test_leaving_B_zero_moves_the_state_once():
    A, B = nn.Parameter(torch.randn(4, 20)), nn.Parameter(torch.zeros(30, 4))
    optimizer = wrap(Adam, [LoRAPair("layer", A, B)], lr=1e-3)
    for step, phase in enumerate((0, 1, 1)):
        A.grad, B.grad = torch.zeros_like(A), torch.randn_like(B)
        moments = optimizer.state[B]["exp_avg"].clone() if step else torch.zeros_like(B)
        c = reference.balance_scalar(A.detach(), B.detach()).float() if step == 1 else 1.0
        optimizer.step()
        assert optimizer.state[A]["reflora_phase"].item() == phase
        torch.testing.assert_close(optimizer.state[B]["exp_avg"], 0.9 * c * moments + 0.1 * B.grad)


def test_unknown_classes_are_refused():
    pairs = make_pairs()
    with pytest.raises(ValueError, match="RefLoRA-S over Adagrad.*Adam, AdamW, NAdam, RAdam, SGD.*scalar=False"):
        wrap(Adagrad, pairs, scalar=True)
    with pytest.raises(ValueError, match="RefLoRA-S over RMSprop"):
        wrap(RMSprop, pairs, scalar=True)


def test_state_that_cannot_be_moved_is_refused_before_anything_changes():
    class Quantised(Adam):
        """Keeps a first moment of bytes, as 8-bit optimizers do."""

    pairs = make_pairs()
    optimizer = wrap(Quantised, pairs, scalar=True)
    optimizer.state[pairs[2].B]["exp_avg"] = torch.zeros(pairs[2].B.shape, dtype=torch.uint8)
    before = [factor.detach().clone() for factor in factors(pairs)]
    backward(pairs, targets(pairs))
    with pytest.raises(ValueError, match="layer 2, state of WrappedQuantised.*exp_avg"):
        optimizer.step()
    assert all(map(torch.equal, factors(pairs), before))
    optimizer.state[pairs[2].B] = {"state1": torch.zeros(3)}
    with pytest.raises(ValueError, match="'state1'"):
        StateMove(optimizer, pairs)
