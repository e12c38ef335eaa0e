"""A row in chunks of columns, at most eight: their Grams, and the sum of these in a fixed order.

Who sums, one program for a row or many, changes no bit: a chunk's Gram is a chain of its blocks, a side's the chain of
its chunks. Chunk Grams are packed triangles behind S and S^-1 in the workspace, where the solve overwrites them.
"""

import triton
import triton.language as tl

from .. import table as col
from ..dtypes import exponent_of, power_of_two
from .pair import SLOT_A, SLOT_B, block_zeros, column, largest, load_columns, slot

CHUNKS = tl.constexpr(8)
# the largest rank class whose two Grams are summed in registers
RESIDENT = tl.constexpr(64)

# what a row's programs tell each other, float64 `[rows, HEADER]`: whether it takes a step; the scalars of both sides'
# updates; what A's moments are multiplied by; whether its chunk Grams are those of the updated factors; by chunk,
# whether a gradient was not finite, and the exponent that the Gram is scaled by
RUN, STEP_SIZE_A, CORRECTION_A, DECAY_A, COUNT_A, STEP_SIZE_B, CORRECTION_B, DECAY_B, COUNT_B, MOVE, CARRIED = (
    tl.constexpr(c) for c in range(11)
)
# RefLoRA-S: what A is multiplied by before its update and after
ROOT, TURN = tl.constexpr(11), tl.constexpr(12)
# without an update, RUN says what each side is multiplied by: a matrix, or a number of its own
MATRIX, NUMBER = tl.constexpr(1), tl.constexpr(2)
FACTOR_A, FACTOR_B = tl.constexpr(13), tl.constexpr(14)
BAD, EXPONENT = tl.constexpr(16), tl.constexpr(24)
# InvariantAdamW: what the squares of the frames of A and of B are multiplied by; whether this step is yet to take part
# in the second moments of either; BAD and EXPONENT of gradients are so much further on
SQUARE_A, SQUARE_B, AWAITED_A, AWAITED_B, OF_GRADIENTS = (tl.constexpr(c) for c in (11, 12, 13, 14, 16))
HEADER = tl.constexpr(48)


@triton.jit
def counts(p_row, width):
    """(chunks of A, chunks of both sides)."""
    chunks_a = tl.cdiv(column(p_row, col.A_SIDE + col.N).to(tl.int32), width)
    return chunks_a, chunks_a + tl.cdiv(column(p_row, col.B_SIDE + col.N).to(tl.int32), width)


@triton.jit
def span(p_row, chunk, width, SIDE: tl.constexpr):
    """Columns of chunk number `chunk` of a side, from 0: (begin, end)."""
    begin = chunk * width
    return begin, tl.minimum(begin + width, column(p_row, SIDE + col.N).to(tl.int32))


@triton.jit
def packed(i, j, RC: tl.constexpr):
    """Where element (i, j), i <= j, of a packed triangle is."""
    return (i * (2 * RC - i + 1)) // 2 + j - i


