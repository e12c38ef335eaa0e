"""The transposed frames P^T of a metric from the Grams of both factors; one program a row (reference.frames)."""

import triton
import triton.language as tl

from .. import table as col
from ..cholesky import factor
from ..dtypes import power_of_two
from ..solve import FACTOR_INVERSE, FACTOR_T, WHOLE, finish, multiply, polar_resident, product, read
from .chunks import OF_GRADIENTS, RUN, SQUARE_A, SQUARE_B, counts, packed, reduce_chunks, sum_chunks
from .gather import active, entry_of
from .mean import KAPPA_OF_RANK, decide, imbalance, of_present, polar_of_pair, ratio
from .pair import (
    GRADIENTS,
    SLOT_A,
    SLOT_B,
    SLOT_FRAME_A,
    SLOT_FRAME_B,
    SLOT_N,
    SLOT_X,
    SLOT_Y,
    WHITENING,
    column,
    report,
    slot,
)
from .settle import refuse

REFLORA, SCALED_METRIC, IDENTITY = (tl.constexpr(c) for c in range(3))
# the largest rank class whose matrices stay in registers from product to product
IN_REGISTERS = tl.constexpr(32)


@triton.jit
def finite_gradients(area, header, chunks_a, chunks, RC: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr):
    """Whether the traces of the gradients' chunk Grams are finite: then so is every element."""
    own = area + GRADIENTS * (RC * RC + RC)
    i = tl.arange(0, RC)
    total = sum_chunks(own, header, packed(i, i, RC), None, 0, chunks, 0, RC, WIDE, TC, False)
    return tl.sum(total, 0) < float("inf")


