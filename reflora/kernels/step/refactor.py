"""A <- P^T A, B <- B P^-T with `P P^T = S`: Grams over chunks, one solve per row, and products over chunks."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .. import routes
from .. import table as col
from ..cholesky import factor
from ..dtypes import balanced_fits
from ..solve import FACTOR_INVERSE, FACTOR_T, WHOLE, finish, multiply
from .apply import apply_chunks
from .chunks import FACTOR_A, FACTOR_B, MATRIX, NUMBER, RUN
from .gather import entry, gather_chunks
from .launch import constants_of, prepare, taken
from .mean import mixer, polar_of_pair, sum_and_decide
from .pair import SLOT_A, SLOT_B, SLOT_N, SLOT_X, SLOT_Y, column, report, slot
from .scalar import balance_rows
from .settle import refuse


@triton.jit
def form_p(area, r, c, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr, TP: tl.constexpr):
    """`P^T = sqrt(c) C^T La^-1` and `P^-T = La C^-T / sqrt(c)`, as TP elements, to where `mixer` finds A's and B's.

    `H = Q^T N = C C^T`. Returns 1 if H is positive definite and P finite, else 0.
    """
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    p_x, p_y = slot(area, SLOT_X, RC, TC), slot(area, SLOT_Y, RC, TC)
    one = tl.full((), 1.0, tl.float64)
    largest_double = tl.full((), 1.7976931348623157e308, tl.float64)
    multiply(p_y, p_x, WHOLE, True, slot(area, SLOT_N, RC, TC), WHOLE, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    finish(p_b, p_y, one, largest_double, True, RC, BM, TC)
    tl.debug_barrier()
    kappa = factor(p_b, one.to(TC), None, r, RC)
    multiply(p_x, p_b, FACTOR_T, False, p_a, FACTOR_INVERSE, False, r, RC, BM, BK, TC)
    multiply(p_y, p_a, FACTOR_T, True, p_b, FACTOR_INVERSE, True, r, RC, BM, BK, TC)
    tl.debug_barrier()
    root = tl.sqrt(c)
    fits = finish(mixer(area, True, RC, TP), p_x, root, largest_double, False, RC, BM, TP)
    fits &= finish(mixer(area, False, RC, TP), p_y, 1.0 / root, largest_double, False, RC, BM, TP)
    tl.debug_barrier()
    return tl.where(kappa < float("inf"), fits, 0)


@triton.jit
def refactor_kernel(
    table, rows, headers, results, work, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """P^T and P^-T of a row, a program each; arguments as gram_kernel's. TYPE: of their elements."""
    row, width, p_row, area, header, r, code = entry(table, rows, headers, work, RC, WIDE)
    if column(p_row, col.ACTIVE) == 0:
        refuse(row, header, results)
    else:
        status, kappa_a, kappa_b, balance, c, norm_a, norm_b = sum_and_decide(
            p_row, area, header, width, r, code, None, KAPPA_MAX, RC, BM, WIDE, TC, SCALED
        )
        status = tl.where(balanced_fits(norm_a, norm_b, code), status, col.SKIPPED)
        if status == col.REFACTORED:
            polar_of_pair(area, r, RC, BM, BK, TC, True)
            if form_p(area, r, c, RC, BM, BK, TC, TYPE) == 0:
                status = tl.full((), col.DEGENERATE, tl.int32)
        tl.store(header + FACTOR_A, tl.sqrt(c))
        tl.store(header + FACTOR_B, 1.0 / tl.sqrt(c))
        run = tl.where(status == col.REFACTORED, MATRIX, tl.where(status == col.DEGENERATE, NUMBER, 0))
        tl.store(header + RUN, run.to(tl.float64))
        report(results, row, status, kappa_a, kappa_b, balance, c, norm_a, norm_b)


def factor_type(constants: dict[str, Any]) -> Any:
    """The type P and its inverse are kept and applied in, so that B A stays what it is."""
    return constants["TC"] if constants["WIDE"] == tl.float32 else constants["WIDE"]


def refactor(plan: Plan, scalar: bool, precision: str, results: Tensor) -> None:
    """Every row of r <= 128; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table = prepared.table(plan.table)
    for group in prepared.groups:
        constants = constants_of(plan, group, precision)
        TYPE = factor_type(constants)
        if scalar:
            balance_rows(group, table, results, constants, gradients=False)
        elif group.step_route(precision) == routes.TORCH:
            continue
        else:
            gather_chunks(group, table, constants, check=False)
            refactor_kernel[(len(group.rows),)](
                table, group.entries, group.headers, results, group.workspace, TYPE=TYPE,
                **taken(refactor_kernel, constants), **group.options,
            )  # fmt: skip
        apply_chunks(group, table, constants, COLUMN=col.P, MATRICES=not scalar, STORED=TYPE, TYPE=TYPE)
