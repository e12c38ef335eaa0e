"""What a launch over chunks gathers of rows for their solve: Grams, and whether their gradients are finite."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import table as col
from .chunks import CARRIED, HEADER, accumulate, counts, search, span
from .launch import RankClass, taken
from .pair import area_of, column
from .settle import refuse, settle


@triton.jit
def entry(table, rows, headers, work, RC: tl.constexpr, WIDE: tl.constexpr):
    """`entry_of` the row of a program."""
    return entry_of(tl.program_id(0), table, rows, headers, work, RC, WIDE)


@triton.jit
def entry_of(index, table, rows, headers, work, RC: tl.constexpr, WIDE: tl.constexpr, MORE: tl.constexpr = 0):
    """Of a row of a launch: number, columns of a chunk, address, workspace, header, rank, storage.

    rows: RankClass.entries; headers float64 `[rows, HEADER]`.
    """
    row, width = tl.load(rows + 2 * index), tl.load(rows + 2 * index + 1)
    p_row, area, header, r, code = located(table, headers, work, index, row, RC, WIDE, MORE)
    return row, width, p_row, area, header, r, code


@triton.jit
def part(table, items, headers, work, RC: tl.constexpr, WIDE: tl.constexpr, MORE: tl.constexpr = 0):
    """Of a program's chunk: place of its row in the launch, number of the chunk, and as `entry`; RankClass.items."""
    item = items + 4 * tl.program_id(0)
    # all that a program reads of its row follows from one read
    index, chunk, row, width = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    p_row, area, header, r, code = located(table, headers, work, index, row, RC, WIDE, MORE)
    return index, chunk, row, width, p_row, area, header, r, code


@triton.jit
def located(table, headers, work, index, row, RC: tl.constexpr, WIDE: tl.constexpr, MORE: tl.constexpr = 0):
    p_row = table + row.to(tl.int64) * col.COLUMNS
    area, header = area_of(work, index, RC, WIDE, MORE), headers + index.to(tl.int64) * HEADER
    return p_row, area, header, column(p_row, col.R).to(tl.int32), column(p_row, col.DTYPE).to(tl.int32)


@triton.jit
def active(p_row, found_inf):
    run = column(p_row, col.ACTIVE) != 0
    if found_inf is not None:
        run = run & (tl.load(found_inf) == 0)
    return run


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


@triton.jit(do_not_specialize=["warmup", "start", "interval", "reg_bits"])
def gram_kernel(
    table, items, headers, arrivals, results, work, hypers, found_inf, warmup, start, interval, reg_bits,
    APART: tl.constexpr, SCHEDULED: tl.constexpr, CARRY: tl.constexpr, CHECK: tl.constexpr, KAPPA_MAX: tl.constexpr,
    RC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    TC: tl.constexpr, SCALED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per chunk: its Gram. The last of a row to arrive settles an AdamW step of it, unless APART.

    items: RankClass.items; arrivals int32 `[rows]`, zeros before and after; headers as in `entry`.
    results, hypers, arrivals and the schedule are of no use to APART.
    """
    index, chunk, row, width, p_row, area, header, r, code = part(table, items, headers, work, RC, WIDE)
    chunks_a, chunks = counts(p_row, width)
    if active(p_row, found_inf):
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
                    p_row, row, area, header, results, hypers, width, r, code, warmup, start, interval, reg_bits,
                    SCHEDULED, KAPPA_MAX, RC, BM, BK, WIDE, TC, SCALED,
                )  # fmt: skip
    else:
        if not APART:
            if chunk == 0:
                refuse(row, header, results)


def gather_chunks(group: RankClass, table: Tensor, constants: dict[str, Any], check: bool) -> None:
    """The Grams of a group's chunks; check: whether their gradients are finite too."""
    own = {"APART": True, "SCHEDULED": False, "CARRY": False, "CHECK": check}
    gram_kernel[(len(group.items),)](
        table, group.items, group.headers, None, None, group.workspace, None, None, 0, 0, 1, None,
        **taken(gram_kernel, {**constants, **own}), **group.gram_options,
    )  # fmt: skip
