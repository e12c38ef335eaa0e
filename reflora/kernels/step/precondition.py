"""gA <- S^-1 gA, gB <- gB S, or S and S^-1 alone: Grams over chunks, one solve per row, and products over chunks."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .. import routes
from .. import table as col
from .apply import apply_chunks, product_type
from .chunks import MATRIX, RUN
from .gather import entry, gather_chunks
from .launch import RankClass, constants_of, prepare, taken
from .mean import form_scaled_identity, solve_s, sum_and_decide
from .pair import column, report
from .scalar import balance_rows
from .settle import move_saved, refuse, shrink_weight, steps_of


@triton.jit(do_not_specialize=["start"])
def solve_kernel(
    table, rows, headers, results, work, start, SAVE: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """S and S^-1 of a row, a program each, for SAVE also to where SAVED points: I where the row is skipped.

    Arguments as gram_kernel's; start as Backend.precondition has it.
    """
    row, width, p_row, area, header, r, code = entry(table, rows, headers, work, RC, WIDE)
    if column(p_row, col.ACTIVE) == 0:
        refuse(row, header, results)
    else:
        weight = shrink_weight(steps_of(p_row), start)
        status, kappa_a, kappa_b, balance, c, norm_a, norm_b = sum_and_decide(
            p_row, area, header, width, r, code, weight, KAPPA_MAX, RC, BM, WIDE, TC, SCALED
        )
        status = solve_s(area, r, status, tl.where(start == 0, c, 1.0), code, RC, BM, BK, WIDE, TC)
        if SAVE:
            if status == col.SKIPPED:
                one = tl.full((), 1.0, tl.float64)
                form_scaled_identity(area, one, one, RC, WIDE)
            tl.debug_barrier()
            move_saved(p_row, area, r, code, True, RC, WIDE)
        tl.store(header + RUN, tl.where(status == col.SKIPPED, 0, MATRIX).to(tl.float64))
        report(results, row, status, kappa_a, kappa_b, balance, c, norm_a, norm_b)


def solve_rows(
    group: RankClass, table: Tensor, results: Tensor, constants: dict[str, Any], start: int, save: bool
) -> None:  # fmt: skip
    """S and S^-1 of a group's rows; without `save` they are for gradients, which are searched."""
    gather_chunks(group, table, constants, check=not save)
    solve_kernel[(len(group.rows),)](
        table, group.entries, group.headers, results, group.workspace, start, SAVE=save,
        **taken(solve_kernel, constants), **group.options,
    )  # fmt: skip


def precondition(plan: Plan, scalar: bool, precision: str, start: int, results: Tensor) -> None:
    """Every row of r <= 128; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table = prepared.table(plan.table)
    for group in prepared.groups:
        constants = constants_of(plan, group, precision)
        if scalar:
            balance_rows(group, table, results, constants, gradients=True)
        elif group.step_route(precision) == routes.TORCH:
            continue
        else:
            solve_rows(group, table, results, constants, start, save=False)
        types = {"STORED": constants["WIDE"], "TYPE": product_type(group, constants)}
        apply_chunks(group, table, constants, COLUMN=col.G, MATRICES=not scalar, **types)


def solve(plan: Plan, precision: str, start: int, results: Tensor) -> None:
    """The same S, to where SAVED points: `[2, r, r]` per row, S and S^-1; gradients are left alone."""
    prepared = prepare(plan)
    table = prepared.table(plan.table)
    for group in prepared.groups:
        if group.step_route(precision) != routes.TORCH:
            solve_rows(group, table, results, constants_of(plan, group, precision), start, save=True)
