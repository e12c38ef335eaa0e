"""Tensors whose address says nothing, or something else than their values, are refused: no call may crash."""

import pytest
import torch
from refusals import refused
from torch._subclasses.fake_tensor import FakeTensorMode

import reflora
from reflora import RefLoRAAdamW, linalg
from reflora.pairs import LoRAPair
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
    calls = [
        lambda: reflora.refactor_([(make(4, 10), B)], backend=fast_backend),
        lambda: reflora.refactor_([(A, make(6, 4))], backend=fast_backend),
        lambda: reflora.precondition_([(A, B)], [(make(4, 10), B.clone())], backend=fast_backend),
        lambda: reflora.precondition_([(A, B)], [(A.clone(), make(6, 4))], backend=fast_backend),
        lambda: RefLoRAAdamW(pairs=[(make(4, 10), B)], params=[B.clone().requires_grad_()], backend=fast_backend),
    ]
    for call in calls:
        with refused(message, A, B):
            call()


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_refused_inside_torch_func(fast_backend, transform):
    B = torch.randn(6, 4)

    def loss(A):
        reflora.refactor_([(A, B)], backend=fast_backend)
        return A.sum()

    A = torch.randn(4, 10) if transform == "grad" else torch.randn(3, 4, 10)
    with refused("inside torch.func"):
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


def stepped(backend, **options):
    """(factors with gradients, their optimizer after a step)."""
    factors = [torch.randn(4, 10).requires_grad_(), torch.randn(6, 4).requires_grad_()]
    optimizer = RefLoRAAdamW([tuple(factors)], backend=backend, **options)
    for t in factors:
        t.grad = torch.randn_like(t)
    optimizer.step()
    return factors, optimizer


def reshaped(*shape):
    """torch looks at the shape of `.grad` when it is set, not when `.grad.data` is."""
    return lambda t: setattr(t.grad, "data", torch.randn(shape)), r"gradient of B: expected \(6, 4\), got"


BAD_GRADIENTS = {
    # FSDP and offloading free storages; the C++ core would read address 0
    "freed": (lambda t: setattr(t, "grad", freed(*t.shape)), "whose storage was freed"),
    "sparse": (lambda t: setattr(t, "grad", t.grad.to_sparse()), r"strided, like its factor, got .* torch.sparse_coo"),
    # its memory holds the ascent
    "negated": (lambda t: setattr(t, "grad", torch._neg_view(t.grad)), r"their negatives .is_neg.*resolve_neg"),
    **{str(shape): reshaped(*shape) for shape in ((3, 4), (6, 3), (12, 4), (4, 6), (6, 8))},
    # as many elements, with the strides of the factor
    "like it in memory": (
        lambda t: setattr(t.grad, "data", torch.randn(12, 4).as_strided((12, 2), (4, 1))), r"\(6, 4\), got \(12, 2\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lone", [False, True], ids=["", "lone"])
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_step_whose_gradient_cannot_be_used(fast_backend, kind, lone):
    factors, optimizer = stepped(fast_backend)
    if lone:
        factors[0].grad = None
    spoil, message = BAD_GRADIENTS[kind]
    spoil(factors[1])
    with refused(message, *factors):
        optimizer.step()


def test_a_step_whose_factor_was_freed(fast_backend):
    factors, optimizer = stepped(fast_backend)
    factors[0].untyped_storage().resize_(0)
    with refused("memory of its own", factors[1]):
        optimizer.step()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "reflora_phase", "reflora_steps", "reflora_S"])
def test_a_step_whose_state_was_freed(fast_backend, name):
    (A, B), optimizer = stepped(fast_backend, interval=2)
    optimizer.state[A][name].untyped_storage().resize_(0)
    with refused(f"state '{name}': expected a tensor with memory, got one whose storage was freed", A, B):
        optimizer.step()


def in_fake_mode(call):
    with FakeTensorMode(allow_non_fake_inputs=True):
        call()


