"""What shares memory is refused, however it does; what does not is served, however it is interleaved."""

import itertools
import random
import time

import pytest
import torch
from refusals import refused

import reflora
from reflora import overlap


def addresses(t):
    """Of every byte, and how many there would be if each element had its own."""
    found, count = set(), 0
    for index in itertools.product(*map(range, t.shape)):
        first = t.data_ptr() + sum(i * s for i, s in zip(index, t.stride())) * t.element_size()
        found.update(range(first, first + t.element_size()))
        count += t.element_size()
    return found, count


def test_random_views_against_the_sets_of_their_addresses():
    draw = random.Random(0)
    buffer = torch.zeros(400)
    seen = set()
    for _ in range(4000):
        views = []
        for _ in range(2):
            dims = draw.choice([1, 2, 2, 2, 3])
            shape = [draw.randint(1, 4) for _ in range(dims)]
            strides = draw.choices([1, 1, 2, 3, 5, 7, 8, 16, 24], k=dims)
            own = buffer if draw.random() < 0.8 else buffer.view(torch.float16)
            views.append(own.as_strided(shape, strides, draw.randint(0, 60)))
        (first, count), (second, other) = map(addresses, views)
        itself = len(first) != count
        assert overlap.overlaps_itself(views[0]) == itself, (views[0].shape, views[0].stride())
        if not itself and len(second) == other:
            assert (overlap.shared(views) is not None) == bool(first & second), [(v.shape, v.stride()) for v in views]
            seen.add(bool(first & second))
    assert seen == {False, True}


def test_what_cannot_be_told_counts_as_shared(monkeypatch):
    a, b = (torch.zeros(60, 60).as_strided((5, 6), strides) for strides in ((7, 1), (8, 1)))
    a, b = a[:, ::2], torch.as_strided(a, (5, 3), (10, 2), 1)
    assert overlap.shared([a, b]) == ((0, 1) if addresses(a)[0] & addresses(b)[0] else None)
    monkeypatch.setattr(overlap, "TRIES", 0)
    assert overlap.shared([a, b]) == (0, 1)


def slices():
    """Name -> pairs and gradients out of few buffers, all disjoint."""
    by_columns, by_rows, of_B = torch.randn(4, 36), torch.randn(8, 9), torch.randn(20, 16)
    yield "columns", [(by_columns[:, i * 9 : i * 9 + 9], of_B[:, i * 4 : i * 4 + 4]) for i in range(4)], None
    yield "rows in turns", [(by_rows[i::2], torch.randn(7, 4)) for i in range(2)], None
    yield "columns in turns", [(torch.randn(4, 9), torch.randn(7, 8)[:, ::2])], None
    a, b = torch.randn(4, 18), torch.randn(7, 8)
    yield "factor and gradient", [(a[:, :9], b[:, ::2])], [(a[:, 9:], b[:, 1::2])]
    square = torch.randn(10, 10)
    yield "one transposed", [(square[:4, 5:], square[4:, :4])], [(torch.randn(4, 5), torch.randn(6, 4))]


@pytest.mark.parametrize("case", range(5))
def test_disjoint_slices_are_served(backend, case):
    name, pairs, grads = list(slices())[case]
    grads = grads or [tuple(torch.randn_like(t) for t in pair) for pair in pairs]
    plain = [tuple(t.clone().contiguous() for t in pair) for pair in pairs]
    plain_grads = [tuple(t.clone().contiguous() for t in sides) for sides in grads]
    reflora.precondition_(pairs, grads, backend=backend)
    reflora.precondition_(plain, plain_grads, backend=backend)
    reflora.refactor_(pairs, backend=backend)
    reflora.refactor_(plain, backend=backend)
    for found, wanted in zip((*pairs, *grads), (*plain, *plain_grads)):
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


A, B = torch.randn(4, 9), torch.randn(7, 4)
GA, GB = torch.randn(4, 9), torch.randn(7, 4)
BUFFER = torch.randn(100)
SHARED = {
    "one gradient twice": ([(A, B), (A + 1, B + 1)], [(GA, GB), (GA, GB + 1)], "shared with pair 0, gradient of A"),
    "its own factor": ([(A, B)], [(A, GB)], "gradient of A: .* shared with pair 0, A"),
    "another pair's factor": ([(A, B), (A + 1, B + 1)], [(GA, GB), (GA + 1, B)], "gradient of B: .* pair 0, B"),
    "a part of a factor": ([(A, B)], [(GA, A.as_strided((7, 4), (4, 1), 8))], "gradient of B: .* pair 0, A"),
    "columns that meet": ([(BUFFER[:36].view(4, 9), B)], [(BUFFER.as_strided((4, 9), (9, 1), 35), GB)], "pair 0, A"),
    "a gradient over itself": ([(A, B)], [(BUFFER.as_strided((4, 9), (3, 1)), GB)], r"strides \(3, 1\)"),
    "a gradient in diagonals": ([(A, B)], [(GA, BUFFER.as_strided((7, 4), (2, 3)))], r"strides \(2, 3\)"),
    "an expanded gradient": ([(A, B)], [(GA[:1].expand(4, 9), GB)], "Call .clone"),
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_gradients_are_refused_before_anything_is_written(fast_backend, case):
    pairs, grads, message = SHARED[case]
    with refused(message, A, B, GA, GB, BUFFER):
        reflora.precondition_(pairs, grads, backend=fast_backend)


def test_factors_over_themselves_are_refused(fast_backend):
    for strides in ((3, 1), (1, 2), (0, 1)):
        for pair in ((BUFFER.as_strided((4, 9), strides), B), (A, BUFFER.as_strided((7, 4), strides))):
            with refused("elements do not share memory", BUFFER):
                reflora.refactor_([pair], backend=fast_backend)


def test_a_lone_gradient_may_lie_anywhere(fast_backend):
    """Nothing of its pair is read or written."""
    assert reflora.precondition_([(A, B)], [(A, None)], backend=fast_backend).inactive == 1


@pytest.mark.parametrize("of", ["their own", "columns of one buffer", "rows in turns", "columns in turns"])
def test_thousands_are_checked_in_no_time(of):
    if of == "their own":
        tensors = [torch.empty(8, 16) for _ in range(2000)]
    elif of == "rows in turns":
        buffer = torch.empty(8 * 2000, 16)
        tensors = [buffer[i::2000] for i in range(2000)]
    elif of == "columns in turns":
        buffer = torch.empty(8, 16 * 2000)
        tensors = [buffer[:, i::2000] for i in range(2000)]
    else:
        tensors = list(torch.empty(8, 16 * 2000).split(16, 1))
    took = []
    for _ in range(3):
        began = time.process_time()
        assert overlap.shared(tensors) is None
        took.append(time.process_time() - began)
    assert min(took) < 0.1  # 2 to 13 ms, where every one with every other would take seconds
    tensors.append(tensors[1000][1:, 2:])
    assert overlap.shared(tensors) == (1000, 2000)
