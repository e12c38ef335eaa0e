"""RefLoRA-S: squares of a chunk's columns, the norms of a row, and its balance scalar, `s = root^2 = ||B|| / ||A||`.

A sum of squares is `sum * 2^(2 exponent)`: in float64 storage the exponent follows the largest element met so far.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import table as col
from ..dtypes import BFLOAT16, balanced_fits, exponent_of, load, power_of_two
from .chunks import FACTOR_A, FACTOR_B, NUMBER, RUN, any_bad, counts, never_finite, span, store_bad
from .gather import entry, part
from .launch import RankClass, scalar_constants, taken
from .mean import ratio
from .pair import block_zeros, column, offsets, report
from .settle import refuse

# what a chunk leaves in its row's workspace: sum and exponent, of the columns as they are and as they will be
BEFORE, AFTER, PART = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def no_squares(SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr):
    """(sums, exponent) to begin with."""
    return block_zeros(SIDE, RC, BN, tl.float64), tl.full((), -1000 if WIDE == tl.float64 else 0, tl.int64)


@triton.jit
def add_squares(acc, exponent, x, WIDE: tl.constexpr):
    x = x.to(tl.float64)
    if WIDE == tl.float64:
        top = tl.max(tl.max(tl.abs(x), 1), 0)
        own = exponent_of(tl.where((top > 0) & (top < float("inf")), top, power_of_two(exponent)))
        larger = tl.minimum(tl.maximum(own, exponent), 1000)
        acc *= power_of_two(tl.maximum(2 * (exponent - larger), -1000))
        exponent = larger
        x *= power_of_two(-exponent)
    return acc + x * x, exponent


@triton.jit
def store_squares(parts, chunk, acc, exponent, WHEN: tl.constexpr):
    p = parts + chunk * PART + WHEN
    tl.store(p, tl.sum(tl.sum(acc, 1), 0))
    tl.store(p + 1, exponent.to(tl.float64))


@triton.jit
def total_norm(parts, first, last, WHEN: tl.constexpr):
    """`||.||_F` of a side, from its chunks in a fixed order, as `norm * 2^exponent`."""
    top = tl.full((), -1000.0, tl.float64)
    for chunk in range(first, last):
        top = tl.maximum(top, tl.load(parts + chunk * PART + WHEN + 1))
    acc = tl.full((), 0.0, tl.float64)
    for chunk in range(first, last):
        p = parts + chunk * PART + WHEN
        acc += tl.load(p) * power_of_two(tl.maximum(2 * (tl.load(p + 1) - top).to(tl.int64), -1000))
    return tl.sqrt(acc), top.to(tl.int64)


@triton.jit
def look_at_side(
    p_row, parts, header, chunk, own_chunk, width, r, code, SIDE: tl.constexpr, CHECK: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The squares of a chunk as it is, and for CHECK whether its gradient is finite."""
    begin, end = span(p_row, own_chunk, width, SIDE)
    p, sr, sn = column(p_row, SIDE + col.P), column(p_row, SIDE + col.P_SR), column(p_row, SIDE + col.P_SN)
    p_g, g_sr, g_sn = column(p_row, SIDE + col.G), column(p_row, SIDE + col.G_SR), column(p_row, SIDE + col.G_SN)
    bad = block_zeros(SIDE, RC, BN, tl.int32)
    acc, exponent = no_squares(SIDE, RC, BN, WIDE)
    for start in range(begin, end, BN):
        o, mask = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        acc, exponent = add_squares(acc, exponent, load(p, o, mask, code, DTYPE, WIDE, VECTOR), WIDE)
        if CHECK:
            o, mask = offsets(start, g_sr, g_sn, r, end, SIDE, RC, BN, VECTOR)
            bad = tl.maximum(bad, never_finite(load(p_g, o, mask, code, DTYPE, WIDE, VECTOR)))
    store_squares(parts, chunk, acc, exponent, BEFORE)
    store_bad(header, chunk, bad)


