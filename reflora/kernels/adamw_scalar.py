"""One RefLoRA-S step under AdamW (paper, Theorem 5), every row of a rank class in one launch, one program a row."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ..plan import AMSGRAD as AMSGRAD_COLUMN
from ..plan import Plan
from . import table as col
from .adamw import active, unscaling
from .chunks import HEADER
from .dtypes import FLOAT32
from .launch import prepare, solve_constants, state_constants
from .mean import form_scaled_identity
from .pair import area_of, column, finite_grads, report, rescale
from .scalar import decide_scalar
from .settle import refuse, steps_of, store_counts, store_scalars
from .update import update

if TYPE_CHECKING:
    from ..backends import AdamWStep


@triton.jit
def move_side(
    p_row, root, r, code, state, SIDE: tl.constexpr, MOMENTS: tl.constexpr, AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A side's factor is multiplied by root; for MOMENTS its moments follow."""
    rescale(p_row, root, r, code, col.P, col.P, SIDE, RC, BN, DTYPE, WIDE)
    if MASTER:
        if column(p_row, SIDE + col.W) != 0:
            rescale(p_row, root, r, code, col.W, col.P, SIDE, RC, BN, FLOAT32, WIDE)
    if MOMENTS:
        rescale(p_row, 1.0 / root, r, state, col.M, col.P, SIDE, RC, BN, STATE, WIDE)
        rescale(p_row, 1.0 / (root * root), r, state, col.V, col.P, SIDE, RC, BN, STATE, WIDE)
        if AMSGRAD:
            if column(p_row, SIDE + col.X) != 0:
                rescale(p_row, 1.0 / (root * root), r, state, col.X, col.P, SIDE, RC, BN, STATE, WIDE)


@triton.jit(do_not_specialize=["warmup", "interval", "seed"])
def scalar_kernel(
    table, rows, headers, results, work, hypers, grad_scale, found_inf, seed, warmup, interval, CHECK: tl.constexpr,
    AMSGRAD: tl.constexpr, MASTER: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """As row_kernel of adamw.py. Refactored before the very first update, and after those that the schedule names."""
    index = tl.program_id(0)
    row = tl.load(rows + index)
    p_row = table + row.to(tl.int64) * col.COLUMNS
    area, header = area_of(work, index, RC, WIDE), headers + index.to(tl.int64) * HEADER
    r, code = column(p_row, col.R).to(tl.int32), column(p_row, col.DTYPE).to(tl.int32)
    state = column(p_row, col.STATE).to(tl.int32)
    if active(p_row, found_inf):
        nan = tl.full((), float("nan"), tl.float64)
        one = tl.full((), 1.0, tl.float64)
        status, root, norm_a, norm_b = decide_scalar(p_row, r, code, RC, BN, DTYPE, WIDE)
        if CHECK:
            status = tl.where(finite_grads(p_row, r, code, RC, BN, DTYPE, WIDE), status, col.SKIPPED)
        steps = steps_of(p_row)
        before = (steps == 0) & (warmup == 0)
        after = (steps + 1 >= warmup) & ((steps + 1 - warmup) % interval == 0)
        plain = not (before | after)
        shown = tl.where(plain & (status != col.SKIPPED), col.PLAIN, status)
        report(results, row, shown, nan, nan, nan, root * root, norm_a, norm_b)
        if status != col.SKIPPED:
            count_a, count_b = store_scalars(p_row, header, hypers)
            form_scaled_identity(area, one, one, RC, WIDE)
            p_phase = column(p_row, col.PHASE).to(tl.pointer_type(tl.float32))
            has_phase = column(p_row, col.PHASE) != 0
            phase = tl.load(p_phase, mask=has_phase, other=0.0)
            # a plain step after full refactoring: the moments go back to units of S = I
            move = tl.where(plain & (phase != 0) & (status == col.REFACTORED), root * root, 1.0)
            root = tl.where(before, root, 1.0)
            move = tl.where(before, 1.0 / root, move)
            if before:
                # the norms are read by all before a factor is moved
                tl.debug_barrier()
                move_side(
                    p_row, root, r, code, state, col.A_SIDE, False, AMSGRAD, MASTER, RC, BN, DTYPE, STATE, WIDE
                )  # fmt: skip
                move_side(
                    p_row, 1.0 / root, r, code, state, col.B_SIDE, False, AMSGRAD, MASTER, RC, BN, DTYPE, STATE, WIDE
                )  # fmt: skip
            tl.debug_barrier()
            unscale = unscaling(grad_scale)
            n_a, n_b = column(p_row, col.A_SIDE + col.N).to(tl.int32), column(p_row, col.B_SIDE + col.N).to(tl.int32)
            update(
                p_row, area, header, hypers, unscale / root, move, seed, 0, 0, n_a, r, code, state, col.A_SIDE,
                AMSGRAD, MASTER, False, RC, BN, BK, DTYPE, STATE, WIDE, TC,
            )  # fmt: skip
            update(
                p_row, area, header, hypers, unscale * root, 1.0 / move, seed, 0, 0, n_b, r, code, state, col.B_SIDE,
                AMSGRAD, MASTER, False, RC, BN, BK, DTYPE, STATE, WIDE, TC,
            )  # fmt: skip
            tl.store(p_phase, tl.where(plain, 0.0, phase), mask=has_phase)
            if after:
                tl.debug_barrier()
                status, root, norm_a, norm_b = decide_scalar(p_row, r, code, RC, BN, DTYPE, WIDE)
                tl.debug_barrier()
                if status == col.REFACTORED:
                    move_side(
                        p_row, root, r, code, state, col.A_SIDE, True, AMSGRAD, MASTER, RC, BN, DTYPE, STATE, WIDE
                    )  # fmt: skip
                    move_side(
                        p_row, 1.0 / root, r, code, state, col.B_SIDE, True, AMSGRAD, MASTER, RC, BN, DTYPE, STATE,
                        WIDE,
                    )  # fmt: skip
            store_counts(p_row, count_a, count_b, steps)
    else:
        refuse(row, header, results)


def adamw_scalar(plan: Plan, step: "AdamWStep", results: Tensor) -> None:
    """Every row of r <= 128, one launch a rank class; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table, hypers = prepared.table(plan.table), prepared.hypers(step.hypers)
    amsgrad = bool(step.hypers[:, AMSGRAD_COLUMN].any())
    for group in prepared.groups:
        solve = {**group.constants, **solve_constants(group, step.precision)}
        scalar_kernel[(len(group.numbers),)](
            table, group.numbers, group.headers, results, group.workspace, hypers, step.grad_scale, step.found_inf,
            step.seed, step.warmup_steps, step.interval, CHECK=step.check, AMSGRAD=amsgrad,
            **state_constants(group, step.precision),
            **{name: solve[name] for name in ("RC", "BN", "BK", "DTYPE", "WIDE", "TC")}, **group.options,
        )  # fmt: skip
