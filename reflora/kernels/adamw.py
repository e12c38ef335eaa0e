"""One fused RefLoRA-AdamW step of every row of a rank class, by either of two routes.

"split": a launch over chunks of rows for their Grams, and one over chunks that updates. Between them S is solved for:
in classes whose solve is short by the last chunk of a row to arrive, in the others by a launch of its own, over rows,
so that it does not set how many programs stream. "row": one launch, one program a row. All give the same bits.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ..plan import AMSGRAD as AMSGRAD_COLUMN
from ..plan import Plan
from . import routes
from . import table as col
from .chunks import CARRIED, HEADER, MOVE, RUN, accumulate, counts, search, span
from .launch import aligned, prepare, solve_constants, state_constants
from .pair import area_of, column
from .settle import refuse, settle
from .update import update

if TYPE_CHECKING:
    from ..backends import AdamWStep


@triton.jit
def entry(table, rows, widths, headers, work, index, RC: tl.constexpr, WIDE: tl.constexpr):
    """Of entry `index` of a launch: number and address of its row, width of a chunk, workspace, header, rank, storage.

    rows int32 `[rows]`: their numbers in the table; widths int32 `[rows]`; headers float64 `[rows, HEADER]`.
    """
    row, width = tl.load(rows + index), tl.load(widths + index)
    p_row = table + row.to(tl.int64) * col.COLUMNS
    area, header = area_of(work, index, RC, WIDE), headers + index.to(tl.int64) * HEADER
    r, code = column(p_row, col.R).to(tl.int32), column(p_row, col.DTYPE).to(tl.int32)
    return row, width, p_row, area, header, r, code


@triton.jit
def active(p_row, found_inf):
    run = column(p_row, col.ACTIVE) != 0
    if found_inf is not None:
        run = run & (tl.load(found_inf) == 0)
    return run


@triton.jit
def unscaling(grad_scale):
    unscale = tl.full((), 1.0, tl.float64)
    if grad_scale is not None:
        unscale = 1.0 / tl.load(grad_scale).to(tl.float64)
    return unscale


@triton.jit
def gather_side(
    p_row, area, header, carried, chunk, own_chunk, width, r, code, SIDE: tl.constexpr, CHECK: tl.constexpr,
    SCALED: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """own_chunk: the number of the chunk within its side."""
    begin, end = span(p_row, own_chunk, width, SIDE)
    if carried:
        if CHECK:
            search(p_row, header, chunk, begin, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
    else:
        accumulate(
            p_row, area, header, chunk, begin, end, r, code, SIDE, CHECK, RC, BN, DTYPE, WIDE, TC, SCALED, VECTOR
        )


@triton.jit
def gather(
    p_row, area, header, chunk, chunks_a, width, r, code, CARRY: tl.constexpr, CHECK: tl.constexpr,
    SCALED: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """What the solve needs of a chunk: its Gram, unless that was carried, and whether its gradient is finite."""
    carried = False
    if CARRY:
        carried = (column(p_row, col.KEPT) != 0) & (tl.load(header + CARRIED) != 0)
    if chunk < chunks_a:
        gather_side(
            p_row, area, header, carried, chunk, chunk, width, r, code, col.A_SIDE, CHECK, SCALED, RC, BN, DTYPE, WIDE,
            TC, VECTOR,
        )  # fmt: skip
    else:
        gather_side(
            p_row, area, header, carried, chunk, chunk - chunks_a, width, r, code, col.B_SIDE, CHECK, SCALED, RC, BN,
            DTYPE, WIDE, TC, VECTOR,
        )  # fmt: skip


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


@triton.jit(do_not_specialize=["warmup", "start", "interval"])
def gram_kernel(
    table, rows, items, widths, headers, arrivals, results, work, hypers, found_inf, warmup, start, interval,
    APART: tl.constexpr, SCHEDULED: tl.constexpr, KEEP: tl.constexpr, CARRY: tl.constexpr, CHECK: tl.constexpr,
    KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """First launch of the split route, a program a chunk; the last of a row to arrive settles it, unless APART.

    items int32 `[programs, 2]`: (entry, chunk); arrivals int32 `[rows]`, zeros before and after; others as in `entry`.
    """
    item = tl.program_id(0)
    index, chunk = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
    row, width, p_row, area, header, r, code = entry(table, rows, widths, headers, work, index, RC, WIDE)
    if active(p_row, found_inf):
        chunks_a, chunks = counts(p_row, width)
        gather(
            p_row, area, header, chunk, chunks_a, width, r, code, CARRY, CHECK, SCALED, RC, BN, DTYPE, WIDE, TC, VECTOR
        )  # fmt: skip
        if not APART:
            # all threads' stores come before the arrival, which releases them and acquires those of the other programs
            tl.debug_barrier()
            if tl.atomic_add(arrivals + index, 1, sem="acq_rel", scope="gpu") == chunks - 1:
                tl.debug_barrier()
                tl.store(arrivals + index, 0)
                settle(
                    p_row, row, area, header, results, hypers, width, r, code, warmup, start, interval, SCHEDULED,
                    KEEP, KAPPA_MAX, RC, BM, BK, DTYPE, WIDE, TC, SCALED,
                )  # fmt: skip
    elif (not APART) & (chunk == 0):
        refuse(row, header, results)


@triton.jit(do_not_specialize=["warmup", "start", "interval"])
def settle_kernel(
    table, rows, widths, headers, results, work, hypers, found_inf, warmup, start, interval, SCHEDULED: tl.constexpr,
    KEEP: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Between both launches of the split route, a program a row; arguments as gram_kernel's."""
    index = tl.program_id(0)
    row, width, p_row, area, header, r, code = entry(table, rows, widths, headers, work, index, RC, WIDE)
    if active(p_row, found_inf):
        settle(
            p_row, row, area, header, results, hypers, width, r, code, warmup, start, interval, SCHEDULED, KEEP,
            KAPPA_MAX, RC, BM, BK, DTYPE, WIDE, TC, SCALED,
        )  # fmt: skip
    else:
        refuse(row, header, results)


