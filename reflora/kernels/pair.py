"""What the kernels over pairs share: reading a row of the pointer table, Grams, the solve for S, its application.

Side A is worked on as blocks `[RC, BN]` and side B as `[BN, RC]`, so that both are read in their usual storage order.
"""

import triton
import triton.language as tl

from . import table as col
from .dtypes import exponent_of, load, normal_range, power_of_two, store
from .solve import FACTOR_INVERSE, FACTOR_T, PLAIN, factor, finish, multiply, newton_polar

# slots of the workspace of a program; the S slots hold WIDE elements and are read with their own stride
SLOT_A, SLOT_B, SLOT_X, SLOT_Y, SLOT_N = (tl.constexpr(c) for c in range(5))
SLOTS = tl.constexpr(5)


@triton.jit
def column(p_row, index: tl.constexpr):
    return tl.load(p_row + index)


@triton.jit
def slot(work, index, number: tl.constexpr, RC: tl.constexpr, TYPE: tl.constexpr):
    """Slot `number` of program `index`; slots lie 8 bytes an element apart whatever they hold."""
    offset = (index.to(tl.int64) * SLOTS + number) * (RC * RC + RC)
    return (work + offset).to(tl.pointer_type(TYPE))


@triton.jit
def offsets(start, sr, sn, r, n, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr):
    """Element offsets and mask of the block of a side that starts at column `start`."""
    i = tl.arange(0, RC)
    k = start + tl.arange(0, BN)
    if SIDE == col.A_SIDE:
        o = i.to(tl.int64)[:, None] * sr + k.to(tl.int64)[None, :] * sn
        m = (i < r)[:, None] & (k < n)[None, :]
    else:
        o = k.to(tl.int64)[:, None] * sn + i.to(tl.int64)[None, :] * sr
        m = (k < n)[:, None] & (i < r)[None, :]
    return o, m


@triton.jit
def block_zeros(SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr):
    if SIDE == col.A_SIDE:
        return tl.zeros([RC, BN], TYPE)
    else:
        return tl.zeros([BN, RC], TYPE)