@triton.jit
def look(
    p_row, parts, header, chunk, chunks_a, width, r, code, CHECK: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    if chunk < chunks_a:
        look_at_side(
            p_row, parts, header, chunk, chunk, width, r, code, col.A_SIDE, CHECK, RC, BN, DTYPE, WIDE, VECTOR
        )  # fmt: skip
    else:
        look_at_side(
            p_row, parts, header, chunk, chunk - chunks_a, width, r, code, col.B_SIDE, CHECK, RC, BN, DTYPE, WIDE,
            VECTOR,
        )  # fmt: skip


@triton.jit
def balance_root(norm_a, exponent_a, norm_b, exponent_b, code):
    """(status, root): sqrt(s), rounded to a power of two for half-precision storage, which is exact; 1 if unusable."""
    s, useful = ratio(norm_a, exponent_a, norm_b, exponent_b, code)
    useful &= balanced_fits(norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b), code)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    status = tl.where(finite, tl.where(useful, col.REFACTORED, col.DEGENERATE), col.SKIPPED)
    s = tl.where(useful, s, 1.0)
    return status, tl.where(code >= BFLOAT16, power_of_two(nearest_root(s)), tl.sqrt(s))


@triton.jit
def nearest_root(s):
    """Exponent of the power of two next to sqrt(s) by ratio, the even one of two: by bits, since tl.log2 is inexact."""
    exponent = exponent_of(s)
    n = exponent >> 1
    between = (exponent % 2 == 0) & (s == power_of_two(exponent - 1))
    return n - tl.where(between & (n % 2 != 0), 1, 0)


@triton.jit
def squares_kernel(
    table, items, headers, work, CHECK: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The squares of a chunk, a program each; arguments as gram_kernel's."""
    _, chunk, _, width, p_row, parts, header, r, code = part(table, items, headers, work, RC, WIDE)
    chunks_a, _ = counts(p_row, width)
    if column(p_row, col.ACTIVE) != 0:
        look(p_row, parts, header, chunk, chunks_a, width, r, code, CHECK, RC, BN, DTYPE, WIDE, VECTOR)


@triton.jit
def balance_kernel(
    table, rows, headers, results, work, GRADIENTS: tl.constexpr, RC: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """What both sides of a row are multiplied by: the factors, or for GRADIENTS these. One program per row."""
    row, width, p_row, parts, header, r, code = entry(table, rows, headers, work, RC, WIDE)
    if column(p_row, col.ACTIVE) == 0:
        refuse(row, header, results)
    else:
        chunks_a, chunks = counts(p_row, width)
        norm_a, exponent_a = total_norm(parts, 0, chunks_a, BEFORE)
        norm_b, exponent_b = total_norm(parts, chunks_a, chunks, BEFORE)
        status, root = balance_root(norm_a, exponent_a, norm_b, exponent_b, code)
        status = tl.where(any_bad(header, chunks), col.SKIPPED, status)
        s = root * root
        factor_a, factor_b = root, 1.0 / root
        if GRADIENTS:
            factor_a, factor_b = 1.0 / s, s
        tl.store(header + FACTOR_A, factor_a)
        tl.store(header + FACTOR_B, factor_b)
        tl.store(header + RUN, tl.where(status == col.REFACTORED, NUMBER, 0).to(tl.float64))
        nan = tl.full((), float("nan"), tl.float64)
        norm_a, norm_b = norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
        report(results, row, status, nan, nan, nan, s, norm_a, norm_b)


def balance_rows(
    group: RankClass, table: Tensor, results: Tensor, constants: dict[str, Any], gradients: bool
) -> None:  # fmt: skip
    """The balance scalars of a group's rows, for its gradients or its factors."""
    kept = {**constants, **scalar_constants(group), "CHECK": gradients, "GRADIENTS": gradients}
    squares_kernel[(len(group.items),)](
        table, group.items, group.headers, group.workspace, **taken(squares_kernel, kept),
        **group.scalar_options,
    )  # fmt: skip
    balance_kernel[(len(group.rows),)](
        table, group.entries, group.headers, results, group.workspace, **taken(balance_kernel, kept),
        **group.scalar_options,
    )  # fmt: skip
