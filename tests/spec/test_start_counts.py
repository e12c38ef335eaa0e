"""The steps that a pair's start is counted in: from where, by whom, and as what they are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from refusals import refused
from start_cases import WAYS, start_of, trained
from toys import factors, leaf_pairs, random_grads

import reflora
from reflora.columns import PLAIN


def taken(optimizer: torch.optim.Optimizer, pairs) -> list[list[float]]:
    return [optimizer.state[A]["reflora_steps"].tolist() for A, _ in pairs]


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("interval", [1, 3])
def test_a_pair_whose_B_stays_0_is_still_to_start(backend, kind, interval):
    """As an expert's that no token was sent to: its gradients are zeros, and S is I whatever the count says."""
    pairs = start_of()
    optimizer = WAYS[kind](pairs, backend=backend, interval=interval)
    idle = pairs[1]
    for _ in range(4 if backend == "triton" else 12):
        random_grads(factors(pairs), torch.Generator().manual_seed(0))
        for factor in idle:
            factor.grad.zero_()
        optimizer.step()
    steps, waited = (counts[0] for counts in taken(optimizer, pairs))
    assert waited <= interval < steps
    trained(optimizer, pairs, (0, 3))
    assert taken(optimizer, pairs)[1][0] <= waited + 3


@pytest.mark.parametrize("kind", WAYS)
def test_the_first_step_counts_as_before(fast_backend, kind):
    """From B = 0, and from a B that is there, the tenth step is the tenth."""
    for pairs in (start_of(), leaf_pairs([(4, 30, 21)])):
        optimizer = WAYS[kind](pairs, backend=fast_backend)
        trained(optimizer, pairs, (0, 10))
        assert taken(optimizer, pairs) == [[10.0]] * len(pairs)


@pytest.mark.parametrize("base", ["Adagrad", "AdamW", "RMSprop", "Adafactor"])
def test_a_factor_that_trained_alone_or_has_state_from_the_start_counts_no_steps(base):
    """Adagrad makes its state at once; the second pair's A trains while its B is frozen."""
    pairs = leaf_pairs([(4, 30, 21), (3, 10, 17), (2, 12, 9)])
    optimizer = reflora.wrap(getattr(torch.optim, base))(factors(pairs), pairs=pairs, lr=1e-2, backend="torch")
    for step in range(9):
        random_grads(factors(pairs), torch.Generator().manual_seed(step))
        if step < 5:
            pairs[1][1].grad = pairs[2][0].grad = pairs[2][1].grad = None
        optimizer.step()
    assert taken(optimizer, pairs) == [[9.0], [4.0], [4.0]]


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_counts_of_a_checkpoint_in_another_type_are_read_as_numbers(fast_backend, kind, dtype):
    """The core reads float32: of a narrower tensor it would read what lies behind."""
    pairs = start_of()
    optimizer = WAYS[kind](pairs, backend=fast_backend)
    trained(optimizer, pairs, (0, 5))
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        for name in ("reflora_steps", "reflora_phase"):
            if name in entries:
                entries[name] = entries[name].to(dtype)
    resumed = WAYS[kind](pairs, backend=fast_backend)
    resumed.load_state_dict(state)
    trained(resumed, pairs, (0, 1))
    assert taken(resumed, pairs) == [[6.0], [6.0]]
    assert all(resumed.state[A]["reflora_steps"].dtype == torch.float32 for A, _ in pairs)


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("bad", [torch.ones(2), 3.0])
def test_counts_of_another_shape_are_refused(kind, bad):
    pairs = start_of()
    optimizer = WAYS[kind](pairs, backend="torch")
    trained(optimizer, pairs, (0, 2))
    state = optimizer.state_dict()
    next(entries for entries in state["state"].values() if "reflora_steps" in entries)["reflora_steps"] = bad
    with refused(r"loaded state 'reflora_steps': expected \(1,\), got"):
        optimizer.load_state_dict(state)


def test_a_wrapped_warm_up_is_reported_as_plain():
    pairs = leaf_pairs([(4, 30, 21), (3, 10, 17)])
    optimizer = WAYS["wrap"](pairs, warmup_steps=2)
    found = []
    for step in range(3):
        trained(optimizer, pairs, (step, step + 1))
        found.append(optimizer.diagnostics().status.tolist())
    assert found[:2] == [[PLAIN, PLAIN]] * 2 and PLAIN not in found[2]


def test_experts_of_which_one_factor_alone_trains_are_loaded():
    """In front of SGD, which keeps nothing: what holds their place has an entry an expert."""
    pairs = [reflora.LoRAPair("", torch.randn(6, 8).requires_grad_(), torch.randn(7, 6).requires_grad_(), "experts(2)")]
    factors_of = [pairs[0].A, pairs[0].B]
    first, second = (reflora.wrap(torch.optim.SGD)(factors_of, pairs=pairs, lr=1e-2, warmup_steps=1) for _ in range(2))
    random_grads(factors_of, torch.Generator().manual_seed(0))
    pairs[0].B.grad = None
    with pytest.warns(UserWarning, match="none is trained"):
        first.step()
    first._hold_places()
    second.load_state_dict(first.state_dict())
    assert second.state[pairs[0].A]["reflora_phase"].shape == (2,)
