"""Second moments of one side of a row and what they whiten its momentum with; two programs a row."""

import triton
import triton.language as tl

from .. import table as col
from ..cholesky import factor
from ..dtypes import normal_range
from ..solve import FACTOR_INVERSE, FACTOR_T, WHOLE, finish, multiply, polar_factor, polar_resident, product, read
from .adamw import unscaling
from .chunks import (
    AWAITED_A,
    AWAITED_B,
    COUNT_A,
    COUNT_B,
    DECAY_A,
    DECAY_B,
    RUN,
    SQUARE_A,
    SQUARE_B,
    STEP_SIZE_A,
    STEP_SIZE_B,
)
from .frames import IDENTITY, IN_REGISTERS, identity_frame, read_whole, square
from .gather import entry_of
from .mean import keep, mixer
from .pair import SLOT_FRAME_A, SLOT_FRAME_B, WHITENING, WORK_A, WORK_B, column, slot
from .second_moments import (
    absorb,
    chunks_of,
    moments_at,
    store_over_trace,
    tell_skipped,
    trace_before,
    weights_of,
)
from .settle import scalars_of, step_terms


@triton.jit
def second_moments(
    p_row, row, area, header, results, hypers, unscale, p_work, width, r, SIDE: tl.constexpr, LATE: tl.constexpr,
    CARRY: tl.constexpr, MOMENTUM: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
    TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What whitens, over its trace, into a slot. Returns the trace, without bias, float64.

    LATE: that is what the step before has left, where it has left anything. CARRY: this step takes part afterwards.
    """
    ON_A: tl.constexpr = SIDE == col.A_SIDE
    p_v = moments_at(p_row, SIDE)
    first, last = chunks_of(p_row, width, ON_A)
    _, _, beta2, _, count = step_terms(p_row, hypers, SIDE)
    by, keep, hold = weights_of(p_row, hypers, unscale, count, SIDE, MOMENTUM)
    trace = trace_before(p_row, r, SIDE, RC)
    before = trace > 0
    if not LATE:
        before = False
    awaited = tl.full((), 0.0, tl.float64)
    if before:
        count -= 1
        store_over_trace(p_v, p_work, r, trace, RC, BM, TC)
        if CARRY:
            awaited += 1.0
        else:
            if absorb(p_v, area, header, first, last, by, keep, hold, r, RC, BM, WIDE, TC, SCALED) == 0:
                tell_skipped(results, row)
    else:
        if absorb(p_v, area, header, first, last, by, keep, hold, r, RC, BM, WIDE, TC, SCALED) == 1:
            trace = trace_before(p_row, r, SIDE, RC)
        else:
            trace = tl.zeros_like(trace)
            tell_skipped(results, row)
        store_over_trace(p_v, p_work, r, trace, RC, BM, TC)
    tl.store(header + (AWAITED_A if ON_A else AWAITED_B), awaited)
    if MOMENTUM:
        return trace
    else:
        return trace / (1.0 - tl.exp(count * tl.log(beta2)))


@triton.jit
def trace_of(p_slot, RC: tl.constexpr):
    i = tl.arange(0, RC)
    return tl.sum(tl.load(p_slot + i * (RC + 1)), 0).to(tl.float64)


@triton.jit
def into_frame(
    p_frame, p_1, p_2, p_3, r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """`P^T V P` of V in the first slot, which it takes."""
    if RC <= IN_REGISTERS:
        P = tl.load(p_frame + square(RC))
        C = product(product(P, tl.load(p_1 + square(RC)), TC), tl.trans(P), TC)
        tl.debug_barrier()
        tl.store(p_1 + square(RC), 0.5 * (C + tl.trans(C)))
    else:
        one = tl.full((), 1.0, tl.float64)
        huge = tl.full((), 1.7976931348623157e308, tl.float64)
        multiply(p_2, p_frame, WHOLE, False, p_1, WHOLE, False, r, RC, BM, BK, TC)
        tl.debug_barrier()
        multiply(p_3, p_2, WHOLE, False, p_frame, WHOLE, True, r, RC, BM, BK, TC)
        tl.debug_barrier()
        finish(p_1, p_3, one, huge, True, RC, BM, TC)
    tl.debug_barrier()


@triton.jit
def inverse_square_root(
    p_1, p_2, p_3, scale, shift, r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """`(scale C + shift I)^(-1/2)` of C in the first slot into the third; I where that is not positive definite."""
    kappa = factor(p_1, scale, shift, r, RC)
    j = tl.arange(0, RC)[None, :]
    if kappa < float("inf"):
        # L^T = Q H gives H^-1 = Q^T L^-1
        for first in range(0, RC, BM):
            i = first + tl.arange(0, BM)[:, None]
            tl.store(p_2 + i * RC + j, read(p_1, i, j, RC, FACTOR_T))
            tl.store(p_3 + i * RC + j, read(p_1, i, j, RC, FACTOR_INVERSE))
        tl.debug_barrier()
        polar_factor(p_2, p_3, r, RC, BM, BK, TC)
        tl.debug_barrier()
        multiply(p_3, p_2, WHOLE, True, p_1, FACTOR_INVERSE, False, r, RC, BM, BK, TC)
    else:
        identity_frame(p_3, r, RC, BM, TC)
    tl.debug_barrier()


@triton.jit
def whiten_resident(
    p_1, p_frame, p_out, scale, shift, by, limit, r, METRIC: tl.constexpr, RC: tl.constexpr, WIDE: tl.constexpr,
    TC: tl.constexpr,
):  # fmt: skip
    """As `keep`, of `P (scale C + shift I)^(-1/2) P^T` for C in the first slot; I stands in for a root that is not."""
    kappa = factor(p_1, scale, shift, r, RC)
    i, j = tl.arange(0, RC)[:, None], tl.arange(0, RC)[None, :]
    K = tl.where((i == j) & (i < r), tl.full([RC, RC], 1.0, TC), 0.0)
    if kappa < float("inf"):
        inverse = read_whole(p_1, RC, FACTOR_INVERSE)
        K = product(tl.trans(polar_resident(read_whole(p_1, RC, FACTOR_T), inverse, r, RC, TC)), inverse, TC)
    if METRIC != IDENTITY:
        P = tl.load(p_frame + square(RC))
        K = product(tl.trans(P), product(K, P, TC), TC)
    return keep(p_out, K, by, limit, RC, WIDE)


@triton.jit
def whiten_panels(
    p_1, p_2, p_3, p_frame, p_out, scale, shift, by, limit, r, METRIC: tl.constexpr, RC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """As `whiten_resident`, of matrices that do not fit in registers."""
    inverse_square_root(p_1, p_2, p_3, scale, shift, r, RC, BM, BK, TC)
    p_last = p_3
    if METRIC != IDENTITY:
        multiply(p_2, p_3, WHOLE, False, p_frame, WHOLE, False, r, RC, BM, BK, TC)
        tl.debug_barrier()
        multiply(p_1, p_frame, WHOLE, True, p_2, WHOLE, False, r, RC, BM, BK, TC)
        tl.debug_barrier()
        p_last = p_1
    return finish(p_out, p_last, by, limit, True, RC, BM, WIDE)


@triton.jit
def whiten_side(
    p_row, row, area, header, results, hypers, unscale, damping, width, r, code, SIDE: tl.constexpr,
    METRIC: tl.constexpr, LATE: tl.constexpr, CARRY: tl.constexpr, MOMENTUM: tl.constexpr, RC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """K of a side to where `mixer` finds it, its second moments, step count and scalars (reference.whitener)."""
    ON_A: tl.constexpr = SIDE == col.A_SIDE
    p_frame = slot(area, SLOT_FRAME_A if ON_A else SLOT_FRAME_B, RC, TC)
    WORK: tl.constexpr = WORK_A if ON_A else WORK_B
    p_1, p_2, p_3 = slot(area, WORK, RC, TC), slot(area, WORK + 1, RC, TC), slot(area, WORK + 2, RC, TC)
    lr, beta1, beta2, weight_decay, count = step_terms(p_row, hypers, SIDE)
    eps = tl.load(hypers + column(p_row, SIDE + col.HYPER) * col.HYPERS + col.EPS)
    step_size, _, decay, count = scalars_of(lr, beta1, beta2, weight_decay, count)
    trace = second_moments(
        p_row, row, area, header, results, hypers, unscale, p_1, width, r, SIDE, LATE, CARRY, MOMENTUM, RC, BM, WIDE,
        TC, SCALED,
    )  # fmt: skip
    if METRIC != IDENTITY:
        into_frame(p_frame, p_1, p_2, p_3, r, RC, BM, BK, TC)
    size_of_frame = tl.load(header + (SQUARE_A if ON_A else SQUARE_B))
    size = trace * size_of_frame
    mean = size * trace_of(p_1, RC) / r
    whole = mean + eps * eps
    useful = (mean > 0) & (whole < float("inf"))
    tl.debug_barrier()
    whole = tl.where(useful, whole, 1.0)
    scale, shift = tl.where(useful, size / whole, 0.0), tl.where(useful, (damping * mean + eps * eps) / whole, 1.0)
    tiny, huge = normal_range(code)
    by = tl.where(useful, size_of_frame / tl.sqrt(whole), 0.0)
    p_out = mixer(area, ON_A, RC, WIDE)
    if RC <= IN_REGISTERS:
        fits = whiten_resident(p_1, p_frame, p_out, scale.to(TC), shift.to(TC), by, huge, r, METRIC, RC, WIDE, TC)
    else:
        fits = whiten_panels(
            p_1, p_2, p_3, p_frame, p_out, scale.to(TC), shift.to(TC), by, huge, r, METRIC, RC, BM, BK, WIDE, TC
        )  # fmt: skip
    if fits == 0:
        tl.debug_barrier()
        zero = tl.full((), 0.0, tl.float64)
        j = tl.arange(0, RC)[None, :]
        for start in range(0, RC, BM):
            i = start + tl.arange(0, BM)[:, None]
            tl.store(p_out + i * RC + j, tl.zeros([BM, RC], WIDE) + zero.to(WIDE))
    tl.store(header + (STEP_SIZE_A if ON_A else STEP_SIZE_B), step_size)
    tl.store(header + (DECAY_A if ON_A else DECAY_B), decay)
    tl.store(header + (COUNT_A if ON_A else COUNT_B), count)
    tl.store(column(p_row, SIDE + col.STEP).to(tl.pointer_type(tl.float32)), count.to(tl.float32))


@triton.jit(do_not_specialize=["damping_bits"])
def whiten_kernel(
    table, rows, headers, results, work, hypers, grad_scale, damping_bits: tl.int64, METRIC: tl.constexpr,
    LATE: tl.constexpr, CARRY: tl.constexpr, MOMENTUM: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One program a side of a row; arguments as gram_kernel's."""
    program = tl.program_id(0)
    row, width, p_row, area, header, r, code = entry_of(program // 2, table, rows, headers, work, RC, WIDE, WHITENING)
    unscale = unscaling(grad_scale)
    if tl.load(header + RUN) != 0:
        d = damping_bits.to(tl.int64).to(tl.float64, bitcast=True)
        if program % 2 == 0:
            whiten_side(
                p_row, row, area, header, results, hypers, unscale, d, width, r, code, col.A_SIDE, METRIC, LATE, CARRY,
                MOMENTUM, RC, BM, BK, WIDE, TC, SCALED,
            )  # fmt: skip
        else:
            whiten_side(
                p_row, row, area, header, results, hypers, unscale, d, width, r, code, col.B_SIDE, METRIC, LATE, CARRY,
                MOMENTUM, RC, BM, BK, WIDE, TC, SCALED,
            )  # fmt: skip
