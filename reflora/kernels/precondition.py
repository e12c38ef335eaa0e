"""gA <- S^-1 gA, gB <- gB S, every row of a rank class in one launch, one program a row."""

import triton
import triton.language as tl
from torch import Tensor

from ..plan import Plan
from . import table as col
from .launch import prepare, solve_constants
from .mean import decide, mixer, settle_s
from .pair import apply, area_of, column, finite_grads, report, rescale
from .scalar import decide_scalar
from .settle import shrink_weight, steps_of


@triton.jit(do_not_specialize=["start"])
def precondition_kernel(
    table, rows, results, work, start, KAPPA_MAX: tl.constexpr, SCALAR: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """table int64 `[rows, COLUMNS]`, rows int32 `[programs]`, results float64 `[rows, RESULTS]`, work: workspace.

    start: as Backend.precondition has it.
    """
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
        s = root * root
        status = tl.where(finite_grads(p_row, r, code, RC, BN, DTYPE, WIDE), status, col.SKIPPED)
        # read by all before it is overwritten
        tl.debug_barrier()
        if status == col.REFACTORED:
            rescale(p_row, 1.0 / s, r, code, col.G, col.G, col.A_SIDE, RC, BN, DTYPE, WIDE)
            rescale(p_row, s, r, code, col.G, col.G, col.B_SIDE, RC, BN, DTYPE, WIDE)
        report(results, row, status, nan, nan, nan, s, norm_a, norm_b)
    else:
        weight = tl.full((), 1.0, tl.float64)
        if start != 0:
            weight = shrink_weight(steps_of(p_row), start)
        status, kappa_a, kappa_b, balance, c, norm_a, norm_b = decide(
            p_row, area, r, code, weight, KAPPA_MAX, RC, BN, BM, DTYPE, WIDE, TC, SCALED
        )
        status = tl.where(finite_grads(p_row, r, code, RC, BN, DTYPE, WIDE), status, col.SKIPPED)
        status = settle_s(area, r, status, tl.where(start == 0, c, 1.0), code, RC, BM, BK, WIDE, TC)
        if status != col.SKIPPED:
            p_s, p_inverse = mixer(area, False, RC, WIDE), mixer(area, True, RC, WIDE)
            apply(p_row, p_inverse, r, code, col.G, col.A_SIDE, RC, BN, BK, DTYPE, WIDE, WIDE)
            apply(p_row, p_s, r, code, col.G, col.B_SIDE, RC, BN, BK, DTYPE, WIDE, WIDE)
        report(results, row, status, kappa_a, kappa_b, balance, c, norm_a, norm_b)


def precondition(plan: Plan, scalar: bool, precision: str, start: int, results: Tensor) -> None:
    """Every row of r <= 128, one launch a rank class; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table = prepared.table(plan.table)
    for group in prepared.groups:
        precondition_kernel[(len(group.numbers),)](
            table, group.numbers, results, group.workspace, start, SCALAR=scalar, **group.constants,
            **solve_constants(group, precision), **group.options,
        )  # fmt: skip
