"""What RefLoRAAdamW keeps beside 16-bit factors, and the Grams it may carry from step to step."""

import copy
import io

import pytest
import torch
from toys import backward, clones, factors, leaf_pairs, random_grads, targets

from reflora import RefLoRAAdamW
from reflora.pairs import LoRAPair

STORED = {
    "float32 moments": dict(state_dtype=torch.float32),
    "master weights": dict(master_weights=True),
    "stochastic rounding": dict(stochastic_rounding=True, state_dtype=torch.float32),
}


def steps(optimizer, tensors, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        random_grads(tensors, generator)
        optimizer.step()


def experts(dtype):
    A, B = torch.randn(2 * 3, 21).to(dtype).requires_grad_(), torch.randn(17, 3 * 2).to(dtype).requires_grad_()
    return LoRAPair("moe", A, B, "experts(2)")


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


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    "how", [{}, {"scalar": True}, {"interval": 4, "warmup_steps": 0}], ids=["", "scalar", "a kept S"]
)
def test_resume_is_exact_with_what_is_kept_beside(fast_backend, stored, how):
    def make():
        torch.manual_seed(1)
        pairs = leaf_pairs([(4, 30, 21), (3, 12, 9)], torch.bfloat16)
        moe = experts(torch.bfloat16)
        options = dict(lr=1e-2, backend=fast_backend, **how, **STORED[stored])
        tensors = [*factors(pairs), moe.A, moe.B]
        return tensors, RefLoRAAdamW(tensors, pairs=[*pairs, moe], **options)

    tensors, optimizer = make()
    steps(optimizer, tensors, 3)
    stream = io.BytesIO()
    torch.save([optimizer.state_dict(), [t.detach() for t in tensors]], stream)
    steps(optimizer, tensors, 3, seed=1)
    stream.seek(0)
    state, weights = torch.load(stream, weights_only=True)
    others, resumed = make()
    with torch.no_grad():
        for t, w in zip(others, weights):
            t.copy_(w)
    resumed.load_state_dict(state)
    steps(resumed, others, 3, seed=1)
    assert all(torch.equal(t, other) for t, other in zip(tensors, others))
    for t, other in zip(tensors, others):
        for name, value in optimizer.state[t].items():
            assert torch.equal(value, resumed.state[other][name]) and value.dtype == resumed.state[other][name].dtype


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


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(state_dtype=torch.bfloat16), "state_dtype: expected None or torch.float32"),
        (dict(master_weights=True, stochastic_rounding=True), "stochastic_rounding: expected False with master"),
        (dict(carry_grams=True, scalar=True), "carry_grams: expected False with scalar"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RefLoRAAdamW(leaf_pairs([(4, 30, 21)]), **options)


def test_what_carried_grams_do_not_see(fast_backend):
    """A write through .data goes unseen until invalidate()."""
    ends = {}
    for carry, tell in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        pairs = leaf_pairs([(4, 130, 21)], torch.float32)
        optimizer = RefLoRAAdamW(pairs, lr=1e-2, carry_grams=carry, backend=fast_backend)
        steps(optimizer, factors(pairs), 2)
        pairs[0][1].data.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        if tell:
            optimizer.invalidate()
        steps(optimizer, factors(pairs), 1, seed=1)
        ends[carry, tell] = pairs[0][0].detach()
    assert torch.equal(ends[True, True], ends[False, False])
    if fast_backend == "cpp":
        assert not torch.equal(ends[True, False], ends[False, False])


def test_training_with_everything_on(fast_backend):
    """It still trains, and no worse than in float32."""
    losses = []
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, dict(master_weights=True, carry_grams=True)),
        (torch.bfloat16, dict(stochastic_rounding=True, state_dtype=torch.float32, carry_grams=True)),
    ):
        torch.manual_seed(0)
        start = leaf_pairs([(4, 30, 21), (3, 12, 9)], torch.float32)
        goals = [goal.to(dtype) for goal in targets(start)]
        pairs = [tuple(t.detach().to(dtype).requires_grad_() for t in pair) for pair in clones(start)]
        optimizer = RefLoRAAdamW(pairs, lr=2e-2, backend=fast_backend, **options)
        for _ in range(150):
            loss = backward(pairs, goals)
            optimizer.step()
        losses.append(float(loss))
    assert losses[1] < 1.3 * losses[0] + 0.5 and losses[2] < 1.3 * losses[0] + 0.5
