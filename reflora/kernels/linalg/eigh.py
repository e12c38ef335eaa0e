"""Eigenvalues and eigenvectors of a batch of symmetric matrices in one launch, one program per matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arrange import arrange, store_values
from .jacobi import configuration, eigen, normalise
from .matrices import load_scaled, matrix_slot, panel_offsets, store_result


@triton.jit(do_not_specialize=["n"])
def eigh_kernel(
    p_X, p_start, p_values, p_V, work, n, VECTORS: tl.constexpr, WARM: tl.constexpr, RC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """X, start, V `[batch, n, n]`, values `[batch, n]` contiguous, work `[batch, SLOTS, RC * RC + RC]` of TC."""
    index = tl.program_id(0)
    p_x, p_u = matrix_slot(work, index, 0, RC), matrix_slot(work, index, 1, RC)
    p_z, p_t = matrix_slot(work, index, 2, RC), matrix_slot(work, index, 3, RC)
    exponent, usable = load_scaled(p_X, index, n, p_x, True, RC, BM, TC)
    exponent = normalise(p_x, exponent, usable, RC, BM)
    if WARM:
        for first in range(0, RC, BM):
            o, mask = panel_offsets(index, first, n, False, RC, BM)
            u = tl.load(p_start + o, mask=mask, other=0.0).to(TC)
            tl.store(p_u + (first + tl.arange(0, BM))[:, None] * RC + tl.arange(0, RC)[None, :], u)
        tl.debug_barrier()
    eigen(p_x, p_u, p_z, p_t, n, 1 if WARM else 0, RC, BM, BK, TC)
    arrange(p_u, p_t + RC * RC, p_z, p_u, p_z, n, False, RC, BM, p_X.dtype.element_ty)
    store_values(p_values, index, n, p_z + RC * RC, exponent, usable, RC)
    if VECTORS:
        store_result(p_V, index, n, p_z, exponent * 0, usable, False, RC, BM)


def eigh(
    X: Tensor, precision: str, V0: Tensor | None = None, vectors: bool = True,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`[batch, n, n]` contiguous, n <= 128 -> (w `[batch, n]` ascending, V or None); NaN where X is not finite.

    V0: eigenvectors of a similar X to start from, any values. out: (w, V or None) to write to.
    """
    if out is None:
        out = X.new_empty(X.shape[:2]), torch.empty_like(X) if vectors else None
    w, V = out
    work, constants, options = configuration(X, precision, "eigh")
    eigh_kernel[(len(X),)](
        X, X if V0 is None else V0, w, V if vectors else X, work, X.shape[-1], VECTORS=vectors, WARM=V0 is not None,
        **constants, **options,
    )  # fmt: skip
    return w, V if vectors else None