@triton.jit
def chunk_gram(area, chunk, RC: tl.constexpr, WIDE: tl.constexpr):
    """The address of a packed chunk Gram, float64 elements apart whatever it holds."""
    S_PAIR: tl.constexpr = 2 * RC * RC if WIDE == tl.float64 else RC * RC
    return area + S_PAIR + chunk * (RC * (RC + 1) // 2)


@triton.jit
def store_packed(p_gram, acc, RC: tl.constexpr, TC: tl.constexpr):
    i, j = tl.arange(0, RC)[:, None], tl.arange(0, RC)[None, :]
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    tl.store(p_gram.to(tl.pointer_type(TC)) + packed(low, high, RC), acc, mask=i <= j)


@triton.jit
def never_finite(x):
    return tl.where(tl.abs(x) < float("inf"), 0, 1)


@triton.jit
def store_bad(header, chunk, bad):
    """Whether an element of a chunk's gradient was not finite, from a block of never_finite."""
    tl.store(header + BAD + chunk, tl.max(tl.max(bad, 1), 0).to(tl.float64))


@triton.jit
def unit_trace(diagonal):
    """(what makes the trace 1, 0 where nothing does; the root of the trace, float64) of a Gram with this diagonal."""
    trace = tl.sum(diagonal, 0)
    norm = tl.sqrt(trace.to(tl.float64))
    usable = (norm > 0) & (norm < float("inf"))
    return tl.where(usable, 1.0 / tl.where(usable, trace, 1.0), 0.0), norm


@triton.jit
def block_gram(x, SIDE: tl.constexpr, TC: tl.constexpr):
    """`x @ x^T` on side A, `x^T @ x` on side B, of a block in TC."""
    if SIDE == col.A_SIDE:
        return tl.dot(x, tl.trans(x), input_precision="ieee", out_dtype=TC)
    else:
        return tl.dot(tl.trans(x), x, input_precision="ieee", out_dtype=TC)


@triton.jit
def accumulate(
    p_row, area, header, chunk, begin, end, r, code, SIDE: tl.constexpr, CHECK: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
    VECTOR: tl.constexpr, COLUMN: tl.constexpr = col.P,
):  # fmt: skip
    """The Gram of a chunk, its exponent, and for CHECK whether the gradient there is not finite.

    COLUMN: of what, P or G.
    """
    address, sr, sn = column(p_row, SIDE + COLUMN), column(p_row, SIDE + COLUMN + 1), column(p_row, SIDE + COLUMN + 2)
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    scale = tl.full((), 1.0, WIDE)
    sound = tl.full((), 1, tl.int32)
    exponent = tl.full((), 0, tl.int64)
    if SCALED:
        top = largest(address, sr, sn, r, begin, end, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
        sound = tl.where(top < float("inf"), 1, 0)
        bound = 1000 if WIDE == tl.float64 else 126
        exponent = tl.minimum(tl.maximum(exponent_of(tl.where(top < float("inf"), top, 1.0)), -bound), bound)
        exponent = tl.where(top > 0, exponent, -bound)
        scale = power_of_two(-exponent).to(WIDE)
    acc = tl.zeros([RC, RC], TC)
    # sums of blocks are added up: one chain over n loses a digit of S. A factor that the compiler does not know to be 1
    # keeps it from making a chain of them again
    one = tl.where(end > begin, 1.0, 0.0).to(TC)
    bad = block_zeros(SIDE, RC, BN, tl.int32)
    # the next block is on its way while this one is worked on
    x = load_columns(address, sr, sn, begin, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
    if CHECK:
        g = load_columns(p_g, g_sr, g_sn, begin, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
    for start in range(begin, end, BN):
        y = load_columns(address, sr, sn, start + BN, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
        if CHECK:
            bad = tl.maximum(bad, never_finite(g))
            g = load_columns(p_g, g_sr, g_sn, start + BN, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
        if SCALED:
            x = x * scale
        x = x.to(TC)
        acc += block_gram(x, SIDE, TC) * one
        x = y
    acc = tl.where(sound == 1, acc, float("nan"))
    store_packed(chunk_gram(area, chunk, RC, WIDE), acc, RC, TC)
    tl.store(header + EXPONENT + chunk, exponent.to(tl.float64))
    store_bad(header, chunk, bad)


@triton.jit
def search(
    p_row, header, chunk, begin, end, r, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Whether the gradient in a chunk is not finite, alone: its Gram has been carried."""
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    bad = block_zeros(SIDE, RC, BN, tl.int32)
    for start in range(begin, end, BN):
        g = load_columns(p_g, g_sr, g_sn, start, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
        bad = tl.maximum(bad, never_finite(g))
    store_bad(header, chunk, bad)


@triton.jit
def largest_exponent(header, first, last):
    top = tl.full((), -1000.0, tl.float64)
    for chunk in range(first, last):
        top = tl.maximum(top, tl.load(header + EXPONENT + chunk))
    return top.to(tl.int64)


@triton.jit
def sum_chunks(
    area, header, o, mask, first, last, exponent, RC: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Elements `o` of the packed Grams of chunks first to last, float64; nothing is read where masked."""
    acc = tl.load(chunk_gram(area, first, RC, WIDE).to(tl.pointer_type(TC)) + o, mask=mask).to(tl.float64)
    if SCALED:
        acc *= chunk_scale(header, first, exponent)
    for chunk in range(first + 1, last):
        x = tl.load(chunk_gram(area, chunk, RC, WIDE).to(tl.pointer_type(TC)) + o, mask=mask).to(tl.float64)
        if SCALED:
            x *= chunk_scale(header, chunk, exponent)
        acc += x
    return acc


@triton.jit
def chunk_scale(header, chunk, exponent):
    """What brings a chunk's Gram to the exponent of its side: at most 1."""
    shift = tl.load(header + EXPONENT + chunk).to(tl.int64) - exponent
    return power_of_two(tl.maximum(2 * shift, -1000))


@triton.jit
def reduce_chunks(
    area, header, chunks_a, chunks, RC: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """The Grams of both sides into SLOT_A and SLOT_B, over the chunk Grams.

    Returns (scale, norm, exponent) of A, then of B: what makes the trace 1, and `||.||_F = norm * 2^exponent`.
    """
    exponent_a, exponent_b = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if SCALED:
        exponent_a = largest_exponent(header, 0, chunks_a)
        exponent_b = largest_exponent(header, chunks_a, chunks)
    i = tl.arange(0, RC)
    diagonal = packed(i, i, RC)
    a = sum_chunks(area, header, diagonal, None, 0, chunks_a, exponent_a, RC, WIDE, TC, SCALED)
    b = sum_chunks(area, header, diagonal, None, chunks_a, chunks, exponent_b, RC, WIDE, TC, SCALED)
    scale_a, norm_a = unit_trace(a.to(TC))
    scale_b, norm_b = unit_trace(b.to(TC))
    if RC <= RESIDENT:
        sum_resident(area, header, chunks_a, chunks, exponent_a, exponent_b, RC, WIDE, TC, SCALED)
    else:
        sum_panels(area, header, chunks_a, chunks, exponent_a, exponent_b, RC, BM, WIDE, TC, SCALED)
    return scale_a, norm_a, exponent_a, scale_b, norm_b, exponent_b


@triton.jit
def sum_resident(
    area, header, chunks_a, chunks, exponent_a, exponent_b, RC: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Both Grams into SLOT_A and SLOT_B, over the chunk Grams, which have all been read by then."""
    i, j = tl.arange(0, RC)[:, None], tl.arange(0, RC)[None, :]
    o = packed(tl.minimum(i, j), tl.maximum(i, j), RC)
    a = sum_chunks(area, header, o, None, 0, chunks_a, exponent_a, RC, WIDE, TC, SCALED)
    b = sum_chunks(area, header, o, None, chunks_a, chunks, exponent_b, RC, WIDE, TC, SCALED)
    tl.debug_barrier()
    tl.store(slot(area, SLOT_A, RC, TC) + i * RC + j, a.to(TC))
    tl.store(slot(area, SLOT_B, RC, TC) + i * RC + j, b.to(TC))
    tl.debug_barrier()


@triton.jit
def sum_panels(
    area, header, chunks_a, chunks, exponent_a, exponent_b, RC: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
    TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """As `sum_resident`, of Grams that do not fit in registers. The diagonals have been read by all."""
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    # B's sum waits where the last chunk Gram is, out of the way of both slots
    p_last = chunk_gram(area, CHUNKS - 1, RC, WIDE).to(tl.pointer_type(TC))
    j = tl.arange(0, RC)[None, :]
    tl.debug_barrier()
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        o = packed(tl.minimum(i, j), tl.maximum(i, j), RC)
        a = sum_chunks(area, header, o, None, 0, chunks_a, exponent_a, RC, WIDE, TC, SCALED)
        tl.store(p_a + i * RC + j, a.to(TC))
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        o, mask = packed(i, j, RC), i <= j
        b = sum_chunks(area, header, o, mask, chunks_a, chunks, exponent_b, RC, WIDE, TC, SCALED)
        # a chunk Gram may lie there itself: an element is read by the thread that overwrites it, and by no other
        tl.store(p_last + o, b.to(TC), mask=mask)
    tl.debug_barrier()
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        b = tl.load(p_last + packed(tl.minimum(i, j), tl.maximum(i, j), RC))
        tl.store(p_b + i * RC + j, b)
    tl.debug_barrier()


@triton.jit
def any_bad(header, chunks):
    c = tl.arange(0, CHUNKS)
    return tl.max(tl.load(header + BAD + c, mask=c < chunks, other=0.0), 0) > 0
