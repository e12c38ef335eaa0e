"""`X = Q H` of a batch of matrices in one launch, one program per matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..solve import WHOLE, frobenius, invert_transposed, multiply, polar_factor, rounding, tall
from .matrices import configuration, load_scaled, matrix_slot, store_result


@triton.jit(do_not_specialize=["n"])
def polar_kernel(
    p_X, p_Q, p_H, work, n, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """X, Q, H `[batch, n, n]` contiguous, work `[batch, SLOTS, RC * RC + RC]` of TC."""
    index = tl.program_id(0)
    p_x, p_y, p_first = (
        matrix_slot(work, index, 0, RC),
        matrix_slot(work, index, 1, RC),
        matrix_slot(work, index, 2, RC),
    )
    exponent, usable = load_scaled(p_X, index, n, p_first, False, RC, BM, TC)
    orthogonal(p_first, p_x, p_y, n, RC, BM, BK, TC)
    multiply(p_y, p_x, WHOLE, True, p_first, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    store_result(p_Q, index, n, p_x, exponent * 0, usable, False, RC, BM)
    store_result(p_H, index, n, p_y, exponent, usable, True, RC, BM)


@triton.jit
def orthogonal(
    p_first, p_x, p_y, n, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """Slot `p_x` becomes the orthogonal polar factor of slot `p_first`, of any X; slot `p_y` is scratch."""
    row, column = tall(RC)
    o = row * RC + column
    x = tl.load(p_first + o)
    norm = frobenius(x)
    # any orthogonal matrix is a polar factor of 0
    x = tl.where(norm > 0, x, tl.where((row == column) & (row < n), 1.0, 0.0).to(TC))
    tl.store(p_x + o, x)
    tl.store(p_y + o, tl.zeros_like(x))
    # a singular X is moved by its rounding error, by raising pivots to it
    invert_transposed(p_y, x, n, tl.maximum(norm, 1e-3) * rounding(TC), RC)
    tl.debug_barrier()
    polar_factor(p_x, p_y, n, RC, BM, BK, TC)


def polar(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """`[batch, n, n]` contiguous, n <= 128 -> (Q, H) in the type of X; NaN where X is not finite."""
    Q, H = out or (torch.empty_like(X), torch.empty_like(X))
    work, constants, options = configuration(X, precision)
    polar_kernel[(len(X),)](X, Q, H, work, X.shape[-1], **constants, **options)
    return Q, H
