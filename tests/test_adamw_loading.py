"""RefLoRAAdamW's state, saved, loaded, pickled and copied."""

import copy
import io

import pytest
import torch
from toys import backward, clones, factors, leaf_pairs, random_grads, targets

from reflora import RefLoRAAdamW
from reflora.pairs import LoRAPair


def make_run(scalar, interval, warmup, backend, dtype=torch.float64):
    torch.manual_seed(5)
    pairs = leaf_pairs([(4, 30, 21), (3, 12, 9)], dtype)
    head = torch.randn(7, dtype=dtype, requires_grad=True)
    optimizer = RefLoRAAdamW(
        [{"params": factors(pairs), "lr": 2e-2}, {"params": [head], "weight_decay": 0.1}], pairs=pairs, lr=1e-2,
        scalar=scalar, interval=interval, warmup_steps=warmup, backend=backend,
    )  # fmt: skip
    return pairs, head, optimizer


def train(pairs, head, optimizer, goals, steps):
    for _ in range(steps):
        backward(pairs, goals)
        head.grad = head.detach() - 1
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scalar, interval, warmup", [(False, 1, 0), (False, 3, 2), (True, 2, 4), (False, 4, 6)])
def test_resume_is_exact(fast_backend, dtype, scalar, interval, warmup):
    options = (scalar, interval, warmup, fast_backend, dtype)
    pairs, head, optimizer = make_run(*options)
    goals = targets(pairs)
    train(pairs, head, optimizer, goals, 5)
    stream = io.BytesIO()
    torch.save([optimizer.state_dict(), [t.detach() for t in (*factors(pairs), head)]], stream)
    train(pairs, head, optimizer, goals, 6)

    stream.seek(0)
    state, weights = torch.load(stream, weights_only=True)
    other, other_head, resumed = make_run(*options)
    with torch.no_grad():
        for t, w in zip((*factors(other), other_head), weights):
            t.copy_(w)
    resumed.load_state_dict(state)
    train(other, other_head, resumed, goals, 6)
    for p, q in zip((*factors(pairs), head), (*factors(other), other_head)):
        assert torch.equal(p, q)


def test_a_state_of_another_shape_is_refused_before_anything_changes():
    pairs, other = leaf_pairs([(4, 30, 21)]), leaf_pairs([(4, 30, 22)])
    optimizers = [RefLoRAAdamW(p) for p in (pairs, other)]
    for p, optimizer in zip((pairs, other), optimizers):
        backward(p, targets(p))
        optimizer.step()
    before = copy.deepcopy(optimizers[0].state_dict())
    with pytest.raises(ValueError, match="loaded state 'exp_avg': expected .21, 4., got .22, 4."):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    after = optimizers[0].state_dict()
    assert all(
        torch.equal(before["state"][k][n], after["state"][k][n]) for k in before["state"] for n in ("exp_avg", "step")
    )


def test_a_state_of_another_number_of_experts_is_refused():
    """The moments have the same shape, what is kept an expert has not."""
    A, B = torch.randn(4 * 2, 20).requires_grad_(), torch.randn(15, 2 * 4).requires_grad_()
    optimizers = [
        RefLoRAAdamW([A, B], pairs=[LoRAPair("moe", A, B, layout)], interval=2)
        for layout in ("experts(2)", "experts(4)")
    ]
    random_grads([A, B], torch.Generator().manual_seed(0))
    optimizers[0].step()
    with pytest.raises(ValueError, match="loaded state 'reflora_phase': expected .4,., got .2,."):
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
