"""RefLoRA-S over optimizers whose state can be moved, and refusal of the others."""

import math

import pytest
import torch
from refusals import refused
from torch import nn
from torch.optim import SGD, Adagrad, Adam, NAdam, RAdam, RMSprop
from toys import step_sizes, worst_jolt
from wrapping import assert_same, backward, factors, make_pairs, name_of, targets, twins, wrap

from reflora import LoRAPair, reference
from reflora.optim import units
from reflora.optim.transport import Transport

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


def test_scalar_steps_follow_warmup_and_interval():
    ours, optimizer, plain, base, goals = twins(SGD, {}, {"scalar": True, "warmup_steps": 2, "interval": 2})
    balanced = []
    for _ in range(6):
        backward(ours, goals)
        optimizer.step()
        balanced.append(math.isclose(ours[0].A.norm().item(), ours[0].B.norm().item(), rel_tol=1e-9))
    assert balanced == [False, True, False, True, False, True]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("how", ["moved", "kept", "neither"])
def test_leaving_the_warm_up_does_not_jolt_adam(monkeypatch, how, interval):
    """The state is moved, or gradients are kept in the old unit, as for state that cannot be; neither shows why."""
    monkeypatch.setattr(units, "movable", lambda cls: how == "moved")
    if how == "neither":
        monkeypatch.setattr(units.Units, "leave_identity", lambda *_: {})

    def make(A, B):
        return wrap(Adam, [LoRAPair("layer", A, B)], lr=1e-3, warmup_steps=60, interval=interval)

    sizes, _ = step_sizes(make)
    if how == "neither":
        assert worst_jolt(sizes[59:]) > 2
    else:
        assert worst_jolt(sizes[59:61]) < 1.1 and worst_jolt(sizes[59:]) < 1.25


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
    with refused("RefLoRA-S over Adagrad.*Adam, AdamW, NAdam, RAdam, SGD.*scalar=False"):
        wrap(Adagrad, pairs, scalar=True)
    with refused("RefLoRA-S over RMSprop"):
        wrap(RMSprop, pairs, scalar=True)


def test_state_that_cannot_be_moved_is_refused_before_anything_changes():
    class Quantised(Adam):
        """Keeps a first moment of bytes, as 8-bit optimizers do."""

    pairs = make_pairs()
    optimizer = wrap(Quantised, pairs, scalar=True)
    optimizer.state[pairs[2].B]["exp_avg"] = torch.zeros(pairs[2].B.shape, dtype=torch.uint8)
    backward(pairs, targets(pairs))
    with refused("layer 2, state of WrappedQuantised.*exp_avg", *factors(pairs)):
        optimizer.step()
    optimizer.state[pairs[2].B] = {"state1": torch.zeros(3)}
    with refused("'state1'"):
        Transport(optimizer, pairs)
