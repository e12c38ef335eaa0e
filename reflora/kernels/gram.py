"""Grams of the sides of a pair, `A A^T` and `B^T B`, summed block by block."""

import triton
import triton.language as tl

from . import table as col
from .dtypes import exponent_of, load, power_of_two
from .pair import column, largest, offsets


@triton.jit
def gram(
    p_row, p_slot, r, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Gram of a side into its slot.

    Returns (scale, norm, exponent): the factor that makes its trace 1 (0 where there is none), TC, and `||.||_F` as
    `norm * 2^exponent` (float64, int64; NaN or inf where an element is). SCALED: the side is scaled by a power of two
    first, where squares of storage values may leave the range of TC.
    """
    address, sr, sn = column(p_row, SIDE + col.P), column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    n = column(p_row, SIDE + col.N).to(tl.int32)
    exponent = tl.full((), 0, tl.int64)
    sound = tl.full((), 1, tl.int32)
    if SCALED:
        top = largest(address, sr, sn, r, 0, n, code, SIDE, RC, BN, DTYPE, WIDE)
        sound = tl.where(top < float("inf"), 1, 0)
        exponent = exponent_of(tl.where((top > 0) & (top < float("inf")), top, 1.0))
        bound = 1000 if WIDE == tl.float64 else 126
        exponent = tl.minimum(tl.maximum(exponent, -bound), bound)
    factor = power_of_two(-exponent).to(WIDE)
    for first in range(0, RC, BM):
        gram_panel(
            address, p_slot, sr, sn, first, r, n, code, factor, SIDE, RC, BN, BM, DTYPE, WIDE, TC, SCALED
        )  # fmt: skip
    tl.debug_barrier()
    i = tl.arange(0, RC)
    scale, norm = unit_trace(tl.load(p_slot + i * RC + i))
    return scale, tl.where(sound == 1, norm, float("nan")), exponent


@triton.jit
def unit_trace(diagonal):
    """(what makes the trace 1, 0 where nothing does; the root of the trace, float64) of a Gram with this diagonal."""
    trace = tl.sum(diagonal, 0)
    norm = tl.sqrt(trace.to(tl.float64))
    usable = (norm > 0) & (norm < float("inf"))
    return tl.where(usable, 1.0 / tl.where(usable, trace, 1.0), 0.0), norm


@triton.jit
def gram_panel(
    address, p_slot, sr, sn, first, r, n, code, factor, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Rows first to first + BM of a Gram."""
    acc = tl.zeros([BM, RC], TC)
    # sums of blocks are added up: one chain over n loses a digit of S. A factor that the compiler does not know to be 1
    # keeps it from making a chain of them again
    one = tl.where(n > 0, 1.0, 0.0).to(TC)
    for start in range(0, n, BN):
        x = load_block(address, 0, RC, start, sr, sn, r, n, code, factor, SIDE, BN, DTYPE, WIDE, TC, SCALED)
        if BM == RC:
            left = x
        else:
            left = load_block(address, first, BM, start, sr, sn, r, n, code, factor, SIDE, BN, DTYPE, WIDE, TC, SCALED)
        acc += block_gram(left, x, SIDE, TC) * one
    i, j = first + tl.arange(0, BM), tl.arange(0, RC)
    tl.store(p_slot + i[:, None] * RC + j[None, :], acc)


@triton.jit
def block_gram(left, x, SIDE: tl.constexpr, TC: tl.constexpr):
    """`left @ x^T` on side A, `left^T @ x` on side B, of blocks in TC."""
    if SIDE == col.A_SIDE:
        return tl.dot(left, tl.trans(x), input_precision="ieee", out_dtype=TC)
    else:
        return tl.dot(tl.trans(left), x, input_precision="ieee", out_dtype=TC)


@triton.jit
def load_block(
    address, first, ROWS: tl.constexpr, start, sr, sn, r, n, code, factor, SIDE: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    o, m = offsets(start, sr, sn, r - first, n, SIDE, ROWS, BN)
    x = load(address, o + first * sr, m, code, DTYPE, WIDE)
    if SCALED:
        x = x * factor
    return x.to(TC)
