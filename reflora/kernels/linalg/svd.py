"""`X = U diag(S) Vh` of a batch of matrices in one launch, one program per matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..solve import WHOLE, finish, multiply, rounding, schulz_panels
from .arrange import arrange, store_values
from .jacobi import configuration, eigen, normalise, orthogonalise
from .matrices import load_scaled, matrix_slot, panel_offsets, store_result
from .polar import orthogonal


@triton.jit(do_not_specialize=["n"])
def svd_kernel(
    p_X, p_U, p_S, p_Vh, work, n, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """`X = Q H`, `H = V diag(S) V^T`, U = Q V. X, U, Vh `[batch, n, n]`, S `[batch, n]` contiguous, work as in eigh."""
    index = tl.program_id(0)
    p_h, p_q = matrix_slot(work, index, 0, RC), matrix_slot(work, index, 1, RC)
    p_v, p_u = matrix_slot(work, index, 2, RC), matrix_slot(work, index, 3, RC)
    p_t = matrix_slot(work, index, 4, RC)
    exponent, usable = load_scaled(p_X, index, n, p_u, False, RC, BM, TC)
    exponent = normalise(p_u, exponent, usable, RC, BM)
    orthogonal(p_u, p_q, p_v, n, RC, BM, BK, TC)
    multiply(p_t, p_q, WHOLE, True, p_u, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    finish(p_h, p_t, tl.full((), 1.0, tl.float64), float("inf"), True, RC, BM, TC)
    tl.debug_barrier()
    exponent = normalise(p_h, exponent, usable, RC, BM)
    eigen(p_h, p_v, p_u, p_t, n, 0, RC, BM, BK, TC)
    multiply(p_u, p_q, WHOLE, False, p_v, WHOLE, False, n, RC, BM, BK, TC)
    # Q of a nearly singular X is so far off that Q^T X is not symmetric to rounding, which N = U^T X V shows
    original, usable = load_scaled(p_X, index, n, p_h, False, RC, BM, TC)
    normalise(p_h, original, usable, RC, BM)
    multiply(p_t, p_h, WHOLE, False, p_v, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    multiply(p_q, p_u, WHOLE, True, p_t, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    skew_correction(p_t, p_q, RC, BM, TC)
    tl.debug_barrier()
    schulz_panels(p_u, p_t, 1.0, -1.0, n, RC, BM, BK, TC)
    schulz_panels(p_v, p_t, 1.0, 1.0, n, RC, BM, BK, TC)
    tl.debug_barrier()
    orthogonalise(p_u, p_t, n, RC, BM, BK, TC)
    arrange(p_v, p_t + RC * RC, p_h, p_u, p_q, n, True, RC, BM, p_X.dtype.element_ty)
    store_values(p_S, index, n, p_h + RC * RC, exponent, usable, RC)
    store_result(p_U, index, n, p_q, exponent * 0, usable, False, RC, BM)
    for first in range(0, RC, BM):
        i, j = first + tl.arange(0, BM)[:, None], tl.arange(0, RC)[None, :]
        v = tl.where(usable == 1, tl.load(p_h + j * RC + i), float("nan"))
        o, mask = panel_offsets(index, first, n, False, RC, BM)
        tl.store(p_Vh + o, v.to(p_Vh.dtype.element_ty), mask=mask)


@triton.jit
def skew_correction(p_e, p_n, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """Slot `p_e` becomes the skew E for which `(U + U E)^T X (V - V E)` is symmetric to first order.

    Slot `p_n` holds `N = U^T X V`. E is 0 between singular values of the size of rounding.
    """
    j = tl.arange(0, RC)[None, :]
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        skew = 0.5 * (tl.load(p_n + i * RC + j) - tl.load(p_n + j * RC + i))
        both = tl.load(p_n + i * RC + i) + tl.load(p_n + j * RC + j)
        # E^2 must be within rounding
        small = (both > 0) & (tl.abs(skew) <= tl.sqrt(rounding(TC)) * both)
        tl.store(p_e + i * RC + j, tl.where(small, skew / tl.where(small, both, 1.0), 0.0))


def svd(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`[batch, n, n]` contiguous, n <= 128 -> (U, S `[batch, n]` descending, Vh); NaN where X is not finite.

    out: (U, S, Vh) to write to.
    """
    U, S, Vh = out or (torch.empty_like(X), X.new_empty(X.shape[:2]), torch.empty_like(X))
    work, constants, options = configuration(X, precision, "svd")
    svd_kernel[(len(X),)](X, U, S, Vh, work, X.shape[-1], **constants, **options)
    return U, S, Vh
