"""Tensors whose address says nothing, or something else than their values, are refused: no call may crash."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import reflora
from reflora import RefLoRAAdamW
from reflora.contract import LoRAPair
from reflora.plan import Plan


def negated(*shape):
    """What the imaginary part of a conjugate is: the negatives of what lies in memory."""
    t = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert t.is_neg()
    return t


def freed(*shape, left=0):
    t = torch.randn(*shape)
    t.untyped_storage().resize_(left)
    return t


class Wrapping(torch.Tensor):
    """A tensor with no memory of its own, as quantised ones are."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def fake(*shape):
    with FakeTensorMode():
        return torch.randn(*shape)


MAKERS = {
    "negated": (negated, "resolve_neg"), "freed": (freed, "memory of its own"),
    "partly freed": (lambda *shape: freed(*shape, left=8), "memory of its own"), "fake": (fake, "memory of its own"),
    "wrapping": (lambda *shape: Wrapping(shape), "memory of its own"),
    "of zeros": (lambda *shape: torch._efficientzerotensor(shape), "memory of its own"),
    "sparse": (lambda *shape: torch.randn(shape).to_sparse(), "a dense tensor"),
    "nested": (lambda *shape: torch.nested.nested_tensor([torch.randn(shape)]), "a dense tensor"),
    "meta": (lambda *shape: torch.randn(shape, device="meta"), "device|like"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_refused_as_factor_and_as_gradient(fast_backend, kind):
    make, message = MAKERS[kind]
    A, B = torch.randn(4, 10), torch.randn(6, 4)
    before = A.clone(), B.clone()
    calls = [
        lambda: reflora.refactor_([(make(4, 10), B)], backend=fast_backend),
        lambda: reflora.refactor_([(A, make(6, 4))], backend=fast_backend),
        lambda: reflora.precondition_([(A, B)], [(make(4, 10), B.clone())], backend=fast_backend),
        lambda: reflora.precondition_([(A, B)], [(A.clone(), make(6, 4))], backend=fast_backend),
        lambda: RefLoRAAdamW(pairs=[(make(4, 10), B)], params=[B.clone().requires_grad_()], backend=fast_backend),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message) as told:
            call()
        assert len(str(told.value)) < 300
    assert torch.equal(A, before[0]) and torch.equal(B, before[1])


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_refused_inside_torch_func(fast_backend, transform):
    B = torch.randn(6, 4)

    def loss(A):
        reflora.refactor_([(A, B)], backend=fast_backend)
        return A.sum()

    A = torch.randn(4, 10) if transform == "grad" else torch.randn(3, 4, 10)
    with pytest.raises(ValueError, match="inside torch.func"):
        getattr(torch.func, transform)(loss)(A)


def test_served_all_the_same(fast_backend):
    """Parameters, tensors with a history, negated ones that were resolved."""
    A, B = torch.randn(4, 10), negated(6, 4).resolve_neg()
    wanted = A.clone(), B.clone()
    reflora.refactor_([wanted], backend=fast_backend)
    history = A.clone().requires_grad_() * 1
    plain = torch.nn.Parameter(B.clone())
    assert reflora.refactor_([(history, plain)], backend=fast_backend).refactored == 1
    assert torch.equal(history.detach(), wanted[0]) and torch.equal(plain.detach(), wanted[1])


def test_a_step_whose_gradient_was_freed(fast_backend):
    """FSDP and offloading free storages; the C++ core would read address 0."""
    factors = [torch.randn(4, 10).requires_grad_(), torch.randn(6, 4).requires_grad_()]
    optimizer = RefLoRAAdamW([tuple(factors)], backend=fast_backend)
    for t in factors:
        t.grad = torch.randn_like(t)
    optimizer.step()
    before = [t.detach().clone() for t in factors]
    factors[1].grad = freed(6, 4)
    with pytest.raises(ValueError, match="whose storage was freed"):
        optimizer.step()
    assert all(torch.equal(t.detach(), old) for t, old in zip(factors, before))


def test_a_step_whose_factor_was_freed(fast_backend):
    factors = [torch.randn(4, 10).requires_grad_(), torch.randn(6, 4).requires_grad_()]
    optimizer = RefLoRAAdamW([tuple(factors)], backend=fast_backend)
    for t in factors:
        t.grad = torch.randn_like(t)
    optimizer.step()
    factors[0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="memory of its own"):
        optimizer.step()


def test_the_table_takes_no_null():
    plan = Plan([LoRAPair("layer", torch.randn(4, 10), torch.randn(6, 4))])
    with pytest.raises(ValueError, match="layer, gradient: expected a tensor with memory"):
        plan.bind_grads([(torch.randn(4, 10), freed(6, 4))])


@pytest.mark.parametrize("shape", [(2, 10), (4, 9), (2, 20), (10, 4), (8, 10)])
def test_a_step_whose_gradient_has_another_shape(fast_backend, shape):
    """torch looks at the shape of `.grad` when it is set, not when `.grad.data` is."""
    factors = [torch.randn(4, 10).requires_grad_(), torch.randn(6, 4).requires_grad_()]
    optimizer = RefLoRAAdamW([tuple(factors)], backend=fast_backend)
    for t in factors:
        t.grad = torch.randn_like(t)
    optimizer.step()
    before = [t.detach().clone() for t in factors]
    factors[0].grad.data = torch.randn(shape)
    with pytest.raises(ValueError, match=r"gradient of A: expected \(4, 10\), got"):
        optimizer.step()
    assert all(torch.equal(t.detach(), old) for t, old in zip(factors, before))
