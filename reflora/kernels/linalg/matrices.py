"""What the kernels over batches of `[n, n]` matrices share: loading with a power-of-two scale, slots, the launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cholesky import factor
from ..dtypes import exponent_of, power_of_two
from ..options import TYPES, launch_options
from ..routes import ROUTES, class_of

# slots of the workspace of a program, `[RC * RC + RC]` elements of TC each
SLOTS = tl.constexpr(5)


@triton.jit
def matrix_slot(work, index, number: tl.constexpr, RC: tl.constexpr):
    return work + (index.to(tl.int64) * SLOTS + number) * (RC * RC + RC)


@triton.jit
def load_scaled(
    p_matrices, index, n, p_slot, SYMMETRIC: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr
):
    """Matrix `index` (its symmetric part for SYMMETRIC) over an even power of two near its largest element, to a slot.

    Returns (exponent int64, usable): usable is 0 when an element is not finite; exponent is 0 for zeros.
    """
    j = tl.arange(0, RC)
    top = tl.full((), 0.0, tl.float64)
    for first in range(0, RC, BM):
        o, mask = panel_offsets(index, first, n, False, RC, BM)
        x = tl.abs(tl.load(p_matrices + o, mask=mask, other=0.0).to(tl.float64))
        top = tl.maximum(top, tl.max(tl.max(tl.where(x < float("inf"), x, float("inf")), 1), 0))
    usable = top < float("inf")
    exponent = exponent_of(tl.where(usable & (top > 0), top, 1.0))
    exponent = tl.minimum(tl.maximum(exponent, -1000), 1000) & -2
    scale = power_of_two(-exponent)
    for first in range(0, RC, BM):
        o, mask = panel_offsets(index, first, n, False, RC, BM)
        x = tl.load(p_matrices + o, mask=mask, other=0.0).to(tl.float64) * scale
        if SYMMETRIC:
            o, mask = panel_offsets(index, first, n, True, RC, BM)
            x = 0.5 * (x + tl.load(p_matrices + o, mask=mask, other=0.0).to(tl.float64) * scale)
        tl.store(p_slot + (first + tl.arange(0, BM))[:, None] * RC + j[None, :], x.to(TC))
    tl.debug_barrier()
    return exponent, tl.where(usable, 1, 0)


@triton.jit
def panel_offsets(index, first, n, TRANSPOSED: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr):
    """Element offsets and mask of BM rows of matrix `index` of a contiguous batch."""
    i, j = first + tl.arange(0, BM), tl.arange(0, RC)
    base = index.to(tl.int64) * n * n
    mask = (i < n)[:, None] & (j < n)[None, :]
    if TRANSPOSED:
        return base + j[None, :] * n + i[:, None], mask
    else:
        return base + i[:, None] * n + j[None, :], mask


@triton.jit
def load_factor(p_matrices, index, n, p_slot, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """Packed Cholesky factor of scaled matrix `index` into a slot. Returns (exponent, sound)."""
    exponent, usable = load_scaled(p_matrices, index, n, p_slot, True, RC, BM, TC)
    kappa = factor(p_slot, tl.full((), 1.0, TC), None, n, RC)
    return exponent, tl.where(kappa < float("inf"), usable, 0)


@triton.jit
def store_result(
    p_matrices, index, n, p_slot, exponent, sound, SYMMETRIC: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr
):
    """Matrix `index` becomes `2^exponent` times a slot (its symmetric part), NaN where sound is 0."""
    j = tl.arange(0, RC)
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)
        x = tl.load(p_slot + i[:, None] * RC + j[None, :]).to(tl.float64)
        if SYMMETRIC:
            x = 0.5 * (x + tl.load(p_slot + j[None, :] * RC + i[:, None]).to(tl.float64))
        x = tl.where(sound == 1, x * power_of_two(exponent), float("nan"))
        o, mask = panel_offsets(index, first, n, False, RC, BM)
        tl.store(p_matrices + o, x.to(p_matrices.dtype.element_ty), mask=mask)


def configuration(X: Tensor, precision: str) -> tuple[Tensor, dict[str, Any], dict[str, int]]:
    """(workspace, constants, options) for a batch `[batch, n, n]`, n <= 128."""
    rank_class = class_of(X.shape[-1])
    compute = getattr(torch, precision)
    elements = rank_class * rank_class + rank_class
    work = torch.empty(len(X), SLOTS.value, elements, dtype=compute, device=X.device)
    return work, constants(rank_class, precision), options(rank_class, precision)


def constants(rank_class: int, precision: str) -> dict[str, Any]:
    route = ROUTES[rank_class]
    return {"RC": rank_class, "BM": route.block_m, "BK": route.block_k, "TC": TYPES[getattr(torch, precision)]}


def options(rank_class: int, precision: str, kernel: str = "matrices") -> dict[str, int]:
    """kernel: the field of Route with its warps."""
    return launch_options(getattr(ROUTES[rank_class], kernel)[precision == "float64"])
