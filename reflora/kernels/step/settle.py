"""What one program settles for a row of an AdamW step: where S comes from, whether there is a step, its scalars."""

import triton
import triton.language as tl

from .. import table as col
from ..dtypes import FLOAT32, FLOAT64, load, power_of_two, store
from .chunks import (
    CARRIED,
    CORRECTION_A,
    CORRECTION_B,
    COUNT_A,
    COUNT_B,
    DECAY_A,
    DECAY_B,
    MOVE,
    RUN,
    STEP_SIZE_A,
    STEP_SIZE_B,
    any_bad,
    counts,
    reduce_chunks,
)
from .damped import damped_inverses
from .mean import decide, form_scaled_identity, imbalance, mixer, ratio, solve_s
from .pair import column, report


@triton.jit
def learning_rate(p_hyper):
    """LR, or what is at LR_AT now; float64."""
    at = tl.load(p_hyper + col.LR_AT).to(tl.int64)
    wide = tl.load(p_hyper + col.LR_DTYPE) != 0
    single = tl.load(at.to(tl.pointer_type(tl.float32)), mask=(at != 0) & (not wide), other=0.0).to(tl.float64)
    double = tl.load(at.to(tl.pointer_type(tl.float64)), mask=(at != 0) & wide, other=0.0)
    return tl.where(at != 0, tl.where(wide, double, single), tl.load(p_hyper + col.LR))


