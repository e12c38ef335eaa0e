"""RiemannianAdamW's damped inverse Grams, in place of S and S^-1 (reference.damped_inverses)."""

import triton
import triton.language as tl

from .. import table as col
from ..cholesky import factor_all
from ..dtypes import normal_range, power_of_two
from ..solve import FACTOR_INVERSE, finish, multiply
from .mean import bound, form_scaled_identity, mixer
from .pair import SLOT_A, SLOT_B, SLOT_X, SLOT_Y, slot


@triton.jit
def damped_inverses(
    area, r, reg, scale_a, norm_a, exponent_a, scale_b, norm_b, exponent_b, code, KAPPA_MAX: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """`(A A^T + reg I)^-1` to where `mixer` finds S and `(B^T B + reg I)^-1` to where it finds S^-1.

    From the Grams in SLOT_A and SLOT_B, which are factored in place, and the rest of what `reduce_chunks` returns;
    reg: float64. Returns (status, kappa_a, kappa_b).
    """
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    tiny, huge = normal_range(code)
    weight_a, shift_a, inverse_a, fits_a = relative(norm_a * power_of_two(exponent_a), reg, tiny, huge)
    weight_b, shift_b, inverse_b, fits_b = relative(norm_b * power_of_two(exponent_b), reg, tiny, huge)
    both = tl.arange(0, 2)
    apart = (RC * RC + RC) * (8 // (TC.primitive_bitwidth // 8))
    scale = tl.where(both == 0, scale_a * weight_a.to(TC), scale_b * weight_b.to(TC))
    shift = tl.where(both == 0, shift_a, shift_b).to(TC)
    kappa = factor_all(p_a, apart, scale, shift, r, RC, 2)
    kappa_a, kappa_b = tl.sum(tl.where(both == 0, kappa, 0.0), 0), tl.sum(tl.where(both == 1, kappa, 0.0), 0)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    most = bound(r, KAPPA_MAX, TC)
    status = tl.where(fits_a & fits_b & (kappa_a <= most) & (kappa_b <= most), col.REFACTORED, col.DEGENERATE)
    status = tl.where(finite, status, col.SKIPPED)
    tl.debug_barrier()
    if status == col.REFACTORED:
        p_x, p_y = slot(area, SLOT_X, RC, TC), slot(area, SLOT_Y, RC, TC)
        multiply(p_x, p_a, FACTOR_INVERSE, True, p_a, FACTOR_INVERSE, False, r, RC, BM, BK, TC)
        multiply(p_y, p_b, FACTOR_INVERSE, True, p_b, FACTOR_INVERSE, False, r, RC, BM, BK, TC)
        tl.debug_barrier()
        finish(mixer(area, False, RC, WIDE), p_x, inverse_a, huge, True, RC, BM, WIDE)
        finish(mixer(area, True, RC, WIDE), p_y, inverse_b, huge, True, RC, BM, WIDE)
        tl.debug_barrier()
    elif status == col.DEGENERATE:
        form_scaled_identity(area, inverse_a, inverse_b, RC, WIDE)
    return status, tl.where(fits_a, kappa_a, float("inf")), tl.where(fits_b, kappa_b, float("inf"))


@triton.jit
def relative(norm, reg, tiny, huge):
    """The trace of a Gram and reg over the larger of both, 1 over that, and whether it is a normal number.

    It counts as 1 where it is none, and the trace as 0, reg as 1; float64.
    """
    square = norm * norm
    size = tl.where(square > reg, square, reg)
    fits = (size >= tiny) & (size <= huge) & (1.0 / size >= tiny) & (1.0 / size <= huge)
    inverse = tl.where(fits, 1.0 / size, 1.0)
    return tl.where(fits, square * inverse, 0.0), tl.where(fits, reg * inverse, 1.0), inverse, fits
