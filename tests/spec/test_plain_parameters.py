"""Parameters beside the pairs, and factors without a partner: torch's AdamW, whatever they and their gradients are."""

import operator
from fractions import Fraction

import pytest
import torch
from refusals import refused
from toys import clones, factors, leaf_pairs, random_grads

from reflora import RefLoRAAdamW
from reflora.optim import plain
from reflora.pairs import LoRAPair


def stepped_beside(base, W, grads):
    """A parameter after steps beside a pair, or by torch's own AdamW; amsgrad, so that it has three moments."""
    pairs, W = leaf_pairs([(3, 8, 6)], torch.float32), torch.nn.Parameter(W)
    optimizer = base([W, *factors(pairs)], lr=1e-2, amsgrad=True, **({"pairs": pairs} if base is RefLoRAAdamW else {}))
    for grad in grads:
        random_grads(factors(pairs), torch.Generator().manual_seed(0))
        W.grad = grad
        optimizer.step()
    return W.detach()


STRIDED = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "with gaps": lambda t: torch.zeros(6, 10)[1:4, 2:6].copy_(t),
    "expanded": lambda t: t[:, :1].expand(3, 4),
}


@pytest.mark.parametrize("weight", ["contiguous", "transposed", "with gaps"])
@pytest.mark.parametrize("graded", STRIDED)
def test_plain_parameters_of_any_strides(weight, graded):
    """torch's fused step goes through memory in order: others' elements would be read, and written."""
    start, grads = torch.randn(3, 4), [STRIDED[graded](torch.randn(3, 4)) for _ in range(3)]
    W = STRIDED[weight](start)
    found = stepped_beside(RefLoRAAdamW, W, grads)
    torch.testing.assert_close(found, stepped_beside(torch.optim.AdamW, start.clone(), [g.clone() for g in grads]))
    if weight == "with gaps":
        outside = W._base.clone()
        outside[1:4, 2:6] = 0
        assert not outside.any()


@pytest.mark.filterwarnings("ignore:.*only one factor")
def test_a_lone_factor_with_a_gradient_of_other_strides(fast_backend):
    ends = []
    for change in (torch.clone, STRIDED["transposed"]):
        torch.manual_seed(0)
        A, B = leaf_pairs([(3, 8, 6)], torch.float32)[0]
        optimizer = RefLoRAAdamW([(A, B)], lr=1e-2, backend=fast_backend)
        for _ in range(3):
            B.grad = change(torch.randn(6, 3))
            optimizer.step()
        ends.append(B.detach())
    assert torch.equal(*ends)


def free(t):
    t.untyped_storage().resize_(0)


def to_float8(W, _):
    W.data = W.data.to(torch.float8_e4m3fn)
    W.grad = W.data.clone()


BROKEN = {
    "a gradient of another shape": (lambda W, _: setattr(W, "data", torch.zeros(9)), "a gradient: .* .9,., got .5,."),
    "a freed gradient": (lambda W, _: free(W.grad), "a gradient: .*was freed"),
    "a freed parameter": (lambda W, _: free(W), "a parameter: .*was freed"),
    "a freed moment": (lambda W, state: free(state["exp_avg_sq"]), "state 'exp_avg_sq': .*was freed"),
    "a freed count": (lambda W, state: free(state["step"]), "state 'step': .*was freed"),
    "a misshapen moment": (
        lambda W, state: state.update(exp_avg=torch.zeros(3)),
        "'exp_avg': .* .5,., got .3,.",
    ),
    "no count": (lambda W, state: state.update(step=torch.zeros(0)), "state 'step': .* .1,., got .0,."),
    "an expanded parameter": (lambda W, _: setattr(W, "data", torch.zeros(1).expand(5)), "a parameter: .*share mem"),
    "float8": (to_float8, "a parameter: .*got torch.float8_e4m3fn"),
}


KINDS = [
    (kind, first) for kind in BROKEN for first in (False, True) if not first or not kind.endswith(("moment", "count"))
]


@pytest.mark.filterwarnings("ignore:.*only one factor")
@pytest.mark.parametrize("kind, first", KINDS)
def test_a_plain_parameter_that_cannot_be_stepped_is_refused_before_anything_is_written(fast_backend, kind, first):
    """first: before there is any state."""
    pairs, W = leaf_pairs([(3, 8, 6)], torch.float32), torch.nn.Parameter(torch.randn(5))
    A, B = torch.randn(8, 16).requires_grad_(), torch.randn(16, 8).requires_grad_()
    kept = [*factors(pairs), A, B, torch.nn.Parameter(torch.ones(3))]
    known = [*pairs, LoRAPair("moe", A, B, "experts(2)")]
    optimizer = RefLoRAAdamW([{"params": kept}, {"params": [W]}], pairs=known, lr=1e-2, backend=fast_backend)
    random_grads([W, *kept], torch.Generator().manual_seed(0))
    if not first:
        optimizer.step()
    spoil, message = BROKEN[kind]
    spoil(W, optimizer.state.get(W))
    B.grad, entries = None, [t for p in kept for t in (p, *optimizer.state.get(p, {}).values())]
    with refused(message, *entries):
        optimizer.step()
    assert all(map(operator.is_, entries, [t for p in kept for t in (p, *optimizer.state.get(p, {}).values())]))
    assert bool(optimizer.state) != first


