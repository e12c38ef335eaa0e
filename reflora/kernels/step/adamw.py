"""One fused RefLoRA-AdamW step of every row of a rank class, by either of two routes.

"split": a launch over chunks of rows for their Grams, and one over chunks that updates. Between them S is solved for:
in classes whose solve is short by the last chunk of a row to arrive, in the others by a launch of its own, over rows,
so that it does not set how many programs stream. "row": one launch, one program per row. All give the same bits.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ...columns import AMSGRAD as AMSGRAD_COLUMN
from ...plan import Plan
from .. import routes
from .. import table as col
from ..options import float64_bits
from .chunks import CARRIED, MOVE, RUN, accumulate, counts, span
from .gather import active, entry, gather, gram_kernel, part
from .launch import constants_of, prepare, state_constants, taken
from .pair import column
from .settle import refuse, settle
from .update import update

if TYPE_CHECKING:
    from ...backends import AdamWStep


@triton.jit
def unscaling(grad_scale):
    unscale = tl.full((), 1.0, tl.float64)
    if grad_scale is not None:
        unscale = 1.0 / tl.load(grad_scale).to(tl.float64)
    return unscale


@triton.jit
def spread_side(
    p_row, area, header, hypers, unscale, move, seed, chunk, own_chunk, width, r, code, SIDE: tl.constexpr,
    AMSGRAD: tl.constexpr, MASTER: tl.constexpr, CARRY: tl.constexpr, SCALED: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """move: what the moments of this side are multiplied by."""
    state = column(p_row, col.STATE).to(tl.int32)
    # a scale that follows from the updated columns is known only after them
    FUSED: tl.constexpr = CARRY and not SCALED
    begin, end = span(p_row, own_chunk, width, SIDE)
    update(
        p_row, area, header, hypers, unscale, move, seed, chunk, begin, end, r, code, state, SIDE, AMSGRAD, MASTER,
        FUSED, RC, BN, DTYPE, STATE, WIDE, TC, VECTOR,
    )  # fmt: skip
    if CARRY and SCALED:
        tl.debug_barrier()
        accumulate(
            p_row, area, header, chunk, begin, end, r, code, SIDE, False, RC, BN, DTYPE, WIDE, TC, SCALED, VECTOR
        )


@triton.jit
def spread(
    p_row, area, header, hypers, unscale, seed, chunk, chunks_a, width, r, code, AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr, CARRY: tl.constexpr, SCALED: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The update of a chunk, and for CARRY the Gram that it leaves."""
    move = tl.load(header + MOVE)
    if chunk < chunks_a:
        spread_side(
            p_row, area, header, hypers, unscale, move, seed, chunk, chunk, width, r, code, col.A_SIDE, AMSGRAD,
            MASTER, CARRY, SCALED, RC, BN, DTYPE, STATE, WIDE, TC, VECTOR,
        )  # fmt: skip
    else:
        spread_side(
            p_row, area, header, hypers, unscale, 1.0 / move, seed, chunk, chunk - chunks_a, width, r, code,
            col.B_SIDE, AMSGRAD, MASTER, CARRY, SCALED, RC, BN, DTYPE, STATE, WIDE, TC, VECTOR,
        )  # fmt: skip
    if CARRY:
        if chunk == 0:
            tl.store(header + CARRIED, 1.0)


