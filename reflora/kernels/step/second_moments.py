"""The second moments of one side of a row, `[r, r]` float64: what they were, and what a step makes of them."""

import triton
import triton.language as tl

from .. import table as col
from ..dtypes import bounded, power_of_two
from .adamw import unscaling
from .chunks import (
    AWAITED_A,
    AWAITED_B,
    COUNT_A,
    COUNT_B,
    OF_GRADIENTS,
    RUN,
    counts,
    largest_exponent,
    packed,
    sum_chunks,
)
from .gather import entry_of
from .pair import GRADIENTS, WHITENING, column
from .settle import step_terms


@triton.jit
def moments_at(p_row, SIDE: tl.constexpr):
    return column(p_row, SIDE + col.V).to(tl.pointer_type(tl.float64))


@triton.jit
def kept(p_v, o, mask):
    """Elements of the second moments before the step."""
    return bounded(tl.load(p_v + o, mask=mask, other=0.0), tl.full((), 1.7976931348623157e308, tl.float64))


@triton.jit
def trace_before(p_row, r, SIDE: tl.constexpr, RC: tl.constexpr):
    """The trace of the second moments before the step, float64: 0 if they tell nothing."""
    i = tl.arange(0, RC)
    return tl.sum(kept(moments_at(p_row, SIDE), i * (r + 1), i < r), 0)


@triton.jit
def chunks_of(p_row, width, ON_A: tl.constexpr):
    """(first, one past the last) of a side's chunks."""
    chunks_a, chunks = counts(p_row, width)
    first, last = chunks_a * 0, chunks_a
    if not ON_A:
        first, last = chunks_a, chunks
    return first, last


@triton.jit
def weights_of(p_row, hypers, unscale, count, SIDE: tl.constexpr, MOMENTUM: tl.constexpr):
    """What the Gram of step number `count` and the second moments before it are multiplied by, float64.

    Third, what the latter are where the step takes no part in them: they stay as they are without bias.
    """
    _, beta1, beta2, _, _ = step_terms(p_row, hypers, SIDE)
    n = column(p_row, SIDE + col.N).to(tl.float64)
    by, keep = (1.0 - beta2) * unscale * unscale / n, beta2
    bias, before = 1.0 - tl.exp(count * tl.log(beta2)), 1.0 - tl.exp((count - 1.0) * tl.log(beta2))
    hold = tl.where(count > 1.0, bias / tl.where(count > 1.0, before, 1.0), 1.0)
    if MOMENTUM:
        bias = 1.0 - tl.exp(count * tl.log(beta1))
        by, keep = 1.0 / (n * bias * bias), tl.full((), 0.0, tl.float64)
        hold = tl.full((), 1.0, tl.float64)
    return by, keep, hold


@triton.jit
def store_over_trace(p_v, p_work, r, trace, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """The second moments at p_v over their trace, into a slot."""
    usable = (trace > 0) & (trace < float("inf"))
    inverse = tl.where(usable, 1.0 / tl.where(usable, trace, 1.0), 0.0)
    j = tl.arange(0, RC)[None, :]
    for start in range(0, RC, BM):
        i = start + tl.arange(0, BM)[:, None]
        V = kept(p_v, i * r + j, (i < r) & (j < r))
        tl.store(p_work + i * RC + j, (V * inverse).to(TC))
    tl.debug_barrier()


@triton.jit
def absorb(
    p_v, area, header, first, last, by, keep, hold, r, RC: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr,
    TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The second moments at p_v take in the Gram of chunks first to last, if that is finite. Returns 1 if it is."""
    own, of_gradients = area + GRADIENTS * (RC * RC + RC), header + OF_GRADIENTS
    exponent = tl.full((), 0, tl.int64)
    if SCALED:
        exponent = largest_exponent(of_gradients, first, last)
        by = by * power_of_two(exponent) * power_of_two(exponent)
    k = tl.arange(0, RC)
    diagonal = sum_chunks(own, of_gradients, packed(k, k, RC), None, first, last, exponent, RC, WIDE, TC, SCALED)
    sound = tl.where(tl.sum(diagonal, 0) < float("inf"), 1, 0)
    keep = tl.where(sound == 1, keep, hold)
    j = tl.arange(0, RC)[None, :]
    for start in range(0, RC, BM):
        i = start + tl.arange(0, BM)[:, None]
        mask = (i < r) & (j < r)
        o = packed(tl.minimum(i, j), tl.maximum(i, j), RC)
        G = sum_chunks(own, of_gradients, o, None, first, last, exponent, RC, WIDE, TC, SCALED)
        V = keep * kept(p_v, i * r + j, mask) + tl.where(sound == 1, G * by, 0.0)
        tl.store(p_v + i * r + j, V, mask=mask)
    tl.debug_barrier()
    return sound


@triton.jit
def absorb_side(
    p_row, row, area, header, results, hypers, unscale, width, r, SIDE: tl.constexpr, MOMENTUM: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    ON_A: tl.constexpr = SIDE == col.A_SIDE
    if tl.load(header + (AWAITED_A if ON_A else AWAITED_B)) != 0:
        first, last = chunks_of(p_row, width, ON_A)
        count = tl.load(header + (COUNT_A if ON_A else COUNT_B))
        by, keep, hold = weights_of(p_row, hypers, unscale, count, SIDE, MOMENTUM)
        p_v = moments_at(p_row, SIDE)
        if absorb(p_v, area, header, first, last, by, keep, hold, r, RC, BM, WIDE, TC, False) == 0:
            tell_skipped(results, row)


@triton.jit
def tell_skipped(results, row):
    # both sides' programs may say so at once
    tl.atomic_xchg(results + row.to(tl.int64) * col.RESULTS + col.STATUS, tl.full((), col.SKIPPED, tl.float64))


@triton.jit
def absorb_kernel(
    table, rows, headers, results, work, hypers, grad_scale, MOMENTUM: tl.constexpr, RC: tl.constexpr,
    BM: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """After an update that has left Grams: two programs a row, one a side; arguments as gram_kernel's."""
    program = tl.program_id(0)
    row, width, p_row, area, header, r, _ = entry_of(program // 2, table, rows, headers, work, RC, WIDE, WHITENING)
    unscale = unscaling(grad_scale)
    if tl.load(header + RUN) != 0:
        if program % 2 == 0:
            absorb_side(
                p_row, row, area, header, results, hypers, unscale, width, r, col.A_SIDE, MOMENTUM, RC, BM, WIDE, TC
            )  # fmt: skip
        else:
            absorb_side(
                p_row, row, area, header, results, hypers, unscale, width, r, col.B_SIDE, MOMENTUM, RC, BM, WIDE, TC
            )  # fmt: skip
