"""AdamW of a chunk of one side for RefLoRA-S, and the squares of its columns before and after: the norms of a row.

A sum of squares is `sum * 2^(2 exponent)`: in float64 storage the exponent follows the largest element met so far.
"""

import triton
import triton.language as tl

from . import table as col
from .chunks import never_finite, span, store_bad
from .dtypes import bounded, exponent_of, load, power_of_two
from .pair import block_zeros, column, offsets
from .settle import step_scalars
from .update import (
    advance,
    fetch,
    homes,
    hypers_of,
    keep_moments,
    keep_weights,
    moments,
    side_key,
    side_scalars,
    weights,
)

# what a chunk leaves in its row's workspace: sum and exponent, of the columns as they are and as they will be
BEFORE, AFTER, PART = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def no_squares(SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr):
    """(sums, exponent) to begin with."""
    return block_zeros(SIDE, RC, BN, tl.float64), tl.full((), -1000 if WIDE == tl.float64 else 0, tl.int64)


@triton.jit
def add_squares(acc, exponent, x, WIDE: tl.constexpr):
    x = x.to(tl.float64)
    if WIDE == tl.float64:
        top = tl.max(tl.max(tl.abs(x), 1), 0)
        own = exponent_of(tl.where((top > 0) & (top < float("inf")), top, power_of_two(exponent)))
        larger = tl.minimum(tl.maximum(own, exponent), 1000)
        acc *= power_of_two(tl.maximum(2 * (exponent - larger), -1000))
        exponent = larger
        x *= power_of_two(-exponent)
    return acc + x * x, exponent


@triton.jit
def store_squares(parts, chunk, acc, exponent, WHEN: tl.constexpr):
    p = parts + chunk * PART + WHEN
    tl.store(p, tl.sum(tl.sum(acc, 1), 0))
    tl.store(p + 1, exponent.to(tl.float64))


@triton.jit
def total_norm(parts, first, last, WHEN: tl.constexpr):
    """`||.||_F` of a side, from its chunks in a fixed order, as `norm * 2^exponent`."""
    top = tl.full((), -1000.0, tl.float64)
    for chunk in range(first, last):
        top = tl.maximum(top, tl.load(parts + chunk * PART + WHEN + 1))
    acc = tl.full((), 0.0, tl.float64)
    for chunk in range(first, last):
        p = parts + chunk * PART + WHEN
        acc += tl.load(p) * power_of_two(tl.maximum(2 * (tl.load(p + 1) - top).to(tl.int64), -1000))
    return tl.sqrt(acc), top.to(tl.int64)


@triton.jit
def look(
    p_row, parts, header, chunk, own_chunk, width, r, code, SIDE: tl.constexpr, CHECK: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The squares of a chunk as it is, and for CHECK whether its gradient is finite."""
    begin, end = span(p_row, own_chunk, width, SIDE)
    p, sr, sn = column(p_row, SIDE + col.P), column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    bad = block_zeros(SIDE, RC, BN, tl.int32)
    acc, exponent = no_squares(SIDE, RC, BN, WIDE)
    for start in range(begin, end, BN):
        o, mask = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        acc, exponent = add_squares(acc, exponent, load(p, o, mask, code, DTYPE, WIDE, VECTOR), WIDE)
        if CHECK:
            o, mask = offsets(start, g_sr, g_sn, r, end, SIDE, RC, BN, VECTOR)
            bad = tl.maximum(bad, never_finite(load(p_g, o, mask, code, DTYPE, WIDE, VECTOR)))
    store_squares(parts, chunk, acc, exponent, BEFORE)
    store_bad(header, chunk, bad)


@triton.jit
def step_side(
    p_row, parts, header, hypers, unscale, root, move, turn, seed, chunk, own_chunk, width, r, code,
    SIDE: tl.constexpr, CHECK: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, KEEP: tl.constexpr,
    RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """AdamW of a chunk of a side, by the scalars that `settle` has left and kept, or else only foreseen.

    own_chunk: its number within the side. unscale, root, move: float64 scalars for gradient, factor and moments before
    the update; turn: for the factor after it (None: 1), which its moments follow. What is not kept leaves its squares
    and, for CHECK, the search of its gradient.
    """
    g_factor, limit, beta1, beta2, eps, amsgrad = hypers_of(p_row, hypers, unscale, SIDE, WIDE)
    state = column(p_row, col.STATE).to(tl.int32)
    begin, end = span(p_row, own_chunk, width, SIDE)
    if KEEP:
        step_size, correction, decay, count = side_scalars(header, SIDE)
    else:
        step_size, correction, decay, count = step_scalars(p_row, hypers, SIDE)
    step_size, correction, decay = step_size.to(WIDE), correction.to(WIDE), decay.to(WIDE)
    m_factor = move.to(WIDE)
    RANDOM: tl.constexpr = seed is not None
    key = side_key(p_row, seed, count, SIDE)
    sr, sn = column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    at = homes(p_row, SIDE, AMSGRAD, MASTER)
    bad = block_zeros(SIDE, RC, BN, tl.int32)
    old, old_exponent = no_squares(SIDE, RC, BN, WIDE)
    new, new_exponent = no_squares(SIDE, RC, BN, WIDE)
    for start in range(begin, end, BN):
        o, mask = offsets(start, g_sr, g_sn, r, end, SIDE, RC, BN, VECTOR)
        g = load(p_g, o, mask, code, DTYPE, WIDE, VECTOR)
        o, mask = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        chosen = mask & amsgrad
        p, m, v, x, w = fetch(at, o, mask, amsgrad, code, state, AMSGRAD, MASTER, DTYPE, STATE, WIDE, VECTOR)
        if CHECK:
            bad = tl.maximum(bad, never_finite(g))
        m, v, x, second = moments(
            m, v, x, bounded(g * g_factor, limit), m_factor, beta1, beta2, chosen, AMSGRAD, WIDE
        )  # fmt: skip
        if not KEEP:
            old, old_exponent = add_squares(old, old_exponent, p, WIDE)
        p = weights(at, p, w, code, MASTER, DTYPE)
        p = advance((p.to(tl.float64) * root).to(WIDE), m, second, step_size, correction, decay, eps)
        keep_moments(at, o, mask, chosen, m, v, x, turn, state, AMSGRAD, KEEP, STATE, VECTOR)
        p = keep_weights(
            at, o, mask, p, turn, key, start + tl.arange(0, BN), r, code, SIDE, MASTER, RANDOM, KEEP, RC, DTYPE,
            WIDE, VECTOR,
        )  # fmt: skip
        if not KEEP:
            new, new_exponent = add_squares(new, new_exponent, p, WIDE)
    if not KEEP:
        store_squares(parts, chunk, old, old_exponent, BEFORE)
        store_squares(parts, chunk, new, new_exponent, AFTER)
        store_bad(header, chunk, bad)