def test_what_torch_alone_refuses_is_refused_before_the_pairs_move(fast_backend, monkeypatch):
    pairs, W = leaf_pairs([(3, 8, 6)], torch.float32), torch.nn.Parameter(torch.randn(5))
    optimizer = RefLoRAAdamW([W, *factors(pairs)], pairs=pairs, lr=1e-2, backend=fast_backend)
    random_grads([W, *factors(pairs)], torch.Generator().manual_seed(0))
    monkeypatch.setattr(plain, "adamw", lambda *_, **options: 1 / 0)
    with refused("division by zero", W, *factors(pairs), error=ZeroDivisionError):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_lazy_gradients_and_moments_of_plain_parameters(dtype):
    """Views that are negated or conjugated when they are read, in gradients and in loaded moments."""
    ends = []
    for lazy in (False, True):
        torch.manual_seed(0)
        W = torch.nn.Parameter(torch.randn(5, dtype=dtype))
        pairs = leaf_pairs([(3, 8, 6)], torch.float32)
        optimizer = RefLoRAAdamW([W, *factors(pairs)], pairs=pairs, lr=1e-2)
        for number in range(3):
            random_grads(factors(pairs), torch.Generator().manual_seed(0))
            grad = torch.randn(5, dtype=dtype)
            W.grad = grad.conj().resolve_conj().conj() if lazy and dtype.is_complex else grad.clone()
            if lazy and not dtype.is_complex:
                W.grad = torch._neg_view(-grad)
                assert W.grad.is_neg()
            if lazy and number == 2:
                moment = optimizer.state[W]["exp_avg"]
                optimizer.state[W]["exp_avg"] = torch._neg_view(-moment) if not dtype.is_complex else moment
            optimizer.step()
        ends.append(W.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_numbers_of_any_type(fast_backend, name):
    ends = []
    for number in (Fraction(1, 64), 1 / 64):
        torch.manual_seed(0)
        pairs, W = leaf_pairs([(3, 8, 6)], torch.float32), torch.nn.Parameter(torch.randn(5))
        options = {"lr": 1e-2, name: number}
        optimizer = RefLoRAAdamW([W, *factors(pairs)], pairs=pairs, backend=fast_backend, **options)
        random_grads([W, *factors(pairs)], torch.Generator().manual_seed(0))
        optimizer.step()
        ends.append([W, *factors(pairs)])
    assert all(map(torch.equal, *ends))


def trained(backend, pairs, steps=6):
    optimizer = RefLoRAAdamW(pairs, lr=1e-2, warmup_steps=0, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        random_grads(factors(pairs), generator)
        optimizer.step()
    assert all(optimizer.state[A]["reflora_phase"] == 1 for A, _ in pairs)
    return optimizer


@pytest.mark.filterwarnings("ignore:.*only one")
def test_a_factor_that_leaves_the_optimizer_and_one_without_a_gradient_are_alike(fast_backend):
    """The other takes plain steps, so its moments are moved to units of S = I."""
    start, ends = leaf_pairs([(3, 8, 6), (4, 9, 7)], torch.float32), []
    for removed in (False, True):
        pairs = clones(start)
        optimizer = trained(fast_backend, pairs)
        A, B = pairs[0]
        if removed:
            optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not A]
        for _ in range(2):
            random_grads(factors(pairs), torch.Generator().manual_seed(1))
            A.grad = None
            optimizer.step()
        ends.append([*factors(pairs), *(optimizer.state[B][name] for name in ("exp_avg", "exp_avg_sq"))])
    assert all(map(torch.equal, *ends))


@pytest.mark.filterwarnings("ignore:.*only one factor")
def test_a_step_that_is_refused_moves_no_moments(fast_backend):
    pairs = leaf_pairs([(3, 8, 6), (4, 9, 7)], torch.float32)
    optimizer = trained(fast_backend, pairs)
    random_grads(factors(pairs), torch.Generator().manual_seed(1))
    pairs[0][0].grad = None
    pairs[1][0].grad.data = torch.ones(9, 4)
    with refused("Gradients are shaped like their parameters", of=optimizer):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*only one")
def test_moments_of_a_pair_that_leaves_are_moved_all_or_none(fast_backend):
    pairs = leaf_pairs([(3, 8, 6), (4, 9, 7)], torch.float32)
    optimizer = trained(fast_backend, pairs)
    A, B = pairs[0]
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not A]
    kept = [optimizer.state[B][name] for name in ("exp_avg", "exp_avg_sq")] + [optimizer.state[A]["exp_avg"]]
    free(optimizer.state[A]["exp_avg_sq"])
    random_grads(factors(pairs), torch.Generator().manual_seed(1))
    with refused("state 'exp_avg_sq': .*was freed", *kept, optimizer.state[A]["reflora_phase"]):
        optimizer.step()