@triton.jit
def balanced(area, r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr):
    """`P^T = C^T La^-1` for B and `C^-1 La^T` for A, S being `P P^T` but for its scale, with `H = Q^T N = C C^T`.

    Returns 1 if H is positive definite, else 0.
    """
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    one = tl.full((), 1.0, tl.float64)
    if RC <= IN_REGISTERS:
        o = square(RC)
        h = polar_of_resident(p_a, p_b, r, RC, TC)
        tl.debug_barrier()
        tl.store(p_b + o, h)
        tl.debug_barrier()
        kappa = factor(p_b, one.to(TC), None, r, RC)
        of_b = product(read_whole(p_b, RC, FACTOR_T), read_whole(p_a, RC, FACTOR_INVERSE), TC)
        tl.store(slot(area, SLOT_FRAME_B, RC, TC) + o, of_b)
        of_a = product(read_whole(p_b, RC, FACTOR_INVERSE), read_whole(p_a, RC, FACTOR_T), TC)
        tl.store(slot(area, SLOT_FRAME_A, RC, TC) + o, of_a)
    else:
        p_x, p_y = slot(area, SLOT_X, RC, TC), slot(area, SLOT_Y, RC, TC)
        huge = tl.full((), 1.7976931348623157e308, tl.float64)
        polar_of_pair(area, r, RC, BM, BK, TC, True)
        multiply(p_y, p_x, WHOLE, True, slot(area, SLOT_N, RC, TC), WHOLE, False, r, RC, BM, BK, TC)
        tl.debug_barrier()
        finish(p_b, p_y, one, huge, True, RC, BM, TC)
        tl.debug_barrier()
        kappa = factor(p_b, one.to(TC), None, r, RC)
        multiply(slot(area, SLOT_FRAME_B, RC, TC), p_b, FACTOR_T, False, p_a, FACTOR_INVERSE, False, r, RC, BM, BK, TC)
        multiply(slot(area, SLOT_FRAME_A, RC, TC), p_b, FACTOR_INVERSE, False, p_a, FACTOR_T, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    return tl.where(kappa < float("inf"), 1, 0)


@triton.jit
def square(RC: tl.constexpr):
    """Offsets of the elements of a slot."""
    return tl.arange(0, RC)[:, None] * RC + tl.arange(0, RC)[None, :]


@triton.jit
def read_whole(p_slot, RC: tl.constexpr, KIND: tl.constexpr):
    return read(p_slot, tl.arange(0, RC)[:, None], tl.arange(0, RC)[None, :], RC, KIND)


@triton.jit
def polar_of_resident(p_a, p_b, r, RC: tl.constexpr, TC: tl.constexpr):
    """H of `N = Lb^T La = Q H`, from the packed factors."""
    n = product(read_whole(p_b, RC, FACTOR_T), tl.trans(read_whole(p_a, RC, FACTOR_T)), TC)
    y = product(read_whole(p_b, RC, FACTOR_INVERSE), tl.trans(read_whole(p_a, RC, FACTOR_INVERSE)), TC)
    h = product(tl.trans(polar_resident(n, y, r, RC, TC)), n, TC)
    return 0.5 * (h + tl.trans(h))


@triton.jit
def identity_frame(p_frame, r, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    j = tl.arange(0, RC)[None, :]
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        tl.store(p_frame + i * RC + j, tl.where((i == j) & (i < r), tl.full([BM, RC], 1.0, TC), 0.0))


@triton.jit
def inverse_root(
    p_gram, p_frame, scale, norm, n, r, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """`P^T = L^-1` of the Gram in a slot, over its trace; I where it has not full rank.

    Returns (condition estimate, 1 if it has full rank, what P P^T is multiplied by: 1 / norm^2, rank over that, or 1).
    """
    i = tl.arange(0, RC)
    diagonal = tl.load(p_gram + i * (RC + 1))
    usable = (norm > 0) & (norm < float("inf"))
    rank = tl.sum(tl.where((i < r) & (diagonal != 0), 1, 0), 0)
    kappa = tl.full((), float("inf"), tl.float64)
    if usable:
        if rank < r:
            # read by all before any of it is overwritten
            tl.debug_barrier()
            each = tl.zeros([RC], TC) + 1.0 / (rank.to(TC) * scale)
            tl.store(p_gram + i * (RC + 1), each, mask=(i < r) & (diagonal == 0))
        tl.debug_barrier()
        kappa = factor(p_gram, scale, None, r, RC)
        if rank < r:
            kappa = of_present(kappa, r, rank)
    kappa = tl.where(n < rank, float("inf"), kappa)
    most = tl.full((), KAPPA_MAX, tl.float64)
    if TC == tl.float32:
        most = tl.minimum(most, KAPPA_OF_RANK * tl.sqrt(rank.to(tl.float64)))
    sound = tl.where(usable & (kappa <= most), 1, 0)
    if sound == 1:
        j = tl.arange(0, RC)[None, :]
        for first in range(0, RC, BM):
            row = first + tl.arange(0, BM)[:, None]
            tl.store(p_frame + row * RC + j, read(p_gram, row, j, RC, FACTOR_INVERSE))
    else:
        identity_frame(p_frame, r, RC, BM, TC)
    tl.debug_barrier()
    size = tl.where(sound == 1, 1.0, rank.to(tl.float64)) / (norm * norm)
    return kappa, sound, tl.where(usable, size, 1.0)


@triton.jit
def settle_frames(
    p_row, area, header, width, r, code, METRIC: tl.constexpr, LATE: tl.constexpr, KAPPA_MAX: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Frames and what multiplies their squares. Returns (status, kappa_a, kappa_b, balance, c, norm_a, norm_b)."""
    chunks_a, chunks = counts(p_row, width)
    sound = True
    if not LATE:
        sound = finite_gradients(area, header + OF_GRADIENTS, chunks_a, chunks, RC, WIDE, TC)
    scale_a, norm_a, exponent_a, scale_b, norm_b, exponent_b = reduce_chunks(
        area, header, chunks_a, chunks, RC, BM, WIDE, TC, SCALED
    )
    c, useful = ratio(norm_a, exponent_a, norm_b, exponent_b, code)
    c = tl.where(useful, c, 1.0)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    kappa_a = tl.full((), float("nan"), tl.float64)
    kappa_b, balance = kappa_a, kappa_a
    status = tl.full((), col.SKIPPED, tl.int32)
    square_a, square_b = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
    if finite & sound:
        status = tl.full((), col.REFACTORED, tl.int32)
        if METRIC != IDENTITY:
            balance = imbalance(area, scale_a, norm_a, scale_b, norm_b, c, RC, BM, TC)
            p_of_a, p_of_b = slot(area, SLOT_FRAME_A, RC, TC), slot(area, SLOT_FRAME_B, RC, TC)
            apart = tl.full((), 1, tl.int32)
            if METRIC == REFLORA:
                apart = tl.where((norm_a > 0) & (norm_b > 0), 0, 1)
                if apart == 0:
                    status, kappa_a, kappa_b = decide(
                        p_row, area, r, scale_a, norm_a, scale_b, norm_b, useful, None, KAPPA_MAX, RC, TC
                    )
                    if status == col.REFACTORED:
                        if balanced(area, r, RC, BM, BK, TC) == 0:
                            status = tl.full((), col.DEGENERATE, tl.int32)
                    if status == col.DEGENERATE:
                        identity_frame(p_of_a, r, RC, BM, TC)
                        identity_frame(p_of_b, r, RC, BM, TC)
                    square_a, square_b = 1.0 / c, c
            if apart == 1:
                kappa_a, sound_a, square_b = inverse_root(
                    slot(area, SLOT_A, RC, TC), p_of_b, scale_a, norm_a * power_of_two(exponent_a),
                    column(p_row, col.A_SIDE + col.N), r, KAPPA_MAX, RC, BM, TC,
                )  # fmt: skip
                kappa_b, sound_b, square_a = inverse_root(
                    slot(area, SLOT_B, RC, TC), p_of_a, scale_b, norm_b * power_of_two(exponent_b),
                    column(p_row, col.B_SIDE + col.N), r, KAPPA_MAX, RC, BM, TC,
                )  # fmt: skip
                status = tl.where((sound_a == 1) & (sound_b == 1), col.REFACTORED, col.DEGENERATE)
    tl.store(header + SQUARE_A, square_a)
    tl.store(header + SQUARE_B, square_b)
    return (
        status, kappa_a, kappa_b, balance, c, norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
    )  # fmt: skip


@triton.jit
def frames_kernel(
    table, rows, headers, results, work, found_inf, METRIC: tl.constexpr, LATE: tl.constexpr, KAPPA_MAX: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Frames of a row into its workspace, and its report; arguments as gram_kernel's."""
    row, width, p_row, area, header, r, code = entry_of(
        tl.program_id(0), table, rows, headers, work, RC, WIDE, WHITENING
    )
    if active(p_row, found_inf):
        status, kappa_a, kappa_b, balance, c, norm_a, norm_b = settle_frames(
            p_row, area, header, width, r, code, METRIC, LATE, KAPPA_MAX, RC, BM, BK, WIDE, TC, SCALED
        )
        tl.store(header + RUN, tl.where(status == col.SKIPPED, 0.0, 1.0))
        report(results, row, status, kappa_a, kappa_b, balance, c, norm_a, norm_b)
    else:
        refuse(row, header, results)