@triton.jit(do_not_specialize=["warmup", "start", "interval", "reg_bits"])
def settle_kernel(
    table, rows, headers, results, work, hypers, found_inf, warmup, start, interval, reg_bits,
    SCHEDULED: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Between both launches of the split route, one program per row; arguments as gram_kernel's."""
    row, width, p_row, area, header, r, code = entry(table, rows, headers, work, RC, WIDE)
    if active(p_row, found_inf):
        settle(
            p_row, row, area, header, results, hypers, width, r, code, warmup, start, interval, reg_bits, SCHEDULED,
            KAPPA_MAX, RC, BM, BK, WIDE, TC, SCALED,
        )  # fmt: skip
    else:
        refuse(row, header, results)


@triton.jit(do_not_specialize=["seed"])
def update_kernel(
    table, items, headers, work, hypers, grad_scale, seed, AMSGRAD: tl.constexpr, MASTER: tl.constexpr,
    CARRY: tl.constexpr, SCALED: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Last launch of the split route, one program per chunk."""
    _, chunk, _, width, p_row, area, header, r, code = part(table, items, headers, work, RC, WIDE)
    chunks_a, _ = counts(p_row, width)
    if tl.load(header + RUN) != 0:
        spread(
            p_row, area, header, hypers, unscaling(grad_scale), seed, chunk, chunks_a, width, r, code, AMSGRAD, MASTER,
            CARRY, SCALED, RC, BN, DTYPE, STATE, WIDE, TC, VECTOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["warmup", "start", "interval", "reg_bits", "seed"])
def row_kernel(
    table, rows, headers, results, work, hypers, grad_scale, found_inf, seed, warmup, start, interval, reg_bits,
    SCHEDULED: tl.constexpr, CARRY: tl.constexpr, CHECK: tl.constexpr, AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The row route: one program does what all launches of the split route do for a row."""
    row, width, p_row, area, header, r, code = entry(table, rows, headers, work, RC, WIDE)
    chunks_a, chunks = counts(p_row, width)
    if active(p_row, found_inf):
        for chunk in range(0, chunks):
            gather(
                p_row, area, header, chunk, chunks_a, width, r, code, CARRY, CHECK, SCALED, RC, BN, DTYPE, WIDE, TC,
                VECTOR,
            )  # fmt: skip
        tl.debug_barrier()
        settle(
            p_row, row, area, header, results, hypers, width, r, code, warmup, start, interval, reg_bits, SCHEDULED,
            KAPPA_MAX, RC, BM, BK, WIDE, TC, SCALED,
        )  # fmt: skip
        tl.debug_barrier()
        if tl.load(header + RUN) != 0:
            for chunk in range(0, chunks):
                spread(
                    p_row, area, header, hypers, unscaling(grad_scale), seed, chunk, chunks_a, width, r, code, AMSGRAD,
                    MASTER, CARRY, SCALED, RC, BN, DTYPE, STATE, WIDE, TC, VECTOR,
                )  # fmt: skip
    else:
        refuse(row, header, results)


def adamw(plan: Plan, step: "AdamWStep", results: Tensor) -> None:
    """Every row of r <= 128; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table, hypers = prepared.table(plan.table), prepared.hypers(step.hypers)
    amsgrad = bool(step.hypers[:, AMSGRAD_COLUMN].any())
    reg = float64_bits(step.reg) if step.reg else None
    for group in prepared.groups:
        solve, carry = constants_of(plan, group, step.precision), step.carry and group.carries
        schedule = {"SCHEDULED": step.warmup_steps > 0 or step.keep, "CARRY": carry, "CHECK": step.check}
        storage = {"AMSGRAD": amsgrad, **state_constants(group, step.precision)}
        if group.step_route(step.precision) == routes.TORCH:
            continue
        if group.step_route(step.precision) == routes.ROW:
            row_kernel[(len(group.rows),)](
                table, group.entries, group.headers, results, group.workspace, hypers, step.grad_scale,
                step.found_inf, step.seed, step.warmup_steps, step.start, step.interval, reg, **schedule, **storage,
                **solve, **group.options,
            )  # fmt: skip
            continue
        gram_kernel[(len(group.items),)](
            table, group.items, group.headers, group.arrivals, results, group.workspace, hypers, step.found_inf,
            step.warmup_steps, step.start, step.interval, reg, APART=group.apart, **schedule, **solve,
            **group.gram_options,
        )  # fmt: skip
        if group.apart:
            settle_kernel[(len(group.rows),)](
                table, group.entries, group.headers, results, group.workspace, hypers, step.found_inf,
                step.warmup_steps, step.start, step.interval, reg,
                **taken(settle_kernel, {**schedule, **solve}), **group.options,
            )  # fmt: skip
        own = group.update_options(carry, solve["VECTOR"])
        constants = taken(update_kernel, {**solve, **storage, "BN": own.pop("BN"), "CARRY": carry})
        update_kernel[(len(group.items),)](
            table, group.items, group.headers, group.workspace, hypers, step.grad_scale, step.seed, **constants, **own,
        )  # fmt: skip
