"""AdamW of a chunk of one side for RefLoRA-S, and the squares of its columns before and after: the norms of a row."""

import triton
import triton.language as tl

from .. import table as col
from ..dtypes import bounded, load
from .chunks import never_finite, span, store_bad
from .pair import block_zeros, column, offsets
from .scalar import AFTER, BEFORE, add_squares, no_squares, store_squares
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


@triton.jit
def step_side(
    p_row, parts, header, hypers, unscale, root, move, turn, seed, chunk, own_chunk, width, r, code,
    SIDE: tl.constexpr, CHECK: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, STORE: tl.constexpr,
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
    if STORE:
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
        p, kept, w = fetch(at, o, mask, amsgrad, code, state, AMSGRAD, MASTER, DTYPE, STATE, WIDE, VECTOR)
        if CHECK:
            bad = tl.maximum(bad, never_finite(g))
        kept, m, v = moments(kept, bounded(g * g_factor, limit), m_factor, beta1, beta2, chosen, AMSGRAD, WIDE)
        if not STORE:
            old, old_exponent = add_squares(old, old_exponent, p, WIDE)
        p = weights(at, p, w, code, MASTER, DTYPE)
        p = advance((p.to(tl.float64) * root).to(WIDE), m, v, step_size, correction, decay, eps)
        keep_moments(at, o, mask, chosen, kept, turn, state, AMSGRAD, STORE, STATE, VECTOR)
        p = keep_weights(
            at, o, mask, p, turn, key, start + tl.arange(0, BN), r, code, SIDE, MASTER, RANDOM, STORE, RC, DTYPE,
            WIDE, VECTOR,
        )  # fmt: skip
        if not STORE:
            new, new_exponent = add_squares(new, new_exponent, p, WIDE)
    if not STORE:
        store_squares(parts, chunk, old, old_exponent, BEFORE)
        store_squares(parts, chunk, new, new_exponent, AFTER)
        store_bad(header, chunk, bad)
