"""PairOps: S read off a backend, applied again later, and tables that follow the factors."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from wrapping import backward, factors, make_pairs, precondition_by_reference, targets

from reflora import LoRAPair, reference
from reflora.optim.pairs import PairOps

APPLY = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
TOLERANCE = {torch.bfloat16: 1e-5, torch.float32: 1e-5, torch.float64: 1e-11}


@pytest.mark.parametrize("dtype", APPLY, ids=str)
def test_solve(fast_backend, dtype):
    pairs = make_pairs(dtype=dtype)
    solved = PairOps(pairs, fast_backend).solve(range(len(pairs)))
    for index, pair in enumerate(pairs):
        assert solved[index].dtype == APPLY[dtype]
        for A, B, both in zip(pair.views_A(pair.A.detach()), pair.views_B(pair.B.detach()), solved[index]):
            for matrix, expected in zip(both, reference.choose(A, B)):
                torch.testing.assert_close(matrix.double(), expected, rtol=1e-4, atol=TOLERANCE[dtype])


def test_solve_of_a_layer_with_fewer_columns_than_rank(fast_backend):
    A, B = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(20, 8))
    S, S_inv = PairOps([LoRAPair("wide", A, B)], fast_backend).solve([0])[0][0]
    c = reference.balance_scalar(A.detach(), B.detach()).float()
    torch.testing.assert_close(S, c * torch.eye(8))
    torch.testing.assert_close(S_inv, torch.eye(8) / c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_apply_is_precondition(fast_backend, dtype):
    pairs = make_pairs(dtype=dtype)
    ops = PairOps(pairs, fast_backend)
    goals = targets(pairs)
    backward(pairs, goals)
    ops.apply(ops.solve(range(len(pairs))))
    applied = [factor.grad for factor in factors(pairs)]
    backward(pairs, goals)
    ops.precondition([True] * len(pairs))
    for mine, other in zip(applied, factors(pairs)):
        torch.testing.assert_close(mine, other.grad, rtol=1e-4, atol=1e-5)
    backward(pairs, goals)
    precondition_by_reference(pairs)
    for mine, other in zip(applied, factors(pairs)):
        torch.testing.assert_close(mine, other.grad, rtol=1e-4, atol=1e-5)


def test_products_past_the_storage_range_saturate():
    A, B = (nn.Parameter(torch.eye(2, dtype=torch.float16) * scale) for scale in (2.0**-7, 2.0**7))
    ops = PairOps([LoRAPair("layer", A, B)])
    A.grad, B.grad = torch.ones_like(A), torch.full_like(B, 1e4)
    ops.apply(ops.solve([0]))
    assert B.grad.max() == torch.finfo(torch.float16).max and A.grad.isfinite().all()


def test_factors_that_move_are_followed():
    pairs = make_pairs()
    ops = PairOps(pairs)
    goals = targets(pairs)
    for _ in range(2):
        backward(pairs, goals)
        gradients = [factor.grad.clone() for factor in factors(pairs)]
        ops.precondition([True] * len(pairs))
        mine = [factor.grad for factor in factors(pairs)]
        for factor, gradient in zip(factors(pairs), gradients):
            factor.grad = gradient
        precondition_by_reference(pairs)
        for gradient, factor in zip(mine, factors(pairs)):
            torch.testing.assert_close(gradient, factor.grad)
        for factor in factors(pairs):
            factor.data = torch.randn_like(factor)


def test_gradients_are_let_go():
    pairs = make_pairs()
    ops = PairOps(pairs)
    backward(pairs, targets(pairs))
    gradients = [weakref.ref(factor.grad) for factor in factors(pairs)]
    ops.precondition([True] * len(pairs))
    for factor in factors(pairs):
        factor.grad = None
    gc.collect()
    assert not any(gradient() is not None for gradient in gradients)


def test_what_became_of_pairs_is_read_by_views(fast_backend):
    """An index made on the host would wait for the device."""
    pairs = make_pairs()
    ops = PairOps(pairs, fast_backend)
    ops.solve(range(len(pairs)))
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with Calls():
        found = ops.outcome()
    assert calls and all(function.is_view for function in calls), calls
    assert [len(found[index].scale) for index in range(len(pairs))] == [pair.experts for pair in pairs]


def test_norms_of_pairs_on_several_devices():
    pairs = [LoRAPair(name, torch.ones(3, 8, device=name), torch.ones(7, 3, device=name)) for name in ("cpu", "meta")]
    norms = PairOps(pairs, "torch").norms([1, 0])
    assert [(index, norm.device.type, norm.shape) for index, norm in sorted(norms.items())] == [
        (0, "cpu", (2, 1)), (1, "meta", (2, 1)),
    ]  # fmt: skip
    torch.testing.assert_close(norms[0][:, 0], torch.tensor([24.0, 21.0], dtype=torch.float64).sqrt())


def test_operations_on_some_pairs_end_when_all_are_solved_for(fast_backend):
    """They would keep factors alive that have been replaced since."""
    pairs = [LoRAPair(str(i), torch.randn(3, 8), torch.randn(7, 3)) for i in range(3)]
    ops = PairOps(pairs, fast_backend)
    ops.solve([0, 1])
    kept = weakref.ref(ops._some[0])
    ops.solve([0, 1, 2])
    gc.collect()
    assert kept() is None
