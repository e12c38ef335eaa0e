"""The AdamW update of a chunk of one side of a pair, fused with what its gradient is multiplied by."""

import triton
import triton.language as tl

from .. import table as col
from ..dtypes import BFLOAT16, FLOAT16, FLOAT32, bounded, clamped, load, root, rounded, store
from .chunks import (
    CORRECTION_A,
    CORRECTION_B,
    COUNT_A,
    COUNT_B,
    DECAY_A,
    DECAY_B,
    EXPONENT,
    STEP_SIZE_A,
    STEP_SIZE_B,
    block_gram,
    chunk_gram,
    store_packed,
)
from .mean import mixer
from .pair import column, load_columns, offsets
from .rounding import key_of, round_randomly


@triton.jit
def side_scalars(header, SIDE: tl.constexpr):
    """(step size, correction of sqrt(v), decay, number of the step) that `settle` has left for a side."""
    if SIDE == col.A_SIDE:
        return (
            tl.load(header + STEP_SIZE_A), tl.load(header + CORRECTION_A), tl.load(header + DECAY_A),
            tl.load(header + COUNT_A),
        )  # fmt: skip
    else:
        return (
            tl.load(header + STEP_SIZE_B), tl.load(header + CORRECTION_B), tl.load(header + DECAY_B),
            tl.load(header + COUNT_B),
        )  # fmt: skip


