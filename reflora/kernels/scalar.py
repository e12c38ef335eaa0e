"""RefLoRA-S: the balance scalar of a row, `s = root^2 = ||B|| / ||A||`."""

import triton
import triton.language as tl

from . import table as col
from .dtypes import BFLOAT16, balanced_fits, exponent_of, load, power_of_two
from .mean import ratio
from .pair import block_zeros, column, largest, offsets


@triton.jit
def side_norm(
    p_row, r, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr
):
    """`||.||_F` of a side as `norm * 2^exponent`; NaN or inf where an element is not finite."""
    address, sr, sn = column(p_row, SIDE + col.P), column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    n = column(p_row, SIDE + col.N).to(tl.int32)
    exponent = tl.full((), 0, tl.int64)
    factor = tl.full((), 1.0, tl.float64)
    if WIDE == tl.float64:
        top = largest(address, sr, sn, r, 0, n, code, SIDE, RC, BN, DTYPE, WIDE)
        exponent = exponent_of(tl.where((top > 0) & (top < float("inf")), top, 1.0))
        exponent = tl.minimum(tl.maximum(exponent, -1000), 1000)
        factor = power_of_two(-exponent)
    acc = block_zeros(SIDE, RC, BN, tl.float64)
    for start in range(0, n, BN):
        o, m = offsets(start, sr, sn, r, n, SIDE, RC, BN)
        x = load(address, o, m, code, DTYPE, WIDE).to(tl.float64) * factor
        acc += x * x
    return tl.sqrt(tl.sum(tl.sum(acc, 1), 0)), exponent


@triton.jit
def balance_root(norm_a, exponent_a, norm_b, exponent_b, code):
    """(status, root): sqrt(s), rounded to a power of two for half-precision storage, which is exact; 1 if unusable."""
    s, useful = ratio(norm_a, exponent_a, norm_b, exponent_b, code)
    useful &= balanced_fits(norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b), code)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    status = tl.where(finite, tl.where(useful, col.REFACTORED, col.DEGENERATE), col.SKIPPED)
    s = tl.where(useful, s, 1.0)
    nearest = power_of_two(tl.floor(0.5 * tl.log2(s) + 0.5).to(tl.int64))
    return status, tl.where(code >= BFLOAT16, nearest, tl.sqrt(s))


@triton.jit
def decide_scalar(
    p_row, r, code, RC: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """(status, root, norm_a, norm_b) of a row."""
    norm_a, exponent_a = side_norm(p_row, r, code, col.A_SIDE, RC, BN, DTYPE, WIDE)
    norm_b, exponent_b = side_norm(p_row, r, code, col.B_SIDE, RC, BN, DTYPE, WIDE)
    status, root = balance_root(norm_a, exponent_a, norm_b, exponent_b, code)
    return status, root, norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