WITHOUT_MEMORY = {
    "FakeTensorMode": in_fake_mode,
    "functionalize": lambda call: torch.func.functionalize(lambda x: (call(), x)[1])(torch.ones(3)),
    "grad": lambda call: torch.func.grad(lambda x: (call(), x.sum())[1])(torch.ones(3)),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", WITHOUT_MEMORY)
def test_a_step_in_a_mode_that_makes_tensors_without_memory(fast_backend, mode, first):
    """The parameters are real; the table and the results would not be."""
    factors, optimizer = stepped(fast_backend)
    if first:
        optimizer = RefLoRAAdamW([tuple(factors)], backend=fast_backend)
    with refused("expected real ones, got those of FakeTensorMode", *factors, of=optimizer, error=RuntimeError):
        WITHOUT_MEMORY[mode](optimizer.step)


LINALG = {
    "eigh": (linalg.eigh, (None, "", "float64")), "eigvalsh": (linalg.eigvalsh, ("", "float64")),
    "svd": (linalg.svd, ("", "float64")), "polar": (linalg.polar, ("", "float64")),
    "geometric_mean": (lambda X, **options: linalg.geometric_mean(X, torch.eye(4), **options), None),
    "sqrtm": (linalg.sqrtm, (False, "", "float64")), "invsqrtm": (linalg.invsqrtm, None),
    "inv_root": (lambda X, **options: linalg.inv_root(X, 4, eps=1e-3, **options), (4.0, 1e-3, "", "float64")),
}  # fmt: skip


@pytest.mark.parametrize("name", LINALG)
def test_linalg_reads_and_writes_no_memory_that_is_not_there(fast_backend, name):
    function, arguments = LINALG[name]
    results = function(torch.eye(4), backend=fast_backend)
    whole = isinstance(results, torch.Tensor)
    for left in (0, 8):
        X = freed(4, 4, left=left)
        half = torch.randn(4, 4).half()
        half.untyped_storage().resize_(left)
        calls = [lambda X=X: function(X, backend=fast_backend), lambda X=half: function(X.requires_grad_())]
        if arguments:
            calls.append(lambda X=X: getattr(torch.ops.reflora, name)(X, *arguments))
        for place in range(1 if whole else len(results)):
            out = [torch.full_like(t, 7.0) for t in ((results,) if whole else results)]
            out[place].untyped_storage().resize_(left)
            calls.append(lambda out=out: function(torch.eye(4), out=out[0] if whole else out, backend=fast_backend))
        for call in calls:
            with refused(f"{name}.*: expected a tensor with memory of its own"):
                call()
    with refused("elements do not share memory"):
        out = [t.flatten()[0].expand(t.shape) for t in ((results,) if whole else results)]
        function(torch.eye(4), out=out[0] if whole else out, backend=fast_backend)


def test_second_matrices_of_linalg():
    X, ops = torch.eye(4), torch.ops.reflora
    functions = {"V0": lambda V: linalg.eigh(X, V0=V), "Y": lambda Y: linalg.geometric_mean(X, Y)}
    operators = {
        "V0": lambda V: ops.eigh(X, V, "", "float64"), "Y": lambda Y: ops.geometric_mean(X, Y, "", "float64"),
    }  # fmt: skip
    for name, call in (*functions.items(), *operators.items()):
        for left in (0, 8):
            with refused(f"{name}: expected a tensor with memory"):
                call(freed(4, 4, left=left))
    for name, call in functions.items():
        with refused(f"{name}: expected a dense tensor"):
            call(X.to_sparse())


def test_linalg_reads_what_is_expanded_or_negated(fast_backend):
    X = torch.eye(3) + 1
    wanted = linalg.sqrtm(X, backend=fast_backend)
    assert torch.equal(linalg.sqrtm(X.expand(5, 3, 3), backend=fast_backend)[4], wanted)
    lie = torch.complex(X, -X).conj().imag
    assert lie.is_neg() and torch.equal(linalg.sqrtm(lie, backend=fast_backend), wanted)


def inference(*shape):
    with torch.inference_mode():
        return torch.randn(*shape)


def test_inference_tensors_are_written_in_inference_mode_alone(backend):
    ends = {}
    kinds = {"outside": torch.randn, "inside": inference}
    for kind, make in kinds.items():
        torch.manual_seed(0)
        pairs = [(torch.randn(4, 10), torch.randn(6, 4)), (make(4, 10), make(6, 4))]
        grads = [(torch.randn(4, 10), torch.randn(6, 4)), (make(4, 10), make(6, 4))]
        out = make(3, 3)
        told = [t for both in (*pairs, *grads) for t in both]
        calls = [
            lambda: reflora.refactor_(pairs, backend=backend),  # noqa: B023
            lambda: reflora.precondition_(pairs, grads, backend=backend),  # noqa: B023
            lambda: linalg.sqrtm(2 * torch.eye(3), out=out, backend=backend),  # noqa: B023
        ]
        if kind == "inside":
            for call in calls:
                with refused("made in inference mode. Call under torch.inference_mode", *told, error=RuntimeError):
                    call()
        with torch.inference_mode(kind == "inside"):
            for call in calls:
                call()
        ends[kind] = [*told, out]
    assert all(map(torch.equal, *ends.values()))


def test_inference_factors_may_be_read_anywhere(fast_backend):
    pair, grads = (inference(4, 10), inference(6, 4)), (torch.randn(4, 10), torch.randn(6, 4))
    assert reflora.precondition_([pair], [grads], backend=fast_backend).refactored == 1


def test_parameters_of_lazy_modules():
    lazy, A, B = torch.nn.UninitializedParameter(), torch.randn(4, 10), torch.randn(6, 4)
    calls = [
        lambda: reflora.refactor_([(lazy, B)]), lambda: reflora.refactor_([(A, lazy)]),
        lambda: reflora.precondition_([(A, B)], [(lazy, B.clone())]), lambda: linalg.eigh(lazy),
        lambda: linalg.geometric_mean(torch.eye(3), lazy), lambda: linalg.sqrtm(torch.eye(3), out=lazy),
        lambda: torch.compile(lambda: reflora.refactor_([(lazy, B)]), backend="eager")(),
    ]  # fmt: skip
    for call in calls:
        with refused("expected a tensor with a shape, got UninitializedParameter"):
            call()


def test_the_table_takes_no_null():
    plan = Plan([LoRAPair("layer", torch.randn(4, 10), torch.randn(6, 4))])
    with refused("layer, gradient: expected a tensor with memory"):
        plan.bind_grads([(torch.randn(4, 10), freed(6, 4))])
