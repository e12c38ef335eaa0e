"""What the kernels over pairs share: reading a row of the pointer table, blocks of a side, their mixing, the report.

Side A is worked on as blocks `[RC, BN]` and side B as `[BN, RC]`, so that both are read in their usual storage order.
"""

import triton
import triton.language as tl

from . import table as col
from .dtypes import load, store

# slots of the workspace of a row: RC * RC elements, then a vector of RC, 8 bytes an element whatever they hold. S and
# S^-1 end up at its beginning, as WIDE elements without a gap. float64 ones leave room in five slots for nothing else
SLOT_A, SLOT_B, SLOT_X, SLOT_Y, SLOT_N = (tl.constexpr(c) for c in range(5))
SLOTS_FLOAT32, SLOTS_FLOAT64 = tl.constexpr(5), tl.constexpr(6)


@triton.jit
def column(p_row, index: tl.constexpr):
    return tl.load(p_row + index)


@triton.jit
def area_of(work, index, RC: tl.constexpr, WIDE: tl.constexpr):
    """The workspace of row `index` of a launch."""
    SLOTS: tl.constexpr = SLOTS_FLOAT64 if WIDE == tl.float64 else SLOTS_FLOAT32
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
def resident(p_slot, RC: tl.constexpr, BK: tl.constexpr):
    """What `mix` multiplies by: the matrix itself where a single block holds it, else its slot."""
    if BK == RC:
        i = tl.arange(0, RC)
        return tl.load(p_slot + i[:, None] * RC + i[None, :])
    else:
        return p_slot


@triton.jit
def mix(
    matrix, address, sr, sn, start, r, n, code, factor, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """`matrix @ block` on side A, `block @ matrix` on side B; elements of the side are multiplied by `factor` first."""
    acc = block_zeros(SIDE, RC, BN, TYPE)
    i = tl.arange(0, RC)
    k = (start + tl.arange(0, BN)).to(tl.int64)
    for inner in range(0, RC, BK):
        j = inner + tl.arange(0, BK)
        if SIDE == col.A_SIDE:
            o, m = j.to(tl.int64)[:, None] * sr + k[None, :] * sn, (j < r)[:, None] & (k < n)[None, :]
            x = (load(address, o, m, code, DTYPE, WIDE) * factor).to(TYPE)
            left = matrix if BK == RC else tl.load(matrix + i[:, None] * RC + j[None, :])
            acc = tl.dot(left, x, acc, input_precision="ieee", out_dtype=TYPE)
        else:
            o, m = k[:, None] * sn + j.to(tl.int64)[None, :] * sr, (k < n)[:, None] & (j < r)[None, :]
            x = (load(address, o, m, code, DTYPE, WIDE) * factor).to(TYPE)
            right = matrix if BK == RC else tl.load(matrix + j[:, None] * RC + i[None, :])
            acc = tl.dot(x, right, acc, input_precision="ieee", out_dtype=TYPE)
    return acc


@triton.jit
def apply(
    p_row, p_slot, r, code, COLUMN: tl.constexpr, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """What COLUMN of a side points at becomes the slot's matrix (TYPE elements) times it, in place."""
    address = column(p_row, SIDE + COLUMN)
    sr, sn = column(p_row, SIDE + COLUMN + 1), column(p_row, SIDE + COLUMN + 2)
    n = column(p_row, SIDE + col.N).to(tl.int32)
    matrix = resident(p_slot, RC, BK)
    one = tl.full((), 1.0, WIDE)
    for start in range(0, n, BN):
        mixed = mix(matrix, address, sr, sn, start, r, n, code, one, SIDE, RC, BN, BK, DTYPE, WIDE, TYPE)
        o, m = offsets(start, sr, sn, r, n, SIDE, RC, BN)
        # the block is read by all before any of it is overwritten
        tl.debug_barrier()
        store(address, o, mixed, m, code, DTYPE)


@triton.jit
def rescale(
    p_row, factor, r, code, COLUMN: tl.constexpr, STRIDES: tl.constexpr, SIDE: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What COLUMN of a side points at, with the strides of STRIDES, is multiplied by a float64 scalar, in float64."""
    address = column(p_row, SIDE + COLUMN)
    sr, sn = column(p_row, SIDE + STRIDES + 1), column(p_row, SIDE + STRIDES + 2)
    n = column(p_row, SIDE + col.N).to(tl.int32)
    for start in range(0, n, BN):
        o, m = offsets(start, sr, sn, r, n, SIDE, RC, BN)
        x = load(address, o, m, code, DTYPE, WIDE).to(tl.float64) * factor
        store(address, o, x, m, code, DTYPE)


@triton.jit
def largest_grad(
    p_row, r, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr
):
    return largest(
        column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN), r, 0,
        column(p_row, SIDE + col.N).to(tl.int32), code, SIDE, RC, BN, DTYPE, WIDE,
    )  # fmt: skip


@triton.jit
def finite_grads(p_row, r, code, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Whether both gradients of a row are finite."""
    a = largest_grad(p_row, r, code, col.A_SIDE, RC, BN, DTYPE, WIDE)
    b = largest_grad(p_row, r, code, col.B_SIDE, RC, BN, DTYPE, WIDE)
    return tl.maximum(a, b) < float("inf")


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
