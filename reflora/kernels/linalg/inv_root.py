"""`(X + eps I)^(-1/p)` of a batch of symmetric matrices in one launch, one program per matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import exponent_of, power_of_two
from ..options import float64_bits
from ..solve import WHOLE, multiply
from .jacobi import configuration, eigen, normalise
from .matrices import load_scaled, matrix_slot, store_result


@triton.jit(do_not_specialize=["n", "p_bits", "eps_bits", "unit_bits"])
def inv_root_kernel(
    p_X, p_root, work, n, p_bits: tl.int64, eps_bits: tl.int64, unit_bits: tl.int64, RC: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """`V diag((w + eps)^(-1/p)) V^T`. X, root `[batch, n, n]` contiguous, work as in eigh.

    p, eps, unit: bits of float64.
    """
    index = tl.program_id(0)
    p_x, p_u = matrix_slot(work, index, 0, RC), matrix_slot(work, index, 1, RC)
    p_z, p_t = matrix_slot(work, index, 2, RC), matrix_slot(work, index, 3, RC)
    exponent, usable = load_scaled(p_X, index, n, p_x, True, RC, BM, TC)
    exponent = normalise(p_x, exponent, usable, RC, BM)
    eigen(p_x, p_u, p_z, p_t, n, 0, RC, BM, BK, TC)
    p, eps = p_bits.to(tl.int64).to(tl.float64, bitcast=True), eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    unit = unit_bits.to(tl.int64).to(tl.float64, bitcast=True)
    exponent, sound = inverse_powers(p_t + RC * RC, exponent, n, p, eps, unit, RC, TC)
    j = tl.arange(0, RC)[None, :]
    power = tl.load(p_t + RC * RC + j)
    for first in range(0, RC, BM):
        o = (first + tl.arange(0, BM))[:, None] * RC + j
        tl.store(p_z + o, tl.load(p_u + o) * power)
    tl.debug_barrier()
    multiply(p_x, p_z, WHOLE, False, p_u, WHOLE, True, n, RC, BM, BK, TC)
    tl.debug_barrier()
    store_result(p_root, index, n, p_x, exponent, sound * usable, True, RC, BM)


@triton.jit
def inverse_powers(p_values, exponent, n, p, eps, unit, RC: tl.constexpr, TC: tl.constexpr):
    """A vector w becomes `(2^exponent w + eps)^(-1/p)` over the returned power of two, which keeps it within range.

    Eigenvalues below zero by no more than 4 sqrt(n) units of the largest count as zero. Also returns 1 if all
    `2^exponent w + eps` are positive, else 0.
    """
    j = tl.arange(0, RC)
    w = tl.load(p_values + j).to(tl.float64)
    slack = tl.max(tl.abs(w), 0) * unit * 4 * tl.sqrt(n.to(tl.float64))
    w = tl.where((w < 0) & (w >= -slack), 0.0, w)
    # both terms over the power of two of the larger one
    common = tl.where(eps > 0, tl.maximum(exponent_of(tl.where(eps > 0, eps, 1.0)), exponent), exponent)
    half = -common >> 1
    eps = eps * power_of_two(half) * power_of_two(-common - half)
    w = w * power_of_two(tl.maximum(exponent - common, -1000)) + eps
    sound = tl.min(tl.where((w > 0) | (j >= n), 1, 0), 0)
    power = -(tl.log2(tl.where(w > 0, w, 1.0)) + common.to(tl.float64)) / p
    top = tl.max(tl.where((w > 0) & (j < n), power, -1e4), 0)
    top = tl.minimum(tl.maximum(tl.ceil(top), -1000.0), 1000.0)
    power = tl.where(j < n, tl.exp2(power - top), 0.0)
    tl.debug_barrier()
    tl.store(p_values + j, power.to(TC))
    tl.debug_barrier()
    return top.to(tl.int64), sound


def inv_root(X: Tensor, p: float, eps: float, unit: float, precision: str, out: Tensor | None = None) -> Tensor:
    """`[batch, n, n]` contiguous, n <= 128, p > 0, eps >= 0; NaN where X + eps I is not positive definite.

    out: where to write.
    """
    root = torch.empty_like(X) if out is None else out
    work, constants, options = configuration(X, precision, "inv_root")
    bits = map(float64_bits, (p, eps, unit))
    inv_root_kernel[(len(X),)](X, root, work, X.shape[-1], *bits, **constants, **options)
    return root
