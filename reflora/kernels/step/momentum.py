"""The mean gradient of a chunk: its Gram, and the update of one side by it, multiplied by an r x r matrix."""

import triton
import triton.language as tl

from .. import table as col
from ..dtypes import FLOAT32, bounded, exponent_of, load, power_of_two
from .chunks import (
    COUNT_A,
    COUNT_B,
    DECAY_A,
    DECAY_B,
    EXPONENT,
    STEP_SIZE_A,
    STEP_SIZE_B,
    block_gram,
    chunk_gram,
    never_finite,
    store_packed,
)
from .mean import mixer
from .pair import GRADIENTS, block_zeros, column, load_columns, offsets
from .update import hypers_of, keep_weights, product, put, side_key, weights


@triton.jit
def largest_gradient(WIDE: tl.constexpr):
    """Differences of gradients stay finite, and so do sums of their squares in float64."""
    return tl.full((), 1e38 if WIDE == tl.float32 else 1e145, WIDE)


@triton.jit
def average(g, m, g_factor, share, WIDE: tl.constexpr):
    """The mean gradient after the step; it stays where g is not finite."""
    limit = largest_gradient(WIDE)
    m = bounded(m, limit)
    return tl.fma(tl.where(tl.abs(g) < float("inf"), share, 0.0), bounded(g * g_factor, limit) - m, m)


