"""What the kernels over pairs share: reading a row of the pointer table, blocks of a side, the report.

Side A is worked on as blocks `[RC, BN]` and side B as `[BN, RC]`, so that both are read in their usual storage order.
"""

import triton
import triton.language as tl

from .. import table as col
from ..dtypes import load

# slots of the workspace of a row: RC * RC elements, then a vector of RC, 8 bytes an element whatever they hold. S and
# S^-1 end up at its beginning, as WIDE elements without a gap. float64 ones leave room in five slots for nothing else
SLOT_A, SLOT_B, SLOT_X, SLOT_Y, SLOT_N = (tl.constexpr(c) for c in range(5))
SLOTS_FLOAT32, SLOTS_FLOAT64 = tl.constexpr(5), tl.constexpr(6)
# those of InvariantAdamW: transposed frames of A and of B, three to work in for each side, the first being SLOT_X, and
# where the workspace of the gradients' Grams begins
SLOT_FRAME_A, SLOT_FRAME_B, WORK_A, WORK_B, GRADIENTS = (tl.constexpr(c) for c in (5, 6, 2, 7, 9))
WHITENING = tl.constexpr(9)


@triton.jit
def column(p_row, index: tl.constexpr):
    return tl.load(p_row + index)


@triton.jit
def area_of(work, index, RC: tl.constexpr, WIDE: tl.constexpr, MORE: tl.constexpr = 0):
    """The workspace of row `index` of a launch; MORE: slots past those that S takes."""
    SLOTS: tl.constexpr = (SLOTS_FLOAT64 if WIDE == tl.float64 else SLOTS_FLOAT32) + MORE
    return work + index.to(tl.int64) * SLOTS * (RC * RC + RC)


@triton.jit
def slot(area, number: tl.constexpr, RC: tl.constexpr, TYPE: tl.constexpr):
    return (area + number * (RC * RC + RC)).to(tl.pointer_type(TYPE))


@triton.jit
def offsets(
    start, sr, sn, r, n, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, VECTOR: tl.constexpr = False
):  # fmt: skip
    """Element offsets and mask of the block of a side that starts at column `start`; VECTOR: see launch.aligned."""
    i = tl.arange(0, RC)
    k = start + tl.arange(0, BN)
    if SIDE == col.A_SIDE:
        m = (i < r)[:, None] & (k < n)[None, :]
        if VECTOR:
            o = i[:, None] * sr.to(tl.int32) + k[None, :]
        else:
            o = i.to(tl.int64)[:, None] * sr + k.to(tl.int64)[None, :] * sn
    else:
        m = (k < n)[:, None] & (i < r)[None, :]
        if VECTOR:
            o = k[:, None] * sn.to(tl.int32) + i[None, :]
        else:
            o = k.to(tl.int64)[:, None] * sn + i.to(tl.int64)[None, :] * sr
    if VECTOR:
        o = tl.max_contiguous(tl.multiple_of(o, [1, 4]), [1, 4])
        m = tl.max_constancy(m, [1, 4])
    return o, m


@triton.jit
def load_columns(
    address, sr, sn, start, end, r, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The block of a side that starts at column `start`, 0 from `end` on."""
    o, m = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
    return load(address, o, m, code, DTYPE, WIDE, VECTOR)


@triton.jit
def block_zeros(SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr):
    if SIDE == col.A_SIDE:
        return tl.zeros([RC, BN], TYPE)
    else:
        return tl.zeros([BN, RC], TYPE)


@triton.jit
def largest(
    address, sr, sn, r, begin, end, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr, VECTOR: tl.constexpr = False,
):  # fmt: skip
    """The largest absolute value in columns of a side, float64; inf when an element is not finite."""
    acc = block_zeros(SIDE, RC, BN, WIDE)
    for start in range(begin, end, BN):
        o, m = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        size = tl.abs(load(address, o, m, code, DTYPE, WIDE, VECTOR))
        acc = tl.maximum(acc, tl.where(size < float("inf"), size, float("inf")))
    return tl.max(tl.max(acc, 1), 0).to(tl.float64)


@triton.jit
def report(results, row, status, kappa_a, kappa_b, balance, scale, norm_a, norm_b):
    """The row's diagnostics; every column is written."""
    p = results + row.to(tl.int64) * col.RESULTS
    tl.store(p + col.STATUS, status.to(tl.float64))
    tl.store(p + col.KAPPA_A, kappa_a)
    tl.store(p + col.KAPPA_B, kappa_b)
    tl.store(p + col.BALANCE, balance)
    tl.store(p + col.SCALE, scale)
    tl.store(p + col.NORM_A, norm_a)
    tl.store(p + col.NORM_B, norm_b)
    tl.store(p + col.RESULTS - 1, tl.full((), float("nan"), tl.float64))
