"""A <- P^T A, B <- B P^-T with `P P^T = S`, every row of a rank class in one launch, one program a row."""

import triton
import triton.language as tl
from torch import Tensor

from ..plan import Plan
from . import table as col
from .cholesky import factor
from .dtypes import balanced_fits
from .launch import prepare, solve_constants
from .mean import decide, polar_of_pair
from .pair import SLOT_A, SLOT_B, SLOT_N, SLOT_X, SLOT_Y, apply, area_of, column, report, rescale, slot
from .scalar import decide_scalar
from .solve import FACTOR_INVERSE, FACTOR_T, PLAIN, finish, multiply


@triton.jit
def form_p(area, r, c, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr, TP: tl.constexpr):
    """`P^T = sqrt(c) C^T La^-1` into SLOT_N and `P^-T = La C^-T / sqrt(c)` into SLOT_A, as TP elements.

    `H = Q^T N = C C^T`. Returns 1 if H is positive definite and P finite, else 0.
    """
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    p_x, p_y = slot(area, SLOT_X, RC, TC), slot(area, SLOT_Y, RC, TC)
    one = tl.full((), 1.0, tl.float64)
    largest_double = tl.full((), 1.7976931348623157e308, tl.float64)
    multiply(p_y, p_x, PLAIN, True, slot(area, SLOT_N, RC, TC), PLAIN, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    finish(p_b, p_y, one, largest_double, True, RC, BM, TC)
    tl.debug_barrier()
    kappa = factor(p_b, one.to(TC), None, r, RC)
    multiply(p_x, p_b, FACTOR_T, False, p_a, FACTOR_INVERSE, False, r, RC, BM, BK, TC)
    multiply(p_y, p_a, FACTOR_T, True, p_b, FACTOR_INVERSE, True, r, RC, BM, BK, TC)
    tl.debug_barrier()
    root = tl.sqrt(c)
    fits = finish(slot(area, SLOT_N, RC, TP), p_x, root, largest_double, False, RC, BM, TP)
    fits &= finish(slot(area, SLOT_A, RC, TP), p_y, 1.0 / root, largest_double, False, RC, BM, TP)
    tl.debug_barrier()
    return tl.where(kappa < float("inf"), fits, 0)


@triton.jit
def refactor_kernel(
    table, rows, results, work, KAPPA_MAX: tl.constexpr, SCALAR: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """table int64 `[rows, COLUMNS]`, rows int32 `[programs]`, results float64 `[rows, RESULTS]`, work: workspace."""
    index = tl.program_id(0)
    row = tl.load(rows + index)
    p_row = table + row.to(tl.int64) * col.COLUMNS
    area = area_of(work, index, RC, WIDE)
    r, code = column(p_row, col.R).to(tl.int32), column(p_row, col.DTYPE).to(tl.int32)
    nan = tl.full((), float("nan"), tl.float64)
    if column(p_row, col.ACTIVE) == 0:
        report(results, row, tl.full((), col.PLAIN, tl.int32), nan, nan, nan, nan, nan, nan)
    elif SCALAR:
        status, root, norm_a, norm_b = decide_scalar(p_row, r, code, RC, BN, DTYPE, WIDE)
        # read by all before it is overwritten
        tl.debug_barrier()
        if status == col.REFACTORED:
            rescale(p_row, root, r, code, col.P, col.P, col.A_SIDE, RC, BN, DTYPE, WIDE)
            rescale(p_row, 1.0 / root, r, code, col.P, col.P, col.B_SIDE, RC, BN, DTYPE, WIDE)
        report(results, row, status, nan, nan, nan, root * root, norm_a, norm_b)
    else:
        status, kappa_a, kappa_b, balance, c, norm_a, norm_b = decide(
            p_row, area, r, code, None, KAPPA_MAX, RC, BN, BM, DTYPE, WIDE, TC, SCALED
        )
        TP: tl.constexpr = TC if WIDE == tl.float32 else WIDE
        status = tl.where(balanced_fits(norm_a, norm_b, code), status, col.SKIPPED)
        if status == col.REFACTORED:
            polar_of_pair(area, r, RC, BM, BK, TC, True)
            if form_p(area, r, c, RC, BM, BK, TC, TP) == 1:
                p_n, p_a = slot(area, SLOT_N, RC, TP), slot(area, SLOT_A, RC, TP)
                apply(p_row, p_n, r, code, col.P, col.A_SIDE, RC, BN, BK, DTYPE, WIDE, TP)
                apply(p_row, p_a, r, code, col.P, col.B_SIDE, RC, BN, BK, DTYPE, WIDE, TP)
            else:
                status = tl.full((), col.DEGENERATE, tl.int32)
        if status == col.DEGENERATE:
            root = tl.sqrt(c)
            rescale(p_row, root, r, code, col.P, col.P, col.A_SIDE, RC, BN, DTYPE, WIDE)
            rescale(p_row, 1.0 / root, r, code, col.P, col.P, col.B_SIDE, RC, BN, DTYPE, WIDE)
        report(results, row, status, kappa_a, kappa_b, balance, c, norm_a, norm_b)


def refactor(plan: Plan, scalar: bool, precision: str, results: Tensor) -> None:
    """Every row of r <= 128, one launch a rank class; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table = prepared.table(plan.table)
    for group in prepared.groups:
        refactor_kernel[(len(group.numbers),)](
            table, group.numbers, results, group.workspace, SCALAR=scalar, **group.constants,
            **solve_constants(group, precision), **group.options,
        )  # fmt: skip