@triton.jit
def step_terms(p_row, hypers, SIDE: tl.constexpr):
    """What `scalars_of` needs of a side: lr, beta1, beta2, weight decay and number of the step, float64."""
    p_hyper = hypers + column(p_row, SIDE + col.HYPER) * col.HYPERS
    count = tl.load(column(p_row, SIDE + col.STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
    beta1, beta2, decay = (
        tl.load(p_hyper + col.BETA1), tl.load(p_hyper + col.BETA2), tl.load(p_hyper + col.WEIGHT_DECAY)
    )  # fmt: skip
    return learning_rate(p_hyper), beta1, beta2, decay, count


@triton.jit
def scalars_of(lr, beta1, beta2, weight_decay, count):
    """(step size, what sqrt(v) is multiplied by, what p decays by, number of the step) of a side; float64."""
    # beta^count in float64; log(0) is -inf and its exponential 0
    step_size = lr / (1.0 - tl.exp(count * tl.log(beta1)))
    correction = 1.0 / tl.sqrt(1.0 - tl.exp(count * tl.log(beta2)))
    return step_size, correction, 1.0 - lr * weight_decay, count


@triton.jit
def step_scalars(p_row, hypers, SIDE: tl.constexpr):
    lr, beta1, beta2, weight_decay, count = step_terms(p_row, hypers, SIDE)
    return scalars_of(lr, beta1, beta2, weight_decay, count)


@triton.jit
def both_terms(p_row, hypers):
    return step_terms(p_row, hypers, col.A_SIDE), step_terms(p_row, hypers, col.B_SIDE)


@triton.jit
def store_scalars(header, terms):
    """The scalars of both sides' updates into the header. Returns the numbers of their steps."""
    a, b = terms
    step_size_a, correction_a, decay_a, count_a = scalars_of(a[0], a[1], a[2], a[3], a[4])
    step_size_b, correction_b, decay_b, count_b = scalars_of(b[0], b[1], b[2], b[3], b[4])
    tl.store(header + STEP_SIZE_A, step_size_a)
    tl.store(header + CORRECTION_A, correction_a)
    tl.store(header + DECAY_A, decay_a)
    tl.store(header + COUNT_A, count_a)
    tl.store(header + STEP_SIZE_B, step_size_b)
    tl.store(header + CORRECTION_B, correction_b)
    tl.store(header + DECAY_B, decay_b)
    tl.store(header + COUNT_B, count_b)
    return count_a, count_b


@triton.jit
def store_counts(p_row, count_a, count_b, steps):
    tl.store(column(p_row, col.A_SIDE + col.STEP).to(tl.pointer_type(tl.float32)), count_a.to(tl.float32))
    tl.store(column(p_row, col.B_SIDE + col.STEP).to(tl.pointer_type(tl.float32)), count_b.to(tl.float32))
    address = column(p_row, col.COUNT)
    tl.store(address.to(tl.pointer_type(tl.float32)), (steps + 1).to(tl.float32), mask=address != 0)


@triton.jit
def steps_of(p_row):
    """Steps that the row has taken part in, int32."""
    address = column(p_row, col.COUNT)
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0).to(tl.int32)


@triton.jit
def shrink_weight(steps, start):
    """Weight of the Grams after so many steps, float64 (reference.shrink_weight); start = 0: 1."""
    n, half = steps.to(tl.float64), start.to(tl.float64)
    return tl.where(start == 0, 1.0, n * n / tl.maximum(n * n + half * half, 1.0))


@triton.jit
def move_saved(p_row, area, r, code, TO_ROW: tl.constexpr, RC: tl.constexpr, WIDE: tl.constexpr):
    """S and S^-1 from the workspace to `[2, r, r]` at the row's SAVED address, or back."""
    address = column(p_row, col.SAVED)
    i = tl.arange(0, RC)
    o = i[:, None] * r + i[None, :]
    mask = (i < r)[:, None] & (i < r)[None, :]
    p_s = mixer(area, False, RC, WIDE) + i[:, None] * RC + i[None, :]
    p_inverse = mixer(area, True, RC, WIDE) + i[:, None] * RC + i[None, :]
    if TO_ROW:
        store_saved(address, o, tl.load(p_s), mask, code, WIDE)
        store_saved(address, o + r * r, tl.load(p_inverse), mask, code, WIDE)
    else:
        tl.store(p_s, load_saved(address, o, mask, code, WIDE))
        tl.store(p_inverse, load_saved(address, o + r * r, mask, code, WIDE))


@triton.jit
def load_saved(address, o, mask, code, WIDE: tl.constexpr):
    """Elements of a saved S: float64 where the factors are, else float32."""
    if WIDE == tl.float64:
        if code == FLOAT64:
            values = load(address, o, mask, code, FLOAT64, WIDE)
        else:
            values = load(address, o, mask, code, FLOAT32, WIDE)
        return values
    else:
        return load(address, o, mask, code, FLOAT32, WIDE)


@triton.jit
def store_saved(address, o, values, mask, code, WIDE: tl.constexpr):
    if WIDE == tl.float64:
        if code == FLOAT64:
            store(address, o, values, mask, code, FLOAT64)
        else:
            store(address, o, values, mask, code, FLOAT32)
    else:
        store(address, o, values, mask, code, FLOAT32)


@triton.jit
def has_saved(p_row, r, code, RC: tl.constexpr, WIDE: tl.constexpr):
    """Whether the row's SAVED address holds an S; zeros stand for none."""
    i = tl.arange(0, RC)
    diagonal = load_saved(column(p_row, col.SAVED), i * (r + 1), i < r, code, WIDE)
    return tl.max(tl.abs(diagonal), 0) > 0


@triton.jit
def settle(
    p_row, row, area, header, results, hypers, width, r, code, warmup, start, interval, reg_bits,
    SCHEDULED: tl.constexpr, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """From a row's chunk Grams to its header and S, its new counts, phase and report; by one program.

    SCHEDULED: there may be a warm-up, or an interval past 1, for which S is kept where SAVED points. reg_bits: those of
    RiemannianAdamW's reg, a float64, or None.
    """
    chunks_a, chunks = counts(p_row, width)
    # loads that follow from each other, which are on their way while the Grams are summed
    terms = both_terms(p_row, hypers)
    steps, bad = steps_of(p_row), any_bad(header, chunks)
    p_phase = column(p_row, col.PHASE).to(tl.pointer_type(tl.float32))
    has_phase = column(p_row, col.PHASE) != 0
    phase = tl.load(p_phase, mask=has_phase, other=0.0)
    scale_a, norm_a, exponent_a, scale_b, norm_b, exponent_b = reduce_chunks(
        area, header, chunks_a, chunks, RC, BM, WIDE, TC, SCALED
    )
    c, useful = ratio(norm_a, exponent_a, norm_b, exponent_b, code)
    kappa_a = tl.full((), float("nan"), tl.float64)
    kappa_b, balance = kappa_a, kappa_a
    between = imbalance(area, scale_a, norm_a, scale_b, norm_b, c, RC, BM, TC)
    count_a, count_b = store_scalars(header, terms)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    status = tl.full((), col.SKIPPED, tl.int32)
    if finite & (not bad):
        new_phase, taken = phase, steps
        move = tl.full((), 1.0, tl.float64)
        plain, saved = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        if SCHEDULED:
            plain = tl.where(steps < warmup, 1, 0)
            # a layer that has had no S yet is due now
            if (plain == 0) & ((steps - warmup) % interval != 0):
                saved = tl.where(has_saved(p_row, r, code, RC, WIDE), 1, 0)
        if plain == 1:
            one = tl.full((), 1.0, tl.float64)
            form_scaled_identity(area, one, one, RC, WIDE)
            status = tl.full((), col.PLAIN, tl.int32)
            new_phase = tl.full((), 0.0, tl.float32)
            move = tl.where((phase == col.REFACTORED_UNITS) & useful, c, 1.0)
        elif saved == 1:
            if SCHEDULED:
                move_saved(p_row, area, r, code, False, RC, WIDE)
            status = tl.full((), col.REFACTORED, tl.int32)
        elif reg_bits is not None:
            reg = reg_bits.to(tl.int64).to(tl.float64, bitcast=True)
            status, kappa_a, kappa_b = damped_inverses(
                area, r, reg, scale_a, norm_a, exponent_a, scale_b, norm_b, exponent_b, code, KAPPA_MAX, RC, BM, BK,
                WIDE, TC,
            )  # fmt: skip
            balance = between
            new_phase = tl.full((), 0.0, tl.float32)
            move = tl.where((phase == col.REFACTORED_UNITS) & useful, c, 1.0)
        else:
            used = tl.where(useful & (start == 0), c, 1.0)
            status, kappa_a, kappa_b = decide(
                p_row, area, r, scale_a, norm_a, scale_b, norm_b, useful, shrink_weight(steps, start), KAPPA_MAX, RC, TC
            )
            status = solve_s(area, r, status, used, code, RC, BM, BK, WIDE, TC)
            if SCHEDULED:
                if interval > 1:
                    tl.debug_barrier()
                    move_saved(p_row, area, r, code, True, RC, WIDE)
            balance = between
            new_phase = tl.where((start != 0) | ((status == col.DEGENERATE) & (used == 1.0)), 0.0, 1.0)
            move = tl.where((phase != col.REFACTORED_UNITS) & (new_phase != 0), 1.0 / used, 1.0)
            move = tl.where((phase == col.REFACTORED_UNITS) & (start != 0) & useful, c, move)
            # S is entered from where both factors are there to make it
            taken = tl.where((start != 0) & ((norm_a == 0) | (norm_b == 0)), 0, steps)
        tl.store(header + MOVE, move)
        # phase and counts have been read by all: the Grams' sums came after, with barriers of their own
        tl.store(p_phase, new_phase, mask=has_phase)
        store_counts(p_row, count_a, count_b, taken)
    tl.store(header + RUN, tl.where(status == col.SKIPPED, 0.0, 1.0))
    # the solve has overwritten the chunk Grams
    tl.store(header + CARRIED, 0.0)
    norm_a, norm_b = norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
    report(results, row, status, kappa_a, kappa_b, balance, tl.where(useful, c, 1.0), norm_a, norm_b)


@triton.jit
def refuse(row, header, results):
    """A row without gradients, or a step that the gradient scaler has refused."""
    nan = tl.full((), float("nan"), tl.float64)
    tl.store(header + RUN, 0.0)
    report(results, row, tl.full((), col.PLAIN, tl.int32), nan, nan, nan, nan, nan, nan)
