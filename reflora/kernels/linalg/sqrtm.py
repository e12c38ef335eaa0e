"""`X^(1/2)` or `X^(-1/2)` of a batch of SPD matrices in one launch, one program per matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..solve import FACTOR_INVERSE, FACTOR_T, WHOLE, multiply, polar_factor, read, tall
from .matrices import configuration, load_factor, matrix_slot, store_result


@triton.jit(do_not_specialize=["n"])
def sqrtm_kernel(
    p_X, p_root, work, n, INVERSE: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """`X = L L^T`, `L^T = Q H`: the root is `H = Q^T L^T` and its inverse `L^-T Q`; `[batch, n, n]` contiguous."""
    index = tl.program_id(0)
    p_l, p_q = matrix_slot(work, index, 0, RC), matrix_slot(work, index, 1, RC)
    p_y = matrix_slot(work, index, 2, RC)
    row, column = tall(RC)
    o = row * RC + column
    exponent, sound = load_factor(p_X, index, n, p_l, RC, BM, TC)
    tl.store(p_q + o, read(p_l, row, column, RC, FACTOR_T))
    tl.store(p_y + o, read(p_l, row, column, RC, FACTOR_INVERSE))
    tl.debug_barrier()
    polar_factor(p_q, p_y, n, RC, BM, BK, TC)
    if INVERSE:
        multiply(p_y, p_l, FACTOR_INVERSE, True, p_q, WHOLE, False, n, RC, BM, BK, TC)
        exponent = -exponent
    else:
        multiply(p_y, p_q, WHOLE, True, p_l, FACTOR_T, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    store_result(p_root, index, n, p_y, exponent >> 1, sound, True, RC, BM)


def sqrtm(X: Tensor, precision: str, inverse: bool, out: Tensor | None = None) -> Tensor:
    """`[batch, n, n]` contiguous, n <= 128; NaN where X is not positive definite."""
    root = torch.empty_like(X) if out is None else out
    work, constants, options = configuration(X, precision)
    sqrtm_kernel[(len(X),)](X, root, work, X.shape[-1], INVERSE=inverse, **constants, **options)
    return root
