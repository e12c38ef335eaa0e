"""`X # Y` of batches of SPD matrices in one launch, one program per pair."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..solve import FACTOR_INVERSE, FACTOR_T, WHOLE, multiply, polar_factor
from .matrices import configuration, load_factor, matrix_slot, store_result


@triton.jit(do_not_specialize=["n"])
def geometric_mean_kernel(
    p_X, p_Y, p_mean, work, n, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """`X # Y = Lx Q^T Ly^T` with `Ly^T Lx^-T = Q H`; all `[batch, n, n]` contiguous."""
    index = tl.program_id(0)
    p_lx, p_ly = matrix_slot(work, index, 0, RC), matrix_slot(work, index, 1, RC)
    p_q, p_y = matrix_slot(work, index, 2, RC), matrix_slot(work, index, 3, RC)
    exponent_x, sound_x = load_factor(p_X, index, n, p_lx, RC, BM, TC)
    exponent_y, sound_y = load_factor(p_Y, index, n, p_ly, RC, BM, TC)
    multiply(p_q, p_ly, FACTOR_T, False, p_lx, FACTOR_INVERSE, True, n, RC, BM, BK, TC)
    multiply(p_y, p_ly, FACTOR_INVERSE, False, p_lx, FACTOR_T, True, n, RC, BM, BK, TC)
    tl.debug_barrier()
    polar_factor(p_q, p_y, n, RC, BM, BK, TC)
    multiply(p_y, p_q, WHOLE, True, p_ly, FACTOR_T, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    multiply(p_q, p_lx, FACTOR_T, True, p_y, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    store_result(p_mean, index, n, p_q, (exponent_x + exponent_y) >> 1, sound_x * sound_y, True, RC, BM)


def geometric_mean(X: Tensor, Y: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """`[batch, n, n]` contiguous, n <= 128; NaN where X or Y is not positive definite."""
    mean = torch.empty_like(X) if out is None else out
    work, constants, options = configuration(X, precision)
    geometric_mean_kernel[(len(X),)](X, Y, mean, work, X.shape[-1], **constants, **options)
    return mean
