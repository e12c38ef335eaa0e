"""One fused RefLoRA-AdamW step, every row of a rank class in one launch, one program a row."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ..plan import AMSGRAD as AMSGRAD_COLUMN
from ..plan import Plan
from . import table as col
from .dtypes import FLOAT32, FLOAT64, MIXED, load, store
from .launch import prepare, solve_constants
from .pair import (
    SLOT_A,
    SLOT_B,
    column,
    decide,
    finite_grads,
    form_s,
    form_scaled_identity,
    mix,
    offsets,
    polar_of_pair,
    ratio,
    report,
    rescale,
    resident,
    slot,
)  # fmt: skip
from .scalar import decide_scalar, side_norm

if TYPE_CHECKING:
    from ..backends import AdamWStep


@triton.jit
def update(
    p_row, p_slot, hypers, r, code, p_factor, g_factor, m_factor, MIX: tl.constexpr, AMSGRAD: tl.constexpr,
    SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """AdamW of one side; factor and moments are first moved by the float64 scalars p_factor and m_factor.

    The gradient is multiplied by g_factor and, for MIX, by the matrix in the slot. Returns the new step count.
    """
    p_hyper = hypers + column(p_row, SIDE + col.HYPER) * col.HYPERS
    lr, beta1, beta2 = tl.load(p_hyper + col.LR), tl.load(p_hyper + col.BETA1), tl.load(p_hyper + col.BETA2)
    g_factor = tl.where(tl.load(p_hyper + col.MAXIMIZE) != 0, -g_factor, g_factor).to(WIDE)
    count = tl.load(column(p_row, SIDE + col.STEP).to(tl.pointer_type(tl.float32))) + 1.0
    # beta^count in float64; log(0) is -inf and its exponential 0
    step_size = (lr / (1.0 - tl.exp(count.to(tl.float64) * tl.log(beta1)))).to(WIDE)
    correction = (1.0 / tl.sqrt(1.0 - tl.exp(count.to(tl.float64) * tl.log(beta2)))).to(WIDE)
    decay = (1.0 - lr * tl.load(p_hyper + col.WEIGHT_DECAY)).to(WIDE)
    eps = tl.load(p_hyper + col.EPS).to(WIDE)
    keep1, keep2 = (1.0 - beta1).to(WIDE), (1.0 - beta2).to(WIDE)
    beta2 = beta2.to(WIDE)
    p_factor, m_factor = p_factor.to(WIDE), m_factor.to(WIDE)
    limit = tl.full((), 1e38 if WIDE == tl.float32 else 1e307, WIDE)

    p_p, p_m, p_v = column(p_row, SIDE + col.P), column(p_row, SIDE + col.M), column(p_row, SIDE + col.V)
    sr, sn = column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    n = column(p_row, SIDE + col.N).to(tl.int32)
    # groups without amsgrad have no rows in X
    kept = tl.where(tl.load(p_hyper + col.AMSGRAD) != 0, r, 0)
    if MIX:
        matrix = resident(p_slot, RC, BK)
    for start in range(0, n, BN):
        if MIX:
            g = mix(matrix, p_g, g_sr, g_sn, start, r, n, code, g_factor, SIDE, RC, BN, BK, DTYPE, WIDE, WIDE)
            # past the range: saturate, so that m and p stay finite
            g = tl.where(g == g, tl.minimum(tl.maximum(g, -limit), limit), 0.0)
        else:
            o, mask = offsets(start, g_sr, g_sn, r, n, SIDE, RC, BN)
            g = load(p_g, o, mask, code, DTYPE, WIDE) * g_factor
        o, mask = offsets(start, sr, sn, r, n, SIDE, RC, BN)
        m = load(p_m, o, mask, code, DTYPE, WIDE) * m_factor
        m = tl.minimum(tl.maximum(m, -limit), limit)
        m = m + keep1 * (g - m)
        store(p_m, o, m, mask, code, DTYPE)
        # not by the square of m_factor, which may leave the range where v does not
        v = load(p_v, o, mask, code, DTYPE, WIDE) * m_factor * m_factor
        v = beta2 * v + keep2 * g * g
        store(p_v, o, v, mask, code, DTYPE)
        if AMSGRAD:
            p_x = column(p_row, SIDE + col.X)
            o, chosen = offsets(start, sr, sn, kept, n, SIDE, RC, BN)
            x = tl.maximum(load(p_x, o, chosen, code, DTYPE, WIDE) * m_factor * m_factor, v)
            store(p_x, o, x, chosen, code, DTYPE)
            v = tl.where(chosen, x, v)
        p = load(p_p, o, mask, code, DTYPE, WIDE) * p_factor
        # eps = 0 and no gradient yet: 0 / 0 is no step
        denominator = tl.where(m == 0, 1.0, tl.sqrt(v) * correction + eps)
        p = p * decay - step_size * (m / denominator)
        store(p_p, o, p, mask, code, DTYPE)
    return count


@triton.jit
def update_both(
    p_row, p_s, p_inverse, hypers, grad_scale, r, code, p_factor, m_factor, MIX: tl.constexpr, AMSGRAD: tl.constexpr,
    RC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Both sides: A is moved by p_factor and its moments by m_factor, B and its moments by their inverses.

    The step counts are written last. A factor that is moved (p_factor) moves its gradient the other way.
    """
    unscale = tl.full((), 1.0, tl.float64)
    if grad_scale is not None:
        unscale = 1.0 / tl.load(grad_scale).to(tl.float64)
    count_a = update(
        p_row, p_inverse, hypers, r, code, p_factor, unscale / p_factor, m_factor, MIX, AMSGRAD, col.A_SIDE,
        RC, BN, BK, DTYPE, WIDE,
    )  # fmt: skip
    count_b = update(
        p_row, p_s, hypers, r, code, 1.0 / p_factor, unscale * p_factor, 1.0 / m_factor, MIX, AMSGRAD, col.B_SIDE,
        RC, BN, BK, DTYPE, WIDE,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(column(p_row, col.A_SIDE + col.STEP).to(tl.pointer_type(tl.float32)), count_a)
    tl.store(column(p_row, col.B_SIDE + col.STEP).to(tl.pointer_type(tl.float32)), count_b)


@triton.jit
def move_moments(
    p_row, factor, r, code, SIDE: tl.constexpr, AMSGRAD: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rescale(p_row, factor, r, code, col.M, col.P, SIDE, RC, BN, DTYPE, WIDE)
    rescale(p_row, factor * factor, r, code, col.V, col.P, SIDE, RC, BN, DTYPE, WIDE)
    if AMSGRAD:
        if column(p_row, SIDE + col.X) != 0:
            rescale(p_row, factor * factor, r, code, col.X, col.P, SIDE, RC, BN, DTYPE, WIDE)


@triton.jit
def step_scalar(
    p_row, row, hypers, results, grad_scale, r, code, BEFORE: tl.constexpr, AFTER: tl.constexpr, AMSGRAD: tl.constexpr,
    RC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """RefLoRA-S: refactor by the balance scalar before the update, after it, or both; moments move along."""
    status, root, norm_a, norm_b = decide_scalar(p_row, r, code, RC, BN, DTYPE, WIDE)
    status = tl.where(finite_grads(p_row, r, code, RC, BN, DTYPE, WIDE), status, col.SKIPPED)
    nan = tl.full((), float("nan"), tl.float64)
    report(results, row, status, nan, nan, nan, root * root, norm_a, norm_b)
    if status != col.SKIPPED:
        if not BEFORE:
            root = tl.full((), 1.0, tl.float64)
        update_both(
            p_row, 0, 0, hypers, grad_scale, r, code, root, 1.0 / root, False, AMSGRAD, RC, BN, BK, DTYPE, WIDE
        )  # fmt: skip
        if AFTER:
            tl.debug_barrier()
            status, root, norm_a, norm_b = decide_scalar(p_row, r, code, RC, BN, DTYPE, WIDE)
            # the norms are read by all before a factor is moved
            tl.debug_barrier()
            if status == col.REFACTORED:
                rescale(p_row, root, r, code, col.P, col.P, col.A_SIDE, RC, BN, DTYPE, WIDE)
                rescale(p_row, 1.0 / root, r, code, col.P, col.P, col.B_SIDE, RC, BN, DTYPE, WIDE)
                move_moments(p_row, 1.0 / root, r, code, col.A_SIDE, AMSGRAD, RC, BN, DTYPE, WIDE)
                move_moments(p_row, root, r, code, col.B_SIDE, AMSGRAD, RC, BN, DTYPE, WIDE)


@triton.jit
def move_saved(
    p_row, work, index, r, code, TO_ROW: tl.constexpr, RC: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """S and S^-1 from their slots to `[2, r, r]` at the row's SAVED address, or back."""
    STORED: tl.constexpr = DTYPE if (DTYPE == MIXED or DTYPE == FLOAT64) else FLOAT32
    stored = tl.where(code == FLOAT64, FLOAT64, FLOAT32)
    address = column(p_row, col.SAVED)
    i = tl.arange(0, RC)
    o = i[:, None] * r + i[None, :]
    mask = (i < r)[:, None] & (i < r)[None, :]
    p_s = slot(work, index, SLOT_A, RC, WIDE) + i[:, None] * RC + i[None, :]
    p_inverse = slot(work, index, SLOT_B, RC, WIDE) + i[:, None] * RC + i[None, :]
    if TO_ROW:
        store(address, o, tl.load(p_s), mask, stored, STORED)
        store(address, o + r * r, tl.load(p_inverse), mask, stored, STORED)
    else:
        tl.store(p_s, load(address, o, mask, stored, STORED, WIDE))
        tl.store(p_inverse, load(address, o + r * r, mask, stored, STORED, WIDE))
        tl.debug_barrier()


@triton.jit
def has_saved(p_row, r, code, RC: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Whether the row's SAVED address holds an S; zeros stand for none."""
    STORED: tl.constexpr = DTYPE if (DTYPE == MIXED or DTYPE == FLOAT64) else FLOAT32
    stored = tl.where(code == FLOAT64, FLOAT64, FLOAT32)
    i = tl.arange(0, RC)
    diagonal = load(column(p_row, col.SAVED), i * (r + 1), i < r, stored, STORED, WIDE)
    return tl.max(tl.abs(diagonal), 0) > 0


@triton.jit
def plain_status(
    p_row, row, results, r, code, STATUS: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(status, c) of a row whose S is not computed: STATUS or SKIPPED; the ratio of the norms, 1 where of no use."""
    nan = tl.full((), float("nan"), tl.float64)
    norm_a, exponent_a = side_norm(p_row, r, code, col.A_SIDE, RC, BN, DTYPE, WIDE)
    norm_b, exponent_b = side_norm(p_row, r, code, col.B_SIDE, RC, BN, DTYPE, WIDE)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    finite = finite & finite_grads(p_row, r, code, RC, BN, DTYPE, WIDE)
    status = tl.where(finite, STATUS, col.SKIPPED)
    c, useful = ratio(norm_a, exponent_a, norm_b, exponent_b, code)
    report(results, row, status, nan, nan, nan, c, norm_a, norm_b)
    return status, tl.where(useful, c, 1.0)


@triton.jit
def take_fresh(
    p_row, row, results, work, index, r, code, phase, KEEP: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """S and S^-1 of this step into their slots. Returns (status, new phase, what A's moments are multiplied by)."""
    status, kappa_a, kappa_b, balance, c, norm_a, norm_b = decide(
        p_row, work, index, r, code, KAPPA_MAX, RC, BN, BM, DTYPE, WIDE, TC, SCALED
    )
    status = tl.where(finite_grads(p_row, r, code, RC, BN, DTYPE, WIDE), status, col.SKIPPED)
    if status == col.REFACTORED:
        polar_of_pair(work, index, r, RC, BM, BK, TC, False)
        if form_s(work, index, r, c, code, RC, BM, BK, WIDE, TC) == 0:
            status = tl.full((), col.DEGENERATE, tl.int32)
    if status == col.DEGENERATE:
        form_scaled_identity(work, index, c, 1.0 / c, RC, WIDE)
    if KEEP:
        if status != col.SKIPPED:
            move_saved(p_row, work, index, r, code, True, RC, DTYPE, WIDE)
    new_phase = tl.where((status == col.DEGENERATE) & (c == 1.0), 0.0, 1.0)
    m_factor = tl.where((phase == 0) & (new_phase != 0), 1.0 / c, 1.0)
    report(results, row, status, kappa_a, kappa_b, balance, c, norm_a, norm_b)
    return status, new_phase, m_factor


@triton.jit
def adamw_kernel(
    table, rows, results, work, hypers, grad_scale, found_inf, SOURCE: tl.constexpr, KEEP: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, AMSGRAD: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """As precondition_kernel; hypers float64 `[groups, HYPERS]`, grad_scale, found_inf: float32 scalars or None."""
    index = tl.program_id(0)
    row = tl.load(rows + index)
    p_row = table + row.to(tl.int64) * col.COLUMNS
    r, code = column(p_row, col.R).to(tl.int32), column(p_row, col.DTYPE).to(tl.int32)
    nan = tl.full((), float("nan"), tl.float64)
    run = column(p_row, col.ACTIVE) != 0
    if found_inf is not None:
        run = run & (tl.load(found_inf) == 0)
    if not run:
        report(results, row, tl.full((), col.PLAIN, tl.int32), nan, nan, nan, nan, nan, nan)
    elif BEFORE or AFTER:
        step_scalar(p_row, row, hypers, results, grad_scale, r, code, BEFORE, AFTER, AMSGRAD, RC, BN, BK, DTYPE, WIDE)
    else:
        p_s, p_inverse = slot(work, index, SLOT_A, RC, WIDE), slot(work, index, SLOT_B, RC, WIDE)
        phase_address = column(p_row, col.PHASE)
        p_phase = phase_address.to(tl.pointer_type(tl.float32))
        phase = tl.load(p_phase, mask=phase_address != 0, other=0.0)
        new_phase = phase
        m_factor = tl.full((), 1.0, tl.float64)
        if SOURCE == col.FRESH:
            status, new_phase, m_factor = take_fresh(
                p_row, row, results, work, index, r, code, phase, KEEP, KAPPA_MAX, RC, BN, BM, BK, DTYPE, WIDE, TC,
                SCALED,
            )  # fmt: skip
        elif SOURCE == col.SAVED_S:
            if has_saved(p_row, r, code, RC, DTYPE, WIDE):
                status, c = plain_status(p_row, row, results, r, code, col.REFACTORED, RC, BN, DTYPE, WIDE)
                move_saved(p_row, work, index, r, code, False, RC, DTYPE, WIDE)
            else:  # this layer has had no S yet, so it is due now
                status, new_phase, m_factor = take_fresh(
                    p_row, row, results, work, index, r, code, phase, KEEP, KAPPA_MAX, RC, BN, BM, BK, DTYPE, WIDE, TC,
                    SCALED,
                )  # fmt: skip
        else:
            status, c = plain_status(p_row, row, results, r, code, col.PLAIN, RC, BN, DTYPE, WIDE)
            new_phase = tl.full((), 0.0, tl.float32)
            m_factor = tl.where(phase != 0, c, m_factor)
        if status != col.SKIPPED:
            one = tl.full((), 1.0, tl.float64)
            update_both(
                p_row, p_s, p_inverse, hypers, grad_scale, r, code, one, m_factor, SOURCE != col.IDENTITY, AMSGRAD,
                RC, BN, BK, DTYPE, WIDE,
            )  # fmt: skip
            tl.store(p_phase, new_phase, mask=phase_address != 0)


def adamw(plan: Plan, step: "AdamWStep", results: Tensor) -> None:
    """Every row of r <= 128, one launch a rank class; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    hypers = prepared.hypers(plan, step.hypers)
    amsgrad = bool(step.hypers[:, AMSGRAD_COLUMN].any())
    for group in prepared.groups:
        adamw_kernel[(len(group.numbers),)](
            prepared.table(plan), group.numbers, results, group.workspace(), hypers, step.grad_scale, step.found_inf,
            SOURCE=step.source, KEEP=step.keep, BEFORE=step.scalar_before, AFTER=step.scalar_after, AMSGRAD=amsgrad,
            **group.constants, **solve_constants(group, step.precision), **group.options,
        )  # fmt: skip
