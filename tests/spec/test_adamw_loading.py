"""RefLoRAAdamW's state, saved, loaded, pickled and copied."""

import copy
import io

import pytest
import torch
from refusals import refused
from toys import backward, clones, factors, leaf_pairs, random_grads, run, targets

from reflora import RefLoRAAdamW
from reflora.pairs import LoRAPair

BF16 = torch.bfloat16
STORED = {
    "float32 moments": dict(state_dtype=torch.float32),
    "master weights": dict(master_weights=True),
    "stochastic rounding": dict(stochastic_rounding=True, state_dtype=torch.float32),
}
SCHEDULES = {
    "exact": dict(warmup_steps=0),
    "warm-up": dict(warmup_steps=2, interval=3),
    "scalar": dict(warmup_steps=4, interval=2, scalar=True),
    "in a warm-up": dict(warmup_steps=6, interval=4),
}
RUNS = {f"{dtype}, {name}": (dtype, how) for dtype in (torch.float64, BF16) for name, how in SCHEDULES.items()}
for kept, beside in STORED.items():
    for name, how in {"default": {}, "scalar": dict(scalar=True), "a kept S": dict(interval=4, warmup_steps=0)}.items():
        RUNS[f"{kept}, {name}"] = BF16, {**how, **beside}


def make_run(dtype, **options):
    """Linear pairs, a stack of experts, and a parameter in no pair with options of its own."""
    torch.manual_seed(5)
    pairs = leaf_pairs([(4, 30, 21), (3, 12, 9)], dtype)
    pairs.append(tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in ((2 * 3, 21), (17, 3 * 2))))
    head, moe = torch.randn(7, dtype=dtype, requires_grad=True), LoRAPair("moe", *pairs[2], "experts(2)")
    groups = [{"params": factors(pairs), "lr": 2e-2}, {"params": [head], "weight_decay": 0.1}]
    return [*factors(pairs), head], RefLoRAAdamW(groups, pairs=[*pairs[:2], moe], lr=1e-2, **options)


def train(tensors, optimizer, steps):
    for step in steps:
        random_grads(tensors, torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize("dtype, options", RUNS.values(), ids=RUNS)
def test_resume_is_exact(fast_backend, dtype, options):
    tensors, optimizer = make_run(dtype, backend=fast_backend, **options)
    train(tensors, optimizer, range(5))
    stream = io.BytesIO()
    torch.save([optimizer.state_dict(), [t.detach() for t in tensors]], stream)
    train(tensors, optimizer, range(5, 11))
    stream.seek(0)
    state, weights = torch.load(stream, weights_only=True)
    others, resumed = make_run(dtype, backend=fast_backend, **options)
    with torch.no_grad():
        for t, w in zip(others, weights):
            t.copy_(w)
    resumed.load_state_dict(state)
    train(others, resumed, range(5, 11))
    for t, other in zip(tensors, others):
        assert torch.equal(t, other)
        for name, value in optimizer.state[t].items():
            assert torch.equal(value, resumed.state[other][name]) and value.dtype == resumed.state[other][name].dtype


def test_a_state_of_another_shape_is_refused_before_anything_changes():
    pairs, other = leaf_pairs([(4, 30, 21)]), leaf_pairs([(4, 30, 22)])
    optimizers = [RefLoRAAdamW(p) for p in (pairs, other)]
    for p, optimizer in zip((pairs, other), optimizers):
        run(optimizer, p, targets(p), 1)
    with refused("loaded state 'exp_avg': expected .21, 4., got .22, 4.", of=optimizers[0]):
        optimizers[0].load_state_dict(optimizers[1].state_dict())


def test_a_state_of_another_number_of_experts_is_refused():
    """The moments have the same shape, what is kept an expert has not."""
    A, B = torch.randn(4 * 2, 20).requires_grad_(), torch.randn(15, 2 * 4).requires_grad_()
    optimizers = [
        RefLoRAAdamW([A, B], pairs=[LoRAPair("moe", A, B, layout)], interval=2)
        for layout in ("experts(2)", "experts(4)")
    ]
    random_grads([A, B], torch.Generator().manual_seed(0))
    optimizers[0].step()
    with refused("loaded state 'reflora_phase': expected .4,., got .2,."):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_loads_a_torch_adamw_state(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    theirs = clones(pairs)
    plain = torch.optim.AdamW(factors(theirs), lr=3e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    random_grads(factors(theirs), generator)
    plain.step()
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, warmup_steps=10**9, backend=fast_backend)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 3e-3 and "reflora_steps" not in optimizer.state[pairs[0][0]]
    with torch.no_grad():
        for p, q in zip(factors(pairs), factors(theirs)):
            p.copy_(q)
    random_grads(factors(theirs), generator)
    for p, q in zip(factors(pairs), factors(theirs)):
        p.grad = q.grad.clone()
    plain.step(), optimizer.step()
    for p, q in zip(factors(pairs), factors(theirs)):
        assert torch.allclose(p, q, atol=1e-6) and float(optimizer.state[p]["step"]) == 2


def test_pickle_and_deepcopy(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, interval=2, backend=fast_backend)
    goals = targets(pairs)
    backward(pairs, goals)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    copied = [(twin.pairs[0].A, twin.pairs[0].B)]
    assert twin.param_groups[0]["params"][0] is copied[0][0]
    backward(pairs, goals), backward(copied, goals)
    optimizer.step(), twin.step()
    assert torch.equal(pairs[0][0], copied[0][0]) and torch.equal(pairs[0][1], copied[0][1])


def test_hooks_on_loading_are_heard(fast_backend):
    pairs = leaf_pairs([(4, 30, 21)], torch.float32)
    optimizer = RefLoRAAdamW(pairs, backend=fast_backend)
    random_grads(factors(pairs), torch.Generator().manual_seed(0))
    optimizer.step()

    def forget(_, state_dict):
        state = {k: {**v, "exp_avg": torch.zeros_like(v["exp_avg"])} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(forget)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not any(optimizer.state[t]["exp_avg"].any() for t in factors(pairs))


def test_a_loaded_seed_switches_nothing_on(fast_backend):
    ends = []
    for stochastic in (False, True):
        torch.manual_seed(0)
        pairs = leaf_pairs([(4, 30, 21)], torch.bfloat16)
        other = RefLoRAAdamW(clones(pairs), stochastic_rounding=stochastic)
        optimizer = RefLoRAAdamW(pairs, lr=1e-3, backend=fast_backend)
        optimizer.load_state_dict(other.state_dict())
        random_grads(factors(pairs), torch.Generator().manual_seed(0))
        optimizer.step()
        ends.append(pairs[0][0].detach())
    assert torch.equal(*ends)
