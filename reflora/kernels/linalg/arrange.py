"""Eigenvalues and eigenvectors in the order and with the signs that are returned."""

import triton
import triton.language as tl

from ..dtypes import power_of_two


@triton.jit
def arrange(
    p_u, p_values, p_out, p_left, p_left_out, n, SINGULAR: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    """Slot `p_out` becomes the columns of slot `p_u`, sorted by their values, and its vector the values.

    In each column the first element of the largest magnitude, once rounded to STORED, is positive. Values ascend; or
    for SINGULAR their magnitudes, which then are the values, descend, and `p_left_out` becomes the columns of `p_left`
    that go with them. Equal ones keep the order of the columns.
    """
    i = tl.arange(0, RC)[:, None]
    for first in range(0, RC, BM):
        c = first + tl.arange(0, BM)
        u = tl.load(p_u + i * RC + c[None, :])
        rounded = u.to(STORED)
        size = tl.abs(rounded)
        row = tl.min(tl.where(size == tl.max(size, 0)[None, :], i, RC), 0)
        negative = tl.sum(tl.where((i == row[None, :]) & (rounded < 0), 1, 0), 0) > 0
        rank = order(p_values, c, n, SINGULAR, RC, BM)
        values = tl.load(p_values + c)
        tl.store(p_out + i * RC + rank[None, :], tl.where(negative[None, :], -u, u))
        if SINGULAR:
            left = tl.load(p_left + i * RC + c[None, :])
            tl.store(p_left_out + i * RC + rank[None, :], tl.where((negative != (values < 0))[None, :], -left, left))
            values = tl.abs(values)
        tl.store(p_out + RC * RC + rank, values)
    tl.debug_barrier()


@triton.jit
def order(p_values, c, n, SINGULAR: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr):
    """Places of columns `c`; those past n stay where they are."""
    own = tl.load(p_values + c)[None, :]
    if SINGULAR:
        own = -tl.abs(own)
    rank = tl.zeros_like(c)
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        other = tl.load(p_values + i)
        if SINGULAR:
            other = -tl.abs(other)
        before = (i < n) & ((other < own) | ((other == own) & (i < c[None, :])))
        rank += tl.sum(tl.where(before, 1, 0), 0)
    return tl.where(c < n, rank, c)


@triton.jit
def store_values(p_values, index, n, p_vector, exponent, sound, RC: tl.constexpr):
    """Row `index` of `[batch, n]` becomes `2^exponent` times a vector, NaN where sound is 0."""
    j = tl.arange(0, RC)
    # in two steps: the power itself may be out of range
    half = exponent >> 1
    w = tl.load(p_vector + j).to(tl.float64) * power_of_two(half) * power_of_two(exponent - half)
    w = tl.where(sound == 1, w, float("nan"))
    tl.store(p_values + index.to(tl.int64) * n + j, w.to(p_values.dtype.element_ty), mask=j < n)
