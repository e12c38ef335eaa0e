"""One RefLoRA-S step under AdamW (paper, Theorem 5) of every row of a rank class, in two launches over chunks of rows.

What a factor is multiplied by after its update depends on the norm that the update gives it. So the first launch makes
the update without keeping it, and the last chunk of a row to arrive settles the row; the second launch makes it again
and keeps it. Nothing is written twice.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ...columns import AMSGRAD as AMSGRAD_COLUMN
from ...plan import Plan
from .. import table as col
from ..dtypes import BFLOAT16, FLOAT16, power_of_two
from .adamw import unscaling
from .balance import step_side
from .chunks import MOVE, ROOT, RUN, TURN, any_bad, counts
from .gather import active, part
from .launch import constants_of, prepare, scalar_constants, taken
from .pair import column, report
from .scalar import AFTER, BEFORE, balance_root, look, total_norm
from .settle import both_terms, refuse, steps_of, store_counts, store_scalars

if TYPE_CHECKING:
    from ...backends import AdamWStep


MEET = tl.constexpr(0.999)  # as reference.meet, which is 0.5 for 16-bit factors


@triton.jit
def due(steps, warmup, start, interval):
    """(refactored before the update, after it) of a row that has taken part in `steps` steps."""
    return (steps == 0) & (warmup == 0) & (start == 0), (steps + 1 >= warmup) & ((steps + 1 - warmup) % interval == 0)


@triton.jit
def step_chunk(
    p_row, parts, header, hypers, unscale, root, move, turn, seed, chunk, chunks_a, width, r, code,
    CHECK: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, STORE: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The update of a chunk. root, move: factors of A and its moments before it; turn: of A after. B: the inverse."""
    if chunk < chunks_a:
        step_side(
            p_row, parts, header, hypers, unscale / root, root, move, turn, seed, chunk, chunk, width, r, code,
            col.A_SIDE, CHECK, AMSGRAD, MASTER, STORE, RC, BN, DTYPE, STATE, WIDE, VECTOR,
        )  # fmt: skip
    else:
        back = turn
        if turn is not None:
            back = 1.0 / turn
        step_side(
            p_row, parts, header, hypers, unscale * root, 1.0 / root, 1.0 / move, back, seed, chunk, chunk - chunks_a,
            width, r, code, col.B_SIDE, CHECK, AMSGRAD, MASTER, STORE, RC, BN, DTYPE, STATE, WIDE, VECTOR,
        )  # fmt: skip