@triton.jit
def largest(
    address, sr, sn, r, n, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The largest absolute value of a side, float64; inf when an element is not finite."""
    acc = block_zeros(SIDE, RC, BN, WIDE)
    for start in range(0, n, BN):
        o, m = offsets(start, sr, sn, r, n, SIDE, RC, BN)
        size = tl.abs(load(address, o, m, code, DTYPE, WIDE))
        acc = tl.maximum(acc, tl.where(size < float("inf"), size, float("inf")))
    return tl.max(tl.max(acc, 1), 0).to(tl.float64)


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
        top = largest(address, sr, sn, r, n, code, SIDE, RC, BN, DTYPE, WIDE)
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
    trace = tl.sum(tl.load(p_slot + i * RC + i), 0)
    norm = tl.where(sound == 1, tl.sqrt(trace.to(tl.float64)), float("nan"))
    usable = (norm > 0) & (norm < float("inf"))
    scale = tl.where(usable, 1.0 / tl.where(usable, trace, 1.0), 0.0)
    return scale, norm, exponent


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
        if SIDE == col.A_SIDE:
            part = tl.dot(left, tl.trans(x), input_precision="ieee", out_dtype=TC)
        else:
            part = tl.dot(tl.trans(left), x, input_precision="ieee", out_dtype=TC)
        acc += part * one
    i, j = first + tl.arange(0, BM), tl.arange(0, RC)
    tl.store(p_slot + i[:, None] * RC + j[None, :], acc)


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


@triton.jit
def decide(
    p_row, work, index, r, code, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grams and their Cholesky factors, packed into SLOT_A and SLOT_B, and what follows from them.

    Returns (status, kappa_a, kappa_b, balance, c, norm_a, norm_b): int32 and float64 scalars, c = 1 where the ratio of
    the norms is of no use as a scale.
    """
    p_a, p_b = slot(work, index, SLOT_A, RC, TC), slot(work, index, SLOT_B, RC, TC)
    scale_a, norm_a, exponent_a = gram(p_row, p_a, r, code, col.A_SIDE, RC, BN, BM, DTYPE, WIDE, TC, SCALED)
    scale_b, norm_b, exponent_b = gram(p_row, p_b, r, code, col.B_SIDE, RC, BN, BM, DTYPE, WIDE, TC, SCALED)
    c, useful = ratio(norm_a, exponent_a, norm_b, exponent_b, code)
    balance = distance(p_a, p_b, scale_a, scale_b, c, RC, BM)
    balance = tl.where((norm_a > 0) & (norm_b > 0), balance, tl.where(norm_a > 0, 1.0, float("inf")))
    kappa_a = factor(p_a, scale_a, r, RC)
    kappa_b = factor(p_b, scale_b, r, RC)
    kappa_a = tl.where(column(p_row, col.A_SIDE + col.N) < r, float("inf"), kappa_a)
    kappa_b = tl.where(column(p_row, col.B_SIDE + col.N) < r, float("inf"), kappa_b)
    regular = useful & (kappa_a <= KAPPA_MAX) & (kappa_b <= KAPPA_MAX)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    status = tl.where(finite, tl.where(regular, col.REFACTORED, col.DEGENERATE), col.SKIPPED)
    c = tl.where(useful, c, 1.0)
    return (
        status, kappa_a, kappa_b, balance, c, norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
    )  # fmt: skip


@triton.jit
def ratio(norm_a, exponent_a, norm_b, exponent_b, code):
    """c = ||B|| / ||A||, and whether c and 1 / c are normal numbers of the type it is applied in."""
    shift = exponent_b - exponent_a
    half = shift >> 1
    c = norm_b / norm_a * power_of_two(half) * power_of_two(shift - half)
    tiny, huge = normal_range(code)
    usable = (norm_a > 0) & (norm_b > 0) & (norm_a < float("inf")) & (norm_b < float("inf"))
    return c, usable & (c >= tiny) & (c <= huge) & (1.0 / c >= tiny) & (1.0 / c <= huge)


@triton.jit
def distance(p_a, p_b, scale_a, scale_b, c, RC: tl.constexpr, BM: tl.constexpr):
    """`||Ga - Gb||_F / ||Ga||_F` of the factors themselves, from the slots of Grams and what makes their traces 1."""
    j = tl.arange(0, RC)
    between, size = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for top in range(0, RC, BM):
        o = (top + tl.arange(0, BM))[:, None] * RC + j[None, :]
        a = (tl.load(p_a + o) * scale_a).to(tl.float64)
        d = a - (tl.load(p_b + o) * scale_b).to(tl.float64) * (c * c)
        between += tl.sum(tl.sum(d * d, 1), 0)
        size += tl.sum(tl.sum(a * a, 1), 0)
    return tl.sqrt(between / size)


@triton.jit
def polar_of_pair(
    work, index, r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr, KEEP_N: tl.constexpr
):
    """Q of `N = Lb^T La = Q H` into SLOT_X, from the packed factors; N into SLOT_N for KEEP_N."""
    p_a, p_b = slot(work, index, SLOT_A, RC, TC), slot(work, index, SLOT_B, RC, TC)
    p_x, p_y = slot(work, index, SLOT_X, RC, TC), slot(work, index, SLOT_Y, RC, TC)
    multiply(p_x, p_b, FACTOR_T, False, p_a, FACTOR_T, True, r, RC, BM, BK, TC)
    multiply(p_y, p_b, FACTOR_INVERSE, False, p_a, FACTOR_INVERSE, True, r, RC, BM, BK, TC)
    tl.debug_barrier()
    if KEEP_N:
        i = tl.arange(0, RC)
        o = i[:, None] * RC + i[None, :]
        tl.store(slot(work, index, SLOT_N, RC, TC) + o, tl.load(p_x + o))
    newton_polar(p_x, p_y, r, RC, BM, TC)


@triton.jit
def form_s(
    work, index, r, c, code, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr
):
    """`S = c La^-T Q^T Lb^T` into SLOT_A and `S^-1 = Lb^-T Q La^T / c` into SLOT_B, as WIDE elements.

    Returns 1 if every element is finite in the type that S is applied in, else 0.
    """
    p_a, p_b = slot(work, index, SLOT_A, RC, TC), slot(work, index, SLOT_B, RC, TC)
    p_x, p_y = slot(work, index, SLOT_X, RC, TC), slot(work, index, SLOT_Y, RC, TC)
    p_n = slot(work, index, SLOT_N, RC, TC)
    multiply(p_y, p_x, PLAIN, True, p_b, FACTOR_T, False, r, RC, BM, BK, TC)
    multiply(p_n, p_x, PLAIN, False, p_a, FACTOR_T, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    multiply(p_x, p_a, FACTOR_INVERSE, True, p_y, PLAIN, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    multiply(p_y, p_b, FACTOR_INVERSE, True, p_n, PLAIN, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    tiny, huge = normal_range(code)
    fits = finish(slot(work, index, SLOT_A, RC, WIDE), p_x, c, huge, True, RC, BM, WIDE)
    fits &= finish(slot(work, index, SLOT_B, RC, WIDE), p_y, 1.0 / c, huge, True, RC, BM, WIDE)
    tl.debug_barrier()
    return fits


@triton.jit
def form_scaled_identity(work, index, value, inverse, RC: tl.constexpr, TYPE: tl.constexpr):
    """SLOT_A becomes value I and SLOT_B inverse I."""
    i = tl.arange(0, RC)
    o = i[:, None] * RC + i[None, :]
    diagonal = i[:, None] == i[None, :]
    zeros = tl.zeros([RC, RC], TYPE)
    tl.store(slot(work, index, SLOT_A, RC, TYPE) + o, tl.where(diagonal, value.to(TYPE), zeros))
    tl.store(slot(work, index, SLOT_B, RC, TYPE) + o, tl.where(diagonal, inverse.to(TYPE), zeros))
    tl.debug_barrier()


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
        column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN), r,
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