@triton.jit
def mean_columns(
    p_row, g_factor, share, start, end, r, code, state, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A block of the mean gradient after the step, and where a gradient is not finite."""
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    g = load_columns(p_g, g_sr, g_sn, start, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
    sr, sn = column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    m = load_columns(column(p_row, SIDE + col.M), sr, sn, start, end, r, state, SIDE, RC, BN, STATE, WIDE, VECTOR)
    return average(g, m, g_factor, share, WIDE), never_finite(g)


@triton.jit
def accumulate_mean(
    p_row, area, header, hypers, unscale, chunk, begin, end, r, code, SIDE: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The Gram of a chunk of the mean gradient, and its exponent; NaN where a gradient is not finite."""
    state = column(p_row, col.STATE).to(tl.int32)
    g_factor, _, beta1, _, _, _ = hypers_of(p_row, hypers, unscale, SIDE, WIDE)
    share = (1.0 - beta1).to(WIDE)
    scale = tl.full((), 1.0, WIDE)
    exponent = tl.full((), 0, tl.int64)
    if SCALED:
        acc = block_zeros(SIDE, RC, BN, WIDE)
        for start in range(begin, end, BN):
            x, _ = mean_columns(
                p_row, g_factor, share, start, end, r, code, state, SIDE, RC, BN, DTYPE, STATE, WIDE, VECTOR
            )
            acc = tl.maximum(acc, tl.abs(x))
        top = tl.max(tl.max(acc, 1), 0).to(tl.float64)
        bound = 1000 if WIDE == tl.float64 else 126
        exponent = tl.minimum(tl.maximum(exponent_of(top), -bound), bound)
        exponent = tl.where(top > 0, exponent, -bound)
        scale = power_of_two(-exponent).to(WIDE)
    gram = tl.zeros([RC, RC], TC)
    one = tl.where(end > begin, 1.0, 0.0).to(TC)
    bad = block_zeros(SIDE, RC, BN, tl.int32)
    for start in range(begin, end, BN):
        x, never = mean_columns(
            p_row, g_factor, share, start, end, r, code, state, SIDE, RC, BN, DTYPE, STATE, WIDE, VECTOR
        )
        bad = tl.maximum(bad, never)
        if SCALED:
            x = x * scale
        gram += block_gram(x.to(TC), SIDE, TC) * one
    gram = tl.where(tl.max(tl.max(bad, 1), 0) == 0, gram, float("nan"))
    store_packed(chunk_gram(area, chunk, RC, WIDE), gram, RC, TC)
    tl.store(header + EXPONENT + chunk, exponent.to(tl.float64))


@triton.jit
def fetch_block(
    p_row, at, o, mask, start, end, r, code, state, SIDE: tl.constexpr, MASTER: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient, mean gradient, factor and master weights of a block, before anything is stored."""
    p_p, p_m, p_w = at
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    g = load_columns(p_g, g_sr, g_sn, start, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
    m = load(p_m, o, mask, state, STATE, WIDE, VECTOR)
    p = load(p_p, o, mask, code, DTYPE, WIDE, VECTOR)
    w = p
    if MASTER:
        w = load(p_w, o, mask & (p_w != 0), FLOAT32, FLOAT32, WIDE, VECTOR)
    return g, m, p, w


@triton.jit
def move(
    p_row, area, header, hypers, unscale, seed, chunk, begin, end, r, code, SIDE: tl.constexpr, MASTER: tl.constexpr,
    CARRY: tl.constexpr, MOMENTUM: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, TENSOR: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Columns begin to end of a side: the mean gradient, and the factor by K times it.

    CARRY: the Grams of the updated factor and of the gradient, or of its mean, are left as chunk number `chunk`. What
    bounds that is shared memory, from which tensor cores (TENSOR: they take TC) read an operand less often.
    """
    ON_A: tl.constexpr = SIDE == col.A_SIDE
    state = column(p_row, col.STATE).to(tl.int32)
    g_factor, _, beta1, _, _, _ = hypers_of(p_row, hypers, unscale, SIDE, WIDE)
    share = (1.0 - beta1).to(WIDE)
    step_size = tl.load(header + (STEP_SIZE_A if ON_A else STEP_SIZE_B)).to(WIDE)
    decay = tl.load(header + (DECAY_A if ON_A else DECAY_B)).to(WIDE)
    RANDOM: tl.constexpr = seed is not None
    key = side_key(p_row, seed, tl.load(header + (COUNT_A if ON_A else COUNT_B)), SIDE)
    sr, sn = column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    p_w = tl.full((), 0, tl.int64)
    if MASTER:
        p_w = column(p_row, SIDE + col.W)
    at = column(p_row, SIDE + col.P), column(p_row, SIDE + col.M), p_w
    i = tl.arange(0, RC)
    matrix = tl.load(mixer(area, ON_A, RC, WIDE) + i[:, None] * RC + i[None, :])
    if ON_A:
        # K is symmetric; laid out like this its rows are read from shared memory without conflicts
        matrix = tl.trans(matrix)
    MIX: tl.constexpr = TC if CARRY and TENSOR else WIDE
    limit = largest_gradient(WIDE)
    one = tl.where(end > begin, 1.0, 0.0).to(TC)
    of_factor, of_gradient = tl.zeros([RC, RC], TC), tl.zeros([RC, RC], TC)
    bad = block_zeros(SIDE, RC, BN, tl.int32)
    for start in range(begin, end, BN):
        o, mask = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        g, m, p, w = fetch_block(
            p_row, at, o, mask, start, end, r, code, state, SIDE, MASTER, RC, BN, DTYPE, STATE, WIDE, VECTOR
        )
        m = average(g, m, g_factor, share, WIDE)
        if CARRY:
            if MOMENTUM:
                bad = tl.maximum(bad, never_finite(g))
                g = m
            of_gradient += block_gram(g.to(TC), SIDE, TC) * one
        change = bounded(product(matrix.to(MIX), m.to(MIX), SIDE, MIX).to(WIDE), limit)
        p = tl.fma(-step_size, change, weights(at, p, w, code, MASTER, DTYPE) * decay)
        put(at[1], o, m, None, mask, state, STATE, True, VECTOR)
        p = keep_weights(
            at, o, mask, p, None, key, start + tl.arange(0, BN), r, code, SIDE, MASTER, RANDOM, True, RC, DTYPE,
            WIDE, VECTOR,
        )  # fmt: skip
        if CARRY:
            of_factor += block_gram(p.to(TC), SIDE, TC) * one
    if CARRY:
        store_packed(chunk_gram(area, chunk, RC, WIDE), of_factor, RC, TC)
        of_gradient = tl.where(tl.max(tl.max(bad, 1), 0) == 0, of_gradient, float("nan"))
        store_packed(chunk_gram(area + GRADIENTS * (RC * RC + RC), chunk, RC, WIDE), of_gradient, RC, TC)
