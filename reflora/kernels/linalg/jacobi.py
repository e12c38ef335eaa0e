"""Eigenvectors of a symmetric matrix by one program: one-sided Jacobi on a positive definite shift of it.

`Y = X + sigma I` is positive definite and its condition at most 41, so the left singular vectors of `G = Y U` are the
eigenvectors of X, for any orthogonal U. Rotations of the columns of G make them orthogonal; no V is kept beside it.

G lies in registers as two blocks `[RC, RC / 2]`, its even and its odd columns. A sweep is an odd-even transposition
sort: neighbours meet, rotate and change places, so that after n rounds each column has met each other one and their
order is reversed. A pair needs no search for its partner, and every second round moves one block one column on and
back (warp shuffles). In the first sweeps a pair changes places only towards the sorted order: equal eigenvalues must
be neighbours for the last sweeps to converge quadratically.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import exponent_of, power_of_two
from ..solve import WHOLE, multiply, rounding, schulz_panels, slot_norm, squared_distance
from . import matrices
from .arrange import order
from .householder import orthogonal_factor

# far more sweeps than any X takes: 4 to 9, at most 19
SWEEPS = tl.constexpr(40)
# sweeps that sort; later ones reverse the order whatever it is, and so always meet all pairs
SORTING = tl.constexpr(4)
# at most so many passes from a fresh product Y U
PASSES = tl.constexpr(3)
# a warm start is used up to so far from orthogonal, in the Frobenius norm
WARM_LIMIT = tl.constexpr(0.1)
# a QR factorisation, as dear as two sweeps, comes first where n is so many times the effective rank: it saves 3 to 9
GRADED = tl.constexpr(6)


@triton.jit
def eigen(
    p_x, p_u, p_z, p_t, n, warm, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """Slot `p_u` becomes the eigenvectors of the symmetric X in slot `p_x` (finite, elements below 1), in any order.

    The vector of slot `p_t` becomes their eigenvalues; slots `p_z`, `p_t` are scratch. `p_u` holds a nearly orthogonal
    start where warm is 1. Returns the number of sweeps.
    """
    sigma, size, rank = measure(p_x, p_z, p_t, n, RC, BM, BK, TC)
    start(p_x, p_u, p_z, p_t, n, warm, rank, RC, BM, BK, TC)
    sweeps = 0
    left = 0
    while left < PASSES:
        multiply(p_z, p_x, WHOLE, False, p_u, WHOLE, False, n, RC, BM, BK, TC)
        tl.debug_barrier()
        sweeps = orthogonal_columns(p_u, p_z, sigma, n, sweeps, RC, TC)
        orthogonalise(p_u, p_z, n, RC, BM, BK, TC)
        multiply(p_z, p_x, WHOLE, False, p_u, WHOLE, False, n, RC, BM, BK, TC)
        tl.debug_barrier()
        multiply(p_t, p_u, WHOLE, True, p_z, WHOLE, False, n, RC, BM, BK, TC)
        tl.debug_barrier()
        stubborn = correction(p_z, p_t, RC, BM, TC)
        tl.debug_barrier()
        schulz_panels(p_u, p_z, 1.0, -1.0, n, RC, BM, BK, TC)
        tl.debug_barrier()
        orthogonalise(p_u, p_z, n, RC, BM, BK, TC)
        # what the rotations have left of a cluster is their rounding: once more, from a product that has none of it
        left = tl.where(stubborn <= 3.0 * rounding(TC) * size, PASSES, left + 1)
    multiply(p_z, p_x, WHOLE, False, p_u, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    j = tl.arange(0, RC)
    values, squares = tl.zeros([RC], TC), tl.zeros([RC], TC)
    for first in range(0, RC, BM):
        o = (first + tl.arange(0, BM))[:, None] * RC + j[None, :]
        u = tl.load(p_u + o)
        values += tl.sum(u * tl.load(p_z + o), 0)
        squares += tl.sum(u * u, 0)
    tl.store(p_t + RC * RC + j, values / tl.where(squares > 0, squares, 1.0))
    tl.debug_barrier()
    return sweeps


@triton.jit
def normalise(p_slot, exponent, usable, RC: tl.constexpr, BM: tl.constexpr):
    """Scales a slot to a largest element in [0.5, 1), and clears it where usable is 0. Returns the new exponent.

    `load_scaled` leaves elements far from 1 where they were denormal or near overflow.
    """
    j = tl.arange(0, RC)[None, :]
    top = tl.full((), 0.0, tl.float64)
    for first in range(0, RC, BM):
        x = tl.load(p_slot + (first + tl.arange(0, BM))[:, None] * RC + j)
        top = tl.maximum(top, tl.max(tl.max(tl.abs(x), 1), 0).to(tl.float64))
    further = exponent_of(tl.where((usable == 1) & (top > 0), top, 0.5))
    factor = power_of_two(-further)
    for first in range(0, RC, BM):
        o = (first + tl.arange(0, BM))[:, None] * RC + j
        x = tl.load(p_slot + o)
        tl.store(p_slot + o, tl.where(usable == 1, x * factor.to(x.dtype), 0.0))
    tl.debug_barrier()
    return exponent + further


@triton.jit
def measure(p_x, p_z, p_t, n, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr):
    """The shift, `||X||_F` and an effective rank.

    The shift is 5 % more than the bound `||X^4||_F^(1/4)` of `||X||_2`, 1 for X = 0.
    The rank is `||X||_F^4 / ||X^2||_F^2`: how many eigenvalues there would be, were all that count of one size.
    """
    multiply(p_z, p_x, WHOLE, False, p_x, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    multiply(p_t, p_z, WHOLE, False, p_z, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    size, square, fourth = slot_norm(p_x, RC, BM, TC), slot_norm(p_z, RC, BM, TC), slot_norm(p_t, RC, BM, TC)
    rank = size * size / tl.where(square > 0, square, 1.0)
    return tl.where(fourth > 0, 1.05 * tl.sqrt(tl.sqrt(fourth)), 1.0), size, rank * rank


@triton.jit
def start(
    p_x, p_u, p_z, p_t, n, warm, rank, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """Slot `p_u` becomes the orthogonal matrix U to start from: nearly what it holds, if that is nearly so, or else I.

    Where the eigenvalues are of many sizes it becomes Q of `X U = Q R`, longest columns first, which are then near the
    eigenvectors of the large ones.
    """
    away = tl.full((), 1.0, TC)
    if warm == 1:
        multiply(p_z, p_u, WHOLE, True, p_u, WHOLE, False, n, RC, BM, BK, TC)
        tl.debug_barrier()
        away = tl.sqrt(squared_distance(p_z, 1.0, n, RC, BM, TC))
    if away <= WARM_LIMIT:
        schulz_panels(p_u, p_z, 1.5, 0.5, n, RC, BM, BK, TC)
    else:
        j = tl.arange(0, RC)[None, :]
        for first in range(0, RC, BM):
            i = first + tl.arange(0, BM)[:, None]
            tl.store(p_u + i * RC + j, tl.where((i == j) & (i < n), 1.0, 0.0).to(TC))
    tl.debug_barrier()
    if rank * GRADED < n:
        multiply(p_z, p_x, WHOLE, False, p_u, WHOLE, False, n, RC, BM, BK, TC)
        tl.debug_barrier()
        sort_columns(p_z, p_t + RC * RC, p_u, n, RC, BM)
        orthogonal_factor(p_u, p_t, n, RC, TC)


@triton.jit
def sort_columns(p_z, p_norms, p_u, n, RC: tl.constexpr, BM: tl.constexpr):
    """Slot `p_u` becomes the columns of slot `p_z`, the longest first; a vector at `p_norms` is scratch."""
    i = tl.arange(0, RC)[:, None]
    for first in range(0, RC, BM):
        c = first + tl.arange(0, BM)
        z = tl.load(p_z + i * RC + c[None, :])
        tl.store(p_norms + c, tl.sum(z * z, 0))
    tl.debug_barrier()
    for first in range(0, RC, BM):
        c = first + tl.arange(0, BM)
        rank = order(p_norms, c, n, True, RC, BM)
        tl.store(p_u + i * RC + rank[None, :], tl.load(p_z + i * RC + c[None, :]))
    tl.debug_barrier()


@triton.jit
def orthogonalise(p_u, p_z, n, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr):
    """One Newton-Schulz step `U <- U (3 I - U^T U) / 2` of slot `p_u`; slot `p_z` is scratch."""
    multiply(p_z, p_u, WHOLE, True, p_u, WHOLE, False, n, RC, BM, BK, TC)
    tl.debug_barrier()
    schulz_panels(p_u, p_z, 1.5, 0.5, n, RC, BM, BK, TC)
    tl.debug_barrier()


@triton.jit
def correction(p_e, p_h, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """Slot `p_e` becomes E such that `U (I + E)` diagonalises X to first order, where slot `p_h` holds `U^T X U`.

    E is 0 where first order is not enough; returns the Frobenius norm of those elements of `U^T X U`.
    """
    j = tl.arange(0, RC)[None, :]
    # E^2 is what one Newton-Schulz step mends
    most = 0.3 * tl.sqrt(tl.sqrt(rounding(TC)))
    square = tl.full((), 0.0, TC)
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        h = 0.5 * (tl.load(p_h + i * RC + j) + tl.load(p_h + j * RC + i))
        gap = tl.load(p_h + j * RC + j) - tl.load(p_h + i * RC + i)
        simple = (i != j) & (gap != 0.0) & (tl.abs(h) <= most * tl.abs(gap))
        tl.store(p_e + i * RC + j, tl.where(simple, h / tl.where(simple, gap, 1.0), 0.0))
        h = tl.where(simple | (i == j), 0.0, h)
        square += tl.sum(tl.sum(h * h, 1), 0)
    return tl.sqrt(square)


@triton.jit
def orthogonal_columns(p_u, p_z, sigma, n, sweeps, RC: tl.constexpr, TC: tl.constexpr):
    """Slot `p_u` becomes the left singular vectors of `G = Z + sigma U`. Returns the count of sweeps with these."""
    HC: tl.constexpr = RC // 2
    even = tl.arange(0, RC)[:, None] * RC + 2 * tl.arange(0, HC)[None, :]
    L = tl.load(p_z + even) + sigma * tl.load(p_u + even)
    R = tl.load(p_z + even + 1) + sigma * tl.load(p_u + even + 1)
    tolerance = rounding(tl.float64 if TC == tl.float64 else tl.float32).to(tl.float32) * tl.sqrt(n.to(tl.float32))
    going = 1
    while (going == 1) & (sweeps < SWEEPS):
        direction = tl.where(sweeps % 2 == 0, 1.0, -1.0)
        L, R, cosine, tangent, complete = sweep(L, R, n, direction, sweeps < SORTING, RC, TC)
        # what is left is at most of the order of the cosines that were there, times the tangents that were turned by
        cosine = cosine * tl.minimum(tangent * tl.sqrt(n.to(tl.float32)), 1.0)
        going = tl.where((complete == 1) & (cosine <= tolerance), 0, 1)
        sweeps += 1
    L, R = unit_columns(L), unit_columns(R)
    tl.debug_barrier()
    tl.store(p_u + even, L)
    tl.store(p_u + even + 1, R)
    tl.debug_barrier()
    return sweeps


@triton.jit
def unit_columns(G):
    square = tl.sum(G * G, 0)
    return G * tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)[None, :]


@triton.jit
def sweep(L, R, n, direction, sorting, RC: tl.constexpr, TC: tl.constexpr):
    """n rounds: every pair of columns meets once if all change places.

    direction: 1.0 to sort the norms of columns down, -1.0 up. Returns L, R, the largest cosine between two columns, the
    largest tangent of a rotation, both float32, and whether all have changed places.
    """
    HC: tl.constexpr = RC // 2
    c = tl.arange(0, HC)
    # neighbours in norm change places all the same: order within rounding means nothing
    slack = tl.where(sorting, 32 * rounding(TC), 2.0).to(TC)
    direction = direction.to(TC)
    next, last = (c + 1) % HC, (c + HC - 1) % HC
    row = tl.zeros([RC, 1], tl.int32)
    left, right = tl.sum(L * L, 0), tl.sum(R * R, 0)
    cosine, tangent, complete = tl.zeros([HC], tl.float32), tl.zeros([HC], tl.float32), tl.full([HC], 1, tl.int32)
    for number in range(0, (n + 1) // 2):
        L, R, left, right, cosine, tangent, complete = meet(
            L, R, left, right, 2 * c + 1 < n, direction, slack, cosine, tangent, complete, TC
        )
        L, left = tl.gather(L, row + next[None, :], 1), tl.gather(left, next, 0)
        # an odd n has one round less
        paired = (2 * c + 2 < n) & (2 * number + 1 < n)
        R, L, right, left, cosine, tangent, complete = meet(
            R, L, right, left, paired, direction, slack, cosine, tangent, complete, TC
        )
        L, left = tl.gather(L, row + last[None, :], 1), tl.gather(left, last, 0)
    return L, R, tl.max(cosine, 0), tl.max(tangent, 0), tl.min(complete, 0)


@triton.jit
def meet(L, R, left, right, paired, direction, slack, cosine, tangent, complete, TC: tl.constexpr):
    """Columns of L and R meet, where paired: they become orthogonal and, if in order, change places.

    left, right: their squared norms. The other arguments, and what is returned, are those of `sweep`, by column.
    """
    product = tl.sum(L * R, 0)
    own = tl.where(paired, tl.abs(product).to(tl.float32) * tl.rsqrt((left * right).to(tl.float32)), 0.0)
    # a rotation by less than rounding would only add its own
    product = tl.where(own > 0.5 * rounding(TC).to(tl.float32), product, 0.0)
    t, cos = rotation(right - left, product, TC)
    sin = t * cos
    change = paired & ((right - left) * direction >= -slack * (left + right))
    a, b = tl.where(change, sin, cos), tl.where(change, cos, -sin)
    L, R = a[None, :] * L + b[None, :] * R, b[None, :] * L - a[None, :] * R
    low, high = left - t * product, right + t * product
    left, right = tl.where(change, high, low), tl.where(change, low, high)
    cosine, tangent = tl.maximum(cosine, own), tl.maximum(tangent, tl.abs(t).to(tl.float32))
    return L, R, left, right, cosine, tangent, tl.where(change | (paired == 0), complete, 0)


@triton.jit
def rotation(difference, product, TC: tl.constexpr):
    """Tangent, at most 1, and cosine of the angle that makes two columns orthogonal.

    The tangent is of float32 accuracy, which only costs a part of 1e7 of the progress; the cosine must fit it.
    """
    h, g = difference.to(tl.float32), 2.0 * product.to(tl.float32)
    length = tl.abs(h) + tl.sqrt(h * h + g * g)
    t = g / tl.where(length > 0, length, 1.0)
    t = tl.where(h < 0, -t, t)
    cos = tl.rsqrt(1.0 + t * t).to(TC)
    t = t.to(TC)
    error = 1.0 - (1.0 + t * t) * cos * cos
    if TC == tl.float64:
        cos += cos * error * (0.5 + 0.375 * error)
    else:
        cos += 0.5 * cos * error
    return t, cos


def configuration(X: Tensor, precision: str, kernel: str) -> tuple[Tensor, dict[str, Any], dict[str, int]]:
    """As `matrices.configuration`, for a kernel with an eigen stage."""
    work, shapes, _ = matrices.configuration(X, precision)
    return work, constants(shapes["RC"], precision), matrices.options(shapes["RC"], precision, kernel)


def constants(rank_class: int, precision: str) -> dict[str, Any]:
    # panels of 16 rows: with more, products take the registers that hold G
    return {**matrices.constants(rank_class, precision), "BM": 16}
