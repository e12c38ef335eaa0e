"""refactor_ and precondition_ under torch.compile, and their operators called by hand: the same results and errors."""

import pytest
import torch
from conftest import needs_compiler
from refusals import OF_ARGUMENTS, refused, unchanged

import reflora
from reflora.columns import PLAIN
from reflora.pairs import LoRAPair


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(r=4):
    return torch.randn(r, 10), torch.randn(6, r)


def like(factors):
    return tuple(torch.randn_like(t) for t in factors)


def refactor(pairs, **options):
    return lambda: reflora.refactor_(pairs, **options)


def precondition(pairs, grads=None, **options):
    return lambda: reflora.precondition_(pairs, grads, **options)


A, B = pair()
ONE = [(A, B)]
WRONG = {
    "too few gradients": precondition([*ONE, pair()], [like(ONE[0])]),
    "too many": precondition(ONE, [like(ONE[0])] * 2),
    "none": precondition(ONE, []),
    "gradients of nothing": precondition([], [like(ONE[0])]),
    "one of two": precondition(ONE, [like(ONE[0])[:1]]),
    "three of two": precondition(ONE, [(*like(ONE[0]), A)]),
    "None for both": precondition(ONE, [None]),
    "a dict": precondition(ONE, {"A": A}),
    "a tensor": precondition(ONE, torch.randn(1, 2)),
    "no tensors": precondition(ONE, [(1, 2)]),
    "another shape": precondition(ONE, [(A[:, :9].clone(), B.clone())]),
    "another dtype": precondition(ONE, [(A.double(), B.clone())]),
    "expanded": precondition(ONE, [(A[:1].expand(4, 10), B.clone())]),
    "a lone one of another shape": precondition(ONE, [(A[:, :9].clone(), None)]),
    "shared with a factor": precondition(ONE, [(A, B.clone())]),
    "shared with another gradient": precondition([*ONE, pair()], [both := like(ONE[0]), both]),
    "a layout that is none": refactor([LoRAPair("x", A, B, layout=None)]),
    # an operator has no other names
    "an unknown layout": refactor([LoRAPair("pair 0", A, B, "square")]),
    "a bare pair": refactor(A),
    "three factors": refactor([(A, B, A)]),
    "numbers": refactor([(1, 2)]),
    "factors that do not match": refactor([(A, B[:, :3])]),
    "integers": refactor([(A.int(), B.int())]),
    "the same factor twice": refactor([(A, B), (A, B.clone())]),
    "no flag": refactor(ONE, scalar="no"),
    "a number for a flag": precondition(ONE, [like(ONE[0])], scalar=1),
    "no precision": refactor(ONE, precision=None),
    "another precision": refactor(ONE, precision="half"),
    "a number for a backend": refactor(ONE, backend=3),
    "another backend": precondition(ONE, [like(ONE[0])], backend="cuda"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_of_the_eager_function(case):
    told = []
    for call in (WRONG[case], torch.compile(WRONG[case], backend="eager")):
        with refused("", A, B, error=OF_ARGUMENTS) as caught:
            call()
        told.append((type(caught.value), str(caught.value)))
    assert told[0] == told[1] and torch.is_grad_enabled()


@pytest.mark.parametrize("case", ["too few gradients", "too many", "a dict", "no flag"])
def test_errors_of_a_whole_graph(case):
    with pytest.raises(torch._dynamo.exc.Unsupported):  # whose text ends in the error itself
        torch.compile(WRONG[case], backend="eager", fullgraph=True)()


def test_factors_that_require_gradients():
    """The function under grad mode, as eagerly; autograd hears of the writes."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        factors = tuple(t.requires_grad_() for t in pair())
        grads = like(factors)
        loss = (factors[1] @ factors[0]).square().sum()
        for call in (precondition([factors], [grads]), refactor([factors])):
            (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert all(t.is_leaf and t.requires_grad for t in factors)
        ends.append([t.detach() for t in (*factors, *grads)])
    assert all(map(torch.equal, *ends))


def test_nothing():
    for call in (refactor([]), precondition([], []), precondition([])):
        for run in (call, torch.compile(call, backend="eager", fullgraph=True)):
            found = run()
            assert found.names == [] and found.refactored == 0 and len(found.scale) == 0


def test_one_gradient_of_two():
    lone = [(torch.randn(4, 10), None), like(ONE[0])]
    with unchanged(lone[0][0]):
        found = torch.compile(precondition([pair(), pair()], lone), backend="eager", fullgraph=True)()
    assert found.status.tolist() == [PLAIN, 0]


def refactor_two(a, b, c, d):
    return reflora.refactor_([(a, b), (c, d)]).status


def made_inside(t, b, d):
    x = 2 * t
    return refactor_two(x[:40].view(4, 10), b, x[39:79].view(4, 10), d)


def precondition_two(a, b, c, d, *grads):
    return reflora.precondition_([(a, b), (c, d)], [grads[:2], grads[2:]]).status


BUFFER, SQUARE, GRADS = torch.randn(100), torch.randn(4, 4), like(ONE[0])
# name: (function, its tensors)
SHARED = {
    "A of two pairs": (lambda a, b, c: refactor_two(a, b, a, c), (A, B, B + 1)),
    "views that meet": (refactor_two, (BUFFER[:40].view(4, 10), B, BUFFER[39:79].view(4, 10), B + 1)),
    "a square twice": (lambda a, b: reflora.refactor_([(a, b)]).status, (SQUARE, SQUARE)),
    "made in the graph": (made_inside, (BUFFER, B, B + 1)),
    "its own factor": (precondition_two, (A, B, *pair(), A, GRADS[1], *like(ONE[0]))),
    "gradients of two pairs": (precondition_two, (A, B, *pair(), *GRADS, *GRADS)),
}


@pytest.mark.parametrize(
    "case, backend",
    [*((case, backend) for case in SHARED for backend in ("eager", "aot_eager")),
     pytest.param("made in the graph", "inductor", marks=needs_compiler)],
)  # fmt: skip
def test_shared_memory_is_seen_past_the_copies_of_a_graph(case, backend):
    """Functionalisation hands an operator copies of what it writes, which share nothing any more."""
    function, given = SHARED[case]
    for call in (function, torch.compile(function, backend=backend)):
        with refused("^pair .*: expected memory of its own, got memory shared with pair 0", *given):
            call(*given)
    torch._dynamo.reset()
    error = pytest.raises(torch._dynamo.exc.Unsupported, match="memory shared with pair 0|memory shared with gradient")
    with unchanged(*given), error:
        torch.compile(function, backend=backend, fullgraph=True)(*given)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_views_that_meet_in_a_graph_made_for_others(backend):
    call = torch.compile(refactor_two, backend=backend, fullgraph=True)
    call(*pair(), *pair())
    with refused("pair 1, A: expected memory of its own, got memory shared with pair 0, A", BUFFER):
        call(BUFFER[:40].view(4, 10), B.clone(), BUFFER[39:79].view(4, 10), B.clone())


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_slices_of_one_buffer_are_one_graph(backend):
    """Column slices side by side and in turns."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        of_A, of_B = torch.randn(4, 20), torch.randn(6, 8)
        call = lambda x, y: reflora.refactor_([(x[:, :10], y[:, ::2]), (x[:, 10:], y[:, 1::2])]).status  # noqa: E731
        (torch.compile(call, backend=backend, fullgraph=True) if compiled else call)(of_A, of_B)
        ends.append((of_A, of_B))
    assert all(map(torch.equal, *ends))


def test_operators_by_hand_break_a_graph_as_well():
    call = torch.compile(lambda a, b: torch.ops.reflora.refactor_([a, b, a, b], "linear;linear", False, "", "float64"))
    with refused("memory shared with pair 0"):
        call(A, B)


OPERATOR_CALLS = {
    "one factor": ("refactor_", ([A], "linear", False, "", "float64"), "factors: expected two for each"),
    "no layouts": ("refactor_", ([A, B], "", False, "", "float64"), "factors: expected two for each"),
    "layouts over": ("refactor_", ([A, B], "linear;linear", False, "", "float64"), "factors: expected two for each"),
    "no layout": ("refactor_", ([A, B], "square", False, "", "float64"), "layout"),
    "no backend": ("refactor_", ([A, B], "linear", False, "gpu", "float64"), "backend"),
    "one gradient": ("precondition_", ([A, B], [A.clone()], [0], "linear", False, "", "float64"), "gA and gB"),
    "too few": ("precondition_", ([A, B], [], [0], "linear", False, "", "float64"), "gA and gB"),
    "no such pair": ("precondition_", ([A, B], [*like(ONE[0])], [1], "linear", False, "", "float64"), "numbered below"),
    "from the end": ("precondition_", ([A, B], [*like(ONE[0])], [-1], "linear", False, "", "float64"), "numbered"),
    "twice": ("precondition_", ([A, B], [*like(ONE[0])] * 2, [0, 0], "linear", False, "", "float64"), "once"),
}


@pytest.mark.parametrize("case", OPERATOR_CALLS)
def test_operators_check_what_they_get(case):
    name, arguments, message = OPERATOR_CALLS[case]
    with refused(message):
        getattr(torch.ops.reflora, name)(*arguments)


def test_operators_of_nothing():
    assert torch.ops.reflora.refactor_([], "", False, "", "float64").shape == (0, 7)
    assert torch.ops.reflora.precondition_([], [], [], "", False, "", "float64").shape == (0, 7)