@triton.jit
def settle_scalar(
    p_row, row, parts, header, results, hypers, unscale, seed, width, r, code, warmup, start, interval,
    AMSGRAD: tl.constexpr, MASTER: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
    STATE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """From a row's squares to its header, its new counts, phase and report; by one program."""
    chunks_a, chunks = counts(p_row, width)
    terms = both_terms(p_row, hypers)
    norm_a, exponent_a = total_norm(parts, 0, chunks_a, BEFORE)
    norm_b, exponent_b = total_norm(parts, chunks_a, chunks, BEFORE)
    status, root = balance_root(norm_a, exponent_a, norm_b, exponent_b, code)
    status = tl.where(any_bad(header, chunks), col.SKIPPED, status)
    steps = steps_of(p_row)
    before, after = due(steps, warmup, start, interval)
    plain = not (before | after)
    shown, scale = tl.where(plain & (status != col.SKIPPED), col.PLAIN, status), root * root
    sizes = norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
    if status != col.SKIPPED:
        count_a, count_b = store_scalars(header, terms)
        p_phase = column(p_row, col.PHASE).to(tl.pointer_type(tl.float32))
        has_phase = column(p_row, col.PHASE) != 0
        phase = tl.load(p_phase, mask=has_phase, other=0.0)
        # after full refactoring the moments go back to units of S = I
        returns = phase == col.REFACTORED_UNITS
        root = tl.where(before, root, 1.0)
        move = tl.where(returns & (status == col.REFACTORED), sizes[1] / sizes[0], 1.0) / root
        if (before & after) | returns:
            # what the update comes to is known only now
            for chunk in range(0, chunks):
                step_chunk(
                    p_row, parts, header, hypers, unscale, root, move, None, seed, chunk, chunks_a, width, r, code,
                    False, AMSGRAD, MASTER, False, RC, BN, DTYPE, STATE, WIDE, VECTOR,
                )  # fmt: skip
            tl.debug_barrier()
        turn = tl.full((), 1.0, tl.float64)
        if after | (start != 0):
            norm_a, exponent_a = total_norm(parts, 0, chunks_a, AFTER)
            norm_b, exponent_b = total_norm(parts, chunks_a, chunks, AFTER)
            status, new_root = balance_root(norm_a, exponent_a, norm_b, exponent_b, code)
            if start != 0:
                new_a, new_b = norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
                meet = tl.where((code == BFLOAT16) | (code == FLOAT16), 0.5, MEET)
                equal = tl.minimum(sizes[0], sizes[1]) >= tl.maximum(sizes[0], sizes[1]) * meet
                crosses = ((sizes[1] <= sizes[0]) & (new_b >= new_a)) | ((sizes[1] >= sizes[0]) & (new_b <= new_a))
                phase = tl.where(equal | crosses, col.BALANCED, phase)
                status = tl.where((phase != col.BALANCED) | (not after), col.PLAIN, status)
                shown = tl.where(phase != col.BALANCED, col.PLAIN, shown)
            turn = tl.where(status == col.REFACTORED, new_root, 1.0)
        tl.store(header + ROOT, root)
        tl.store(header + MOVE, move)
        tl.store(header + TURN, turn)
        tl.store(header + RUN, 1.0)
        # phase and counts are read by all before they are written
        tl.debug_barrier()
        tl.store(p_phase, tl.where(phase == col.REFACTORED_UNITS, 0.0, phase), mask=has_phase)
        store_counts(p_row, count_a, count_b, steps)
    else:
        tl.store(header + RUN, 0.0)
    nan = tl.full((), float("nan"), tl.float64)
    report(results, row, shown, nan, nan, nan, scale, sizes[0], sizes[1])


@triton.jit(do_not_specialize=["seed", "warmup", "start", "interval"])
def foresee_kernel(
    table, items, headers, arrivals, results, work, hypers, grad_scale, found_inf, seed, warmup,
    start, interval, CHECK: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """First launch, one program per chunk; arguments as gram_kernel's."""
    index, chunk, row, width, p_row, parts, header, r, code = part(table, items, headers, work, RC, WIDE)
    chunks_a, chunks = counts(p_row, width)
    if active(p_row, found_inf):
        before, after = due(steps_of(p_row), warmup, start, interval)
        unscale, one = unscaling(grad_scale), tl.full((), 1.0, tl.float64)
        if (after | (start != 0)) & (not before):
            step_chunk(
                p_row, parts, header, hypers, unscale, one, one, None, seed, chunk, chunks_a, width, r, code, CHECK,
                AMSGRAD, MASTER, False, RC, BN, DTYPE, STATE, WIDE, VECTOR,
            )  # fmt: skip
        else:
            look(p_row, parts, header, chunk, chunks_a, width, r, code, CHECK, RC, BN, DTYPE, WIDE, VECTOR)
        # as in gram_kernel: all threads' stores come before the arrival
        tl.debug_barrier()
        if tl.atomic_add(arrivals + index, 1, sem="acq_rel", scope="gpu") == chunks - 1:
            tl.debug_barrier()
            tl.store(arrivals + index, 0)
            settle_scalar(
                p_row, row, parts, header, results, hypers, unscale, seed, width, r, code, warmup, start, interval,
                AMSGRAD, MASTER, RC, BN, DTYPE, STATE, WIDE, VECTOR,
            )  # fmt: skip
    elif chunk == 0:
        refuse(row, header, results)


@triton.jit(do_not_specialize=["seed"])
def turn_kernel(
    table, items, headers, hypers, grad_scale, seed, AMSGRAD: tl.constexpr, MASTER: tl.constexpr,
    RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Second launch, one program per chunk."""
    _, chunk, _, width, p_row, _, header, r, code = part(table, items, headers, headers, RC, WIDE)
    chunks_a, _ = counts(p_row, width)
    if tl.load(header + RUN) != 0:
        root, move, turn = tl.load(header + ROOT), tl.load(header + MOVE), tl.load(header + TURN)
        step_chunk(
            p_row, header, header, hypers, unscaling(grad_scale), root, move, turn, seed, chunk, chunks_a, width, r,
            code, False, AMSGRAD, MASTER, True, RC, BN, DTYPE, STATE, WIDE, VECTOR,
        )  # fmt: skip


def adamw_scalar(plan: Plan, step: "AdamWStep", results: Tensor) -> None:
    """Every row of r <= 128; results float64 `[rows, RESULTS]` are written row by row."""
    prepared = prepare(plan)
    table, hypers = prepared.table(plan.table), prepared.hypers(step.hypers)
    amsgrad = bool(step.hypers[:, AMSGRAD_COLUMN].any())
    for group in prepared.groups:
        own = {**scalar_constants(group), "AMSGRAD": amsgrad, "CHECK": step.check}
        constants = {**constants_of(plan, group, step.precision), **own}
        foresee_kernel[(len(group.items),)](
            table, group.items, group.headers, group.arrivals, results, group.workspace,
            hypers, step.grad_scale, step.found_inf, step.seed, step.warmup_steps, step.start, step.interval,
            **taken(foresee_kernel, constants), **group.scalar_options,
        )  # fmt: skip
        turn_kernel[(len(group.items),)](
            table, group.items, group.headers, hypers, step.grad_scale, step.seed,
            **taken(turn_kernel, constants), **group.scalar_options,
        )  # fmt: skip
