"""Which tensors share memory, by addresses, sizes and strides alone: nothing is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# numbers tried per question; what is not settled by then counts as shared
TRIES = 20_000
# (stride, largest index) of a dimension
Term = tuple[int, int]


def extent(t: Tensor) -> tuple[int, int]:
    """Addresses of a dense tensor's first byte and past its last; of a fake one, within its storage."""
    first = int(t.storage_offset()) * t.element_size() if isinstance(t, FakeTensor) else t.data_ptr()
    if t.is_contiguous():
        return first, first + t.nbytes
    elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0
    return first, first + elements * t.element_size()


def overlaps_itself(t: Tensor) -> bool:
    """Whether two of its elements have the same address."""
    if t.is_contiguous():
        return False
    dims = sorted((s, n - 1) for s, n in zip(t.stride(), t.shape) if n > 1)
    reach = 0
    for stride, last in dims:
        if stride <= reach:
            return _meets_itself(dims)
        reach += stride * last
    return False


def shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Numbers of two tensors that share memory; None where each has its own. None of them overlaps itself.

    Fake tensors, those of a graph being traced, share a storage where the real ones do.
    """
    places: dict[torch.device | int, list[int]] = {}
    for number, t in enumerate(tensors):
        place = t.untyped_storage()._cdata if isinstance(t, FakeTensor) else t.device
        places.setdefault(place, []).append(number)
    for numbers in places.values():
        if len(numbers) == 1:  # the size of a fake one may be unknown
            continue
        for cluster in _clusters(sorted((*extent(tensors[number]), number) for number in numbers)):
            for family in _families(tensors, cluster):
                for i, j in _candidates(tensors, family):
                    if _meet(tensors[i], tensors[j]):
                        return min(i, j), max(i, j)
    return None


def _clusters(spans: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Groups of two or more among sorted (begin, end, number) whose extents overlap."""
    first, top = 0, 0
    for place, (begin, end, _) in enumerate(spans):
        if begin >= top:
            if place - first > 1:
                yield spans[first:place]
            first = place
        top = max(top, end)
    if len(spans) - first > 1:
        yield spans[first:]


def _families(tensors: Sequence[Tensor], cluster: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """The cluster in parts that cannot meet: a tensor's elements agree modulo what divides every stride."""
    own = [tensors[number] for _, _, number in cluster]
    common = gcd(*(s * t.element_size() for t in own for s, n in zip(t.stride(), t.shape) if n > 1))
    inside = [(begin % common, begin % common + t.element_size()) for t, (begin, _, _) in zip(own, cluster) if common]
    if not inside or max(end for _, end in inside) > common:
        yield cluster
        return
    numbered = sorted((begin, end, place) for place, (begin, end) in enumerate(inside))
    for family in _clusters(numbered):
        yield from _clusters([cluster[place] for place in sorted(place for _, _, place in family)])


def _candidates(tensors: Sequence[Tensor], cluster: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Pairs of numbers that may share memory.

    Slices of one buffer share its outermost stride: modulo that, column slices have addresses of their own.
    """
    strides = {_outermost(tensors[number]) for _, _, number in cluster}
    period = strides.pop() if len(strides) == 1 else 0
    if period:
        inside = []
        for begin, end, number in cluster:
            start, width = begin % period, (end - begin - 1) % period + 1
            inside.append((start, min(start + width, period), number))
            if start + width > period:
                inside.append((0, start + width - period, number))
        cluster = sorted(inside)
    still: list[tuple[int, int]] = []
    for begin, end, number in cluster:
        still = [(top, other) for top, other in still if top > begin]
        yield from ((other, number) for _, other in still if other != number)
        still.append((end, number))


def _outermost(t: Tensor) -> int:
    """The largest stride in bytes, if the extent of the other dimensions fits within it; else 0."""
    stride, last = max(((s, n - 1) for s, n in zip(t.stride(), t.shape) if n > 1), default=(0, 0))
    begin, end = extent(t)
    period = stride * t.element_size()
    return period if end - begin - last * period <= period else 0


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one overlaps one of the other: `a + sum i s = b + sum j t` has a solution."""
    (begin_a, end_a), (begin_b, end_b) = extent(a), extent(b)
    if end_a <= begin_b or end_b <= begin_a:
        return False
    size_a, size_b = a.element_size(), b.element_size()
    terms = [(s * size_a, n - 1) for s, n in zip(a.stride(), a.shape)]
    terms += [(s * size_b, n - 1) for s, n in zip(b.stride(), b.shape)]
    # j counted from the end, so that all terms are added
    total = end_b - size_b - begin_a
    if size_a != size_b or total % size_a:
        terms.append((1, size_a + size_b - 2))  # the bytes of an element
        total += size_b - 1
    return _reaches(total, _merged(terms))


def _meets_itself(dims: list[Term]) -> bool:
    """Whether `sum x s = 0` for |x| up to the last indices, not all 0: the first nonzero one may be taken positive."""
    dims = dims[::-1]
    for place, (stride, last) in enumerate(dims):
        rest = dims[place + 1 :]
        terms = [(stride, last - 1), *((s, 2 * n) for s, n in rest)]
        if stride == 0 or _reaches(sum(s * n for s, n in rest) - stride, _merged(terms)):
            return True
    return False


def _merged(terms: list[Term]) -> list[Term]:
    """The largest stride first."""
    counts: dict[int, int] = {}
    for stride, last in terms:
        counts[stride] = counts.get(stride, 0) + last
    return sorted(((s, n) for s, n in counts.items() if s and n), reverse=True)


def _reaches(total: int, terms: list[Term]) -> bool:
    """Whether `total = sum i s` for some 0 <= i <= last of each term, or is not refuted within TRIES."""
    tops = [sum(s * n for s, n in terms[place:]) for place in range(len(terms) + 1)]
    common = [gcd(*(s for s, _ in terms[place:])) for place in range(len(terms))]
    left = TRIES
    todo = [(total, 0)]
    while todo:
        rest, place = todo.pop()
        if rest == 0:
            return True
        if place == len(terms) or rest < 0 or rest > tops[place] or rest % common[place]:
            continue
        stride, last = terms[place]
        low, high = max(0, -((tops[place + 1] - rest) // stride)), min(last, rest // stride)
        left -= 1 + max(0, high - low)
        if left < 0:
            return True
        todo += [(rest - i * stride, place + 1) for i in range(low, high + 1)]
    return False