@triton.jit
def put(
    address, o, values, factor, mask, code, DTYPE: tl.constexpr, STORE: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Stores values, times a float64 factor where there is one; nothing unless STORE."""
    if STORE:
        if factor is not None:
            values = values.to(tl.float64) * factor
        store(address, o, values, mask, code, DTYPE, VECTOR)


@triton.jit
def homes(p_row, SIDE: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr):
    """Addresses of a side's factor, moments (m, v, largest v) and master weights; 0 where a launch has none."""
    p_x, p_w = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if AMSGRAD:
        p_x = column(p_row, SIDE + col.X)
    if MASTER:
        p_w = column(p_row, SIDE + col.W)
    kept = column(p_row, SIDE + col.M), column(p_row, SIDE + col.V), p_x
    return column(p_row, SIDE + col.P), kept, p_w


@triton.jit
def fetch(
    at, o, mask, amsgrad, code, state, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, DTYPE: tl.constexpr,
    STATE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Factor, moments and master weights of a block, from `homes`.

    Before anything is stored: a load waits for every store that it might read.
    """
    p_p, of_moments, p_w = at
    p_m, p_v, p_x = of_moments
    p = load(p_p, o, mask, code, DTYPE, WIDE, VECTOR)
    m = load(p_m, o, mask, state, STATE, WIDE, VECTOR)
    v = load(p_v, o, mask, state, STATE, WIDE, VECTOR)
    x, w = v, p
    if AMSGRAD:
        x = load(p_x, o, mask & amsgrad, state, STATE, WIDE, VECTOR)
    if MASTER:
        w = load(p_w, o, mask & (p_w != 0), FLOAT32, FLOAT32, WIDE, VECTOR)
    return p, (m, v, x), w


@triton.jit
def moments(kept, g, m_factor, beta1, beta2, chosen, AMSGRAD: tl.constexpr, WIDE: tl.constexpr):
    """Moments of a block, moved to new units by m_factor and updated by g; the m and v that a step divides."""
    m, v, x = kept
    limit = tl.full((), 1e38 if WIDE == tl.float32 else 1e307, WIDE)
    m = clamped(m * m_factor, limit)
    # which products are fused is spelt out: every variant and route then rounds alike
    m = tl.fma((1.0 - beta1).to(WIDE), g - m, m)
    # not by the square of m_factor, which may leave the range where v does not
    v = v * m_factor * m_factor
    v = tl.fma((1.0 - beta2).to(WIDE) * g, g, beta2.to(WIDE) * v)
    second = v
    if AMSGRAD:
        # groups without amsgrad have no X
        x = x * m_factor * m_factor
        x = tl.where((x >= v) | (x != x), x, v)
        second = tl.where(chosen, x, v)
    return (m, v, x), m, second


@triton.jit
def keep_moments(
    at, o, mask, chosen, kept, turn, state, AMSGRAD: tl.constexpr, STORE: tl.constexpr, STATE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """turn: what the factor is multiplied by after the step, which moves what is kept once more; None for 1."""
    p_m, p_v, p_x = at[1]
    m, v, x = kept
    back, back_squared = turn, turn
    if turn is not None:
        back, back_squared = 1.0 / turn, 1.0 / (turn * turn)
    put(p_m, o, m, back, mask, state, STATE, STORE, VECTOR)
    put(p_v, o, v, back_squared, mask, state, STATE, STORE, VECTOR)
    if AMSGRAD:
        put(p_x, o, x, back_squared, chosen, state, STATE, STORE, VECTOR)


@triton.jit
def weights(at, p, w, code, MASTER: tl.constexpr, DTYPE: tl.constexpr):
    """The weights that are updated: the factor's, or its float32 master's where that still rounds to the factor's."""
    if MASTER:
        p = tl.where((at[2] != 0) & (rounded(w, code, DTYPE) == p), w, p)
    return p


@triton.jit
def keep_weights(
    at, o, mask, p, turn, key, columns, r, code, SIDE: tl.constexpr, MASTER: tl.constexpr, RANDOM: tl.constexpr,
    STORE: tl.constexpr, RC: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Keeps updated weights, times turn where there is one. Returns them rounded as the factor's, 0 where masked."""
    p_p, _, p_w = at
    if MASTER:
        huge = tl.where(code == FLOAT16, 65504.0, 3.3895313892515355e38).to(WIDE)
        put(p_w, o, bounded(p, huge), turn, mask & (p_w != 0), FLOAT32, FLOAT32, STORE, VECTOR)
    kept = rounded(p, code, DTYPE)
    if RANDOM:
        i = tl.arange(0, RC).to(tl.int64)
        if SIDE == col.A_SIDE:
            elements = i[:, None] + columns.to(tl.int64)[None, :] * r
        else:
            elements = columns.to(tl.int64)[:, None] * r + i[None, :]
        random = round_randomly(within_bfloat16(p), elements, key).to(WIDE)
        kept = tl.where((code == BFLOAT16) & (p_w == 0), random, kept)
    put(p_p, o, kept, turn, mask, code, DTYPE, STORE, VECTOR)
    return tl.where(mask, kept, 0.0)


@triton.jit
def within_bfloat16(p):
    huge = tl.full((), 3.3895313892515355e38, tl.float32)
    p = p.to(tl.float32)
    return bounded(p, huge)


@triton.jit
def hypers_of(p_row, hypers, unscale, SIDE: tl.constexpr, WIDE: tl.constexpr):
    """Of a side: (what its gradient is multiplied by, bound of that product, beta1, beta2, eps, whether amsgrad)."""
    p_hyper = hypers + column(p_row, SIDE + col.HYPER) * col.HYPERS
    g_factor = tl.where(tl.load(p_hyper + col.MAXIMIZE) != 0, -unscale, unscale).to(WIDE)
    # its square stays in range too
    limit = tl.full((), 1e18 if WIDE == tl.float32 else 1e153, WIDE)
    beta1, beta2 = tl.load(p_hyper + col.BETA1), tl.load(p_hyper + col.BETA2)
    amsgrad = tl.load(p_hyper + col.AMSGRAD).to(tl.int32) != 0
    return g_factor, limit, beta1, beta2, tl.load(p_hyper + col.EPS).to(WIDE), amsgrad


@triton.jit
def side_key(p_row, seed, count, SIDE: tl.constexpr):
    """Of stochastic rounding, for step number `count` of a side; 0 without a seed."""
    key = tl.full((), 0, tl.uint64)
    if seed is not None:
        key = key_of(seed, 2 * column(p_row, col.TAG) + (0 if SIDE == col.A_SIDE else 1), count.to(tl.int64) - 1)
    return key


@triton.jit
def advance(p, m, v, step_size, correction, decay, eps):
    # eps = 0 and no gradient yet: 0 / 0 is no step
    denominator = tl.where(m == 0, 1.0, tl.fma(root(v), correction, eps))
    return tl.fma(-step_size, m / denominator, p * decay)


@triton.jit
def product(matrix, g, SIDE: tl.constexpr, WIDE: tl.constexpr):
    """`matrix @ g` on side A, `g @ matrix` on side B."""
    if SIDE == col.A_SIDE:
        return tl.dot(matrix, g, input_precision="ieee", out_dtype=WIDE)
    else:
        return tl.dot(g, matrix, input_precision="ieee", out_dtype=WIDE)


@triton.jit
def update(
    p_row, area, header, hypers, unscale, m_factor, seed, chunk, begin, end, r, code, state, SIDE: tl.constexpr,
    AMSGRAD: tl.constexpr, MASTER: tl.constexpr, CARRY: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """AdamW of columns begin to end of one side, the gradient multiplied by S^-1 (A) or S (B) as it is read.

    unscale, m_factor: float64 scalars for the gradient and for the moments' change of units. CARRY: the Gram of the
    updated columns is left as chunk number `chunk`, summed as `accumulate` would.
    """
    g_factor, limit, beta1, beta2, eps, amsgrad = hypers_of(p_row, hypers, unscale, SIDE, WIDE)
    step_size, correction, decay, count = side_scalars(header, SIDE)
    step_size, correction, decay = step_size.to(WIDE), correction.to(WIDE), decay.to(WIDE)
    m_factor = m_factor.to(WIDE)
    RANDOM: tl.constexpr = seed is not None
    key = side_key(p_row, seed, count, SIDE)
    sr, sn = column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    at = homes(p_row, SIDE, AMSGRAD, MASTER)
    i = tl.arange(0, RC)
    matrix = tl.load(mixer(area, SIDE == col.A_SIDE, RC, WIDE) + i[:, None] * RC + i[None, :])
    if SIDE == col.A_SIDE:
        # S^-1 is symmetric; laid out like this its rows are read from shared memory without conflicts
        matrix = tl.trans(matrix)
    one = tl.where(end > begin, 1.0, 0.0).to(TC)
    acc = tl.zeros([RC, RC], TC)
    # the next block is on its way while this one is worked on, where registers allow
    AHEAD: tl.constexpr = not (CARRY or MASTER or WIDE == tl.float64)
    if AHEAD:
        g = load_columns(p_g, g_sr, g_sn, begin, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
        o, mask = offsets(begin, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        p, kept, w = fetch(at, o, mask, amsgrad, code, state, AMSGRAD, MASTER, DTYPE, STATE, WIDE, VECTOR)
    for start in range(begin, end, BN):
        if not AHEAD:
            g = load_columns(p_g, g_sr, g_sn, start, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
        mixed = product(matrix, g * g_factor, SIDE, WIDE)
        if AHEAD:
            g = load_columns(p_g, g_sr, g_sn, start + BN, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
            o, mask = offsets(start + BN, sr, sn, r, end, SIDE, RC, BN, VECTOR)
            next = fetch(at, o, mask, amsgrad, code, state, AMSGRAD, MASTER, DTYPE, STATE, WIDE, VECTOR)
        o, mask = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        if not AHEAD:
            p, kept, w = fetch(at, o, mask, amsgrad, code, state, AMSGRAD, MASTER, DTYPE, STATE, WIDE, VECTOR)
        chosen = mask & amsgrad
        kept, m, v = moments(kept, bounded(mixed, limit), m_factor, beta1, beta2, chosen, AMSGRAD, WIDE)
        p = advance(weights(at, p, w, code, MASTER, DTYPE), m, v, step_size, correction, decay, eps)
        keep_moments(at, o, mask, chosen, kept, None, state, AMSGRAD, True, STATE, VECTOR)
        p = keep_weights(
            at, o, mask, p, None, key, start + tl.arange(0, BN), r, code, SIDE, MASTER, RANDOM, True, RC, DTYPE, WIDE,
            VECTOR,
        )  # fmt: skip
        if CARRY:
            acc += block_gram(p.to(TC), SIDE, TC) * one
        if AHEAD:
            p, kept, w = next
    if CARRY:
        store_packed(chunk_gram(area, chunk, RC, WIDE), acc, RC, TC)
        tl.store(header + EXPONENT + chunk, 0.0)