@triton.jit(do_not_specialize=["seed"])
def update_kernel(
    table, rows, items, widths, headers, work, hypers, grad_scale, seed, AMSGRAD: tl.constexpr, MASTER: tl.constexpr,
    CARRY: tl.constexpr, SCALED: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Last launch of the split route, a program a chunk."""
    item = tl.program_id(0)
    index, chunk = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
    row, width, p_row, area, header, r, code = entry(table, rows, widths, headers, work, index, RC, WIDE)
    if tl.load(header + RUN) != 0:
        chunks_a, chunks = counts(p_row, width)
        spread(
            p_row, area, header, hypers, unscaling(grad_scale), seed, chunk, chunks_a, width, r, code, AMSGRAD, MASTER,
            CARRY, SCALED, RC, BN, DTYPE, STATE, WIDE, TC, VECTOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["warmup", "start", "interval", "seed"])
def row_kernel(
    table, rows, widths, headers, results, work, hypers, grad_scale, found_inf, seed, warmup, start, interval,
    SCHEDULED: tl.constexpr, KEEP: tl.constexpr, CARRY: tl.constexpr, CHECK: tl.constexpr, AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The row route: one program does what all launches of the split route do for a row."""
    index = tl.program_id(0)
    row, width, p_row, area, header, r, code = entry(table, rows, widths, headers, work, index, RC, WIDE)
    if active(p_row, found_inf):
        chunks_a, chunks = counts(p_row, width)
        for chunk in range(0, chunks):
            gather(
                p_row, area, header, chunk, chunks_a, width, r, code, CARRY, CHECK, SCALED, RC, BN, DTYPE, WIDE, TC,
                VECTOR,
            )  # fmt: skip
        tl.debug_barrier()
        settle(
            p_row, row, area, header, results, hypers, width, r, code, warmup, start, interval, SCHEDULED, KEEP,
            KAPPA_MAX, RC, BM, BK, DTYPE, WIDE, TC, SCALED,
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
    for group in prepared.groups:
        solve = {**group.constants, **solve_constants(group, step.precision), "VECTOR": aligned(plan.table, group.rows)}
        schedule = {"SCHEDULED": step.warmup_steps > 0, "KEEP": step.keep, "CARRY": step.carry, "CHECK": step.check}
        storage = {"AMSGRAD": amsgrad, **state_constants(group, step.precision)}
        if group.step_route == routes.TORCH:
            continue
        if group.step_route == routes.ROW:
            row_kernel[(len(group.numbers),)](
                table, group.numbers, group.widths, group.headers, results, group.workspace, hypers, step.grad_scale,
                step.found_inf, step.seed, step.warmup_steps, step.start, step.interval, **schedule, **storage, **solve,
                **group.options,
            )  # fmt: skip
            continue
        gram_kernel[(len(group.items),)](
            table, group.numbers, group.items, group.widths, group.headers, group.arrivals, results, group.workspace,
            hypers, step.found_inf, step.warmup_steps, step.start, step.interval, APART=group.apart, **schedule,
            **solve, **group.gram_options,
        )  # fmt: skip
        if group.apart:
            settled = {name: schedule[name] for name in ("SCHEDULED", "KEEP")}
            settled |= {name: solve[name] for name in ("KAPPA_MAX", "RC", "BM", "BK", "DTYPE", "WIDE", "TC", "SCALED")}
            settle_kernel[(len(group.numbers),)](
                table, group.numbers, group.widths, group.headers, results, group.workspace, hypers, step.found_inf,
                step.warmup_steps, step.start, step.interval, **settled, **group.options,
            )  # fmt: skip
        kept = {name: solve[name] for name in ("SCALED", "RC", "DTYPE", "WIDE", "TC", "VECTOR")}
        update_kernel[(len(group.items),)](
            table, group.numbers, group.items, group.widths, group.headers, group.workspace, hypers, step.grad_scale,
            step.seed, CARRY=step.carry, **storage, **kept, **group.update_options(step.carry, solve["VECTOR"]),
        )  # fmt: skip
