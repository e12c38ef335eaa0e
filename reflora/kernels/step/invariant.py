"""One fused step of InvariantAdamW of every row of a rank class, in four launches.

Over chunks, the Grams of factors and gradients; over rows, the frames of the metric; over sides, what whitens the
momentum; over chunks, the update.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ...constants import METRICS
from ...plan import Plan
from .. import routes
from .. import table as col
from ..options import float64_bits
from .adamw import unscaling
from .chunks import CARRIED, OF_GRADIENTS, RUN, accumulate, counts, span
from .frames import frames_kernel
from .gather import active, part
from .launch import constants_of, prepare, state_constants, taken
from .momentum import accumulate_mean, move
from .pair import GRADIENTS, WHITENING, column
from .second_moments import absorb_kernel, trace_before
from .whiten import whiten_kernel

if TYPE_CHECKING:
    from ...backends import InvariantStep


@triton.jit
def gather_side(
    p_row, area, header, hypers, unscale, chunk, own_chunk, width, r, code, SIDE: tl.constexpr, CARRY: tl.constexpr,
    MOMENTUM: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr,
    WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """own_chunk: the number of the chunk within its side. CARRY: what the step before has left is not read again."""
    begin, end = span(p_row, own_chunk, width, SIDE)
    own, of_gradients = area + GRADIENTS * (RC * RC + RC), header + OF_GRADIENTS
    factor, gradient = True, True
    if CARRY:
        factor = (column(p_row, col.KEPT) == 0) | (tl.load(header + CARRIED) == 0)
        gradient = trace_before(p_row, r, SIDE, RC) <= 0
    if factor:
        accumulate(
            p_row, area, header, chunk, begin, end, r, code, SIDE, False, RC, BN, DTYPE, WIDE, TC, SCALED, VECTOR
        )  # fmt: skip
    if gradient:
        if MOMENTUM:
            accumulate_mean(
                p_row, own, of_gradients, hypers, unscale, chunk, begin, end, r, code, SIDE, RC, BN, DTYPE, STATE, WIDE,
                TC, SCALED, VECTOR,
            )  # fmt: skip
        else:
            accumulate(
                p_row, own, of_gradients, chunk, begin, end, r, code, SIDE, False, RC, BN, DTYPE, WIDE, TC, SCALED,
                VECTOR, col.G,
            )  # fmt: skip


@triton.jit
def grams_kernel(
    table, items, headers, work, hypers, grad_scale, found_inf, CARRY: tl.constexpr, MOMENTUM: tl.constexpr,
    RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per chunk: the Grams of factor and gradient there; arguments as gram_kernel's."""
    _, chunk, _, width, p_row, area, header, r, code = part(table, items, headers, work, RC, WIDE, WHITENING)
    chunks_a, _ = counts(p_row, width)
    if active(p_row, found_inf):
        unscale = unscaling(grad_scale)
        if chunk < chunks_a:
            gather_side(
                p_row, area, header, hypers, unscale, chunk, chunk, width, r, code, col.A_SIDE, CARRY, MOMENTUM, RC, BN,
                DTYPE, STATE, WIDE, TC, SCALED, VECTOR,
            )  # fmt: skip
        else:
            gather_side(
                p_row, area, header, hypers, unscale, chunk, chunk - chunks_a, width, r, code, col.B_SIDE, CARRY,
                MOMENTUM, RC, BN, DTYPE, STATE, WIDE, TC, SCALED, VECTOR,
            )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def move_kernel(
    table, items, headers, work, hypers, grad_scale, seed, MASTER: tl.constexpr, CARRY: tl.constexpr,
    MOMENTUM: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr,
    WIDE: tl.constexpr, TC: tl.constexpr, TENSOR: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per chunk: its update, and for CARRY the Grams that it leaves."""
    _, chunk, _, width, p_row, area, header, r, code = part(table, items, headers, work, RC, WIDE, WHITENING)
    chunks_a, _ = counts(p_row, width)
    if tl.load(header + RUN) != 0:
        unscale = unscaling(grad_scale)
        if chunk < chunks_a:
            begin, end = span(p_row, chunk, width, col.A_SIDE)
            move(
                p_row, area, header, hypers, unscale, seed, chunk, begin, end, r, code, col.A_SIDE, MASTER, CARRY,
                MOMENTUM, RC, BN, DTYPE, STATE, WIDE, TC, TENSOR, VECTOR,
            )  # fmt: skip
        else:
            begin, end = span(p_row, chunk - chunks_a, width, col.B_SIDE)
            move(
                p_row, area, header, hypers, unscale, seed, chunk, begin, end, r, code, col.B_SIDE, MASTER, CARRY,
                MOMENTUM, RC, BN, DTYPE, STATE, WIDE, TC, TENSOR, VECTOR,
            )  # fmt: skip
        if CARRY:
            if chunk == 0:
                tl.store(header + CARRIED, 1.0)


def invariant(plan: Plan, step: "InvariantStep", results: Tensor) -> None:
    """Every row of r <= 128; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table, hypers = prepared.table(plan.table), prepared.hypers(step.hypers)
    kinds = {"METRIC": METRICS.index(step.metric), "MOMENTUM": step.moments == "momentum", "LATE": step.late}
    for group in prepared.groups:
        if group.step_route(step.precision) == routes.TORCH:
            continue
        constants = {**constants_of(plan, group, step.precision), **state_constants(group, step.precision), **kinds}
        # a scale that follows from the updated columns is known only after them
        carry = constants["CARRY"] = step.late and group.carries and not constants["SCALED"]
        rows, items, work = group.entries, group.items, group.whitening
        own = group.both_grams_options(step.precision, carry)
        gathering = taken(grams_kernel, {**constants, "BN": own.pop("BN")})
        grams_kernel[(len(items),)](
            table, items, group.headers, work, hypers, step.grad_scale, step.found_inf, **gathering, **own
        )
        frames_kernel[(len(rows),)](
            table, rows, group.headers, results, work, step.found_inf, **taken(frames_kernel, constants),
            **group.whiten_options,
        )  # fmt: skip
        whiten_kernel[(2 * len(rows),)](
            table, rows, group.headers, results, work, hypers, step.grad_scale, float64_bits(step.damping),
            **taken(whiten_kernel, constants), **group.whiten_options,
        )  # fmt: skip
        own = group.move_options(step.precision, carry, constants["VECTOR"])
        more = {"BN": own.pop("BN"), "TENSOR": group.tensor_cores(step.precision)}
        moving = taken(move_kernel, {**constants, **more})
        move_kernel[(len(items),)](
            table, items, group.headers, work, hypers, step.grad_scale, step.seed, **moving, **own
        )
        if carry:
            absorb_kernel[(2 * len(rows),)](
                table, rows, group.headers, results, work, hypers, step.grad_scale, **taken(absorb_kernel, constants),
                **group.whiten_options,
            )  # fmt: skip
