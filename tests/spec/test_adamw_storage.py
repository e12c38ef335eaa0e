"""What RefLoRAAdamW keeps beside 16-bit factors."""

import copy

import pytest
import torch
from test_adamw_loading import STORED
from toys import factors, leaf_pairs, random_grads

from reflora import RefLoRAAdamW


def steps(optimizer, tensors, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        random_grads(tensors, generator)
        optimizer.step()


def test_small_steps_add_up_only_with_what_is_kept_beside(fast_backend):
    """lr far below the spacing of bfloat16: rounding to nearest loses every step."""
    moved = {}
    for name, options in {"nearest": {}, **STORED}.items():
        torch.manual_seed(0)
        pairs = [(torch.ones(4, 300, dtype=torch.bfloat16), torch.ones(200, 4, dtype=torch.bfloat16))]
        pairs = [tuple(t.requires_grad_() for t in pair) for pair in pairs]
        optimizer = RefLoRAAdamW(
            pairs, lr=1e-4, weight_decay=0.0, warmup_steps=10**9, backend=fast_backend, **options
        )  # fmt: skip
        for _ in range(100):
            for t in factors(pairs):
                t.grad = torch.ones_like(t)
            optimizer.step()
        moved[name] = 1 - float(pairs[0][0].detach().double().mean())
    assert moved["nearest"] == 0 == moved["float32 moments"]
    assert moved["master weights"] == pytest.approx(1e-2, rel=0.3)
    # each of the 1200 elements makes a few steps of 2^-8 or so by chance
    assert moved["stochastic rounding"] == pytest.approx(1e-2, rel=0.1)


def test_a_torch_state_in_bfloat16_is_widened(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.bfloat16)
    plain = torch.optim.AdamW(factors(pairs), lr=1e-3)
    steps(plain, factors(pairs), 1)
    optimizer = RefLoRAAdamW(pairs, master_weights=True, backend=fast_backend)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    steps(optimizer, factors(pairs), 1)
    for t in factors(pairs):
        state = optimizer.state[t]
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "master")} == {torch.float32}
        assert torch.equal(state["master"].bfloat16(), t) and float(state["step"]) == 2


@pytest.mark.parametrize("stored", [name for name in STORED if name != "stochastic rounding"])
def test_a_factor_without_a_partner_takes_its_step_in_the_moments_type(fast_backend, stored):
    pairs = leaf_pairs([(4, 30, 21)], torch.bfloat16)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, backend=fast_backend, **STORED[stored])
    steps(optimizer, factors(pairs), 1)
    A, B = pairs[0]
    before = A.detach().clone()
    A.grad, B.grad = torch.randn_like(A), None
    optimizer.step()
    state = optimizer.state[A]
    assert not torch.equal(A, before) and state["exp_avg"].dtype == torch.float32 and float(state["step"]) == 2
    assert "master" not in state or torch.equal(state["master"].bfloat16(), A)


def test_float32_factors_keep_no_more_than_torch_does(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, master_weights=True, stochastic_rounding=False, backend=fast_backend)
    steps(optimizer, factors(pairs), 1)
    assert set(optimizer.state[pairs[0][1]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[pairs[0][0]]) == {"step", "exp_avg", "exp_avg_sq", "reflora_phase", "reflora_steps"}


def test_stochastic_rounding_repeats_itself_and_follows_torch_seeds(fast_backend):
    ends = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        pairs = leaf_pairs([(4, 30, 21)], torch.bfloat16)
        torch.manual_seed(seed)
        optimizer = RefLoRAAdamW(pairs, lr=1e-3, stochastic_rounding=True, backend=fast_backend)
        steps(optimizer, factors(pairs), 3)
        ends.append(pairs[0][0].detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
