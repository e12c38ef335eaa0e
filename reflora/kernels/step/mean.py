"""From two Grams to S = (A A^T)^-1 # (B^T B): condition, polar factor, S and its inverse (docs/mathematics.md)."""

import triton
import triton.language as tl

from ... import constants
from .. import table as col
from ..cholesky import factor_all
from ..dtypes import normal_range, power_of_two
from ..solve import FACTOR_INVERSE, FACTOR_T, WHOLE, finish, multiply, polar_factor, polar_resident, product, read
from .chunks import any_bad, counts, reduce_chunks
from .pair import SLOT_A, SLOT_B, SLOT_N, SLOT_X, SLOT_Y, column, slot

KAPPA_OF_RANK = tl.constexpr(constants.KAPPA_OF_RANK["float32"])
# the largest that is solved in registers from there on; a larger one would spill
SMALL = tl.constexpr(16)


@triton.jit
def sum_and_decide(
    p_row, area, header, width, r, code, weight, KAPPA_MAX: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr,
    WIDE: tl.constexpr, TC: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Cholesky factors of the Grams that chunks have left, packed into SLOT_A and SLOT_B, and what follows from them.

    weight: as in `decide`. Returns (status, kappa_a, kappa_b, balance, c, norm_a, norm_b): int32 and float64 scalars,
    c = 1 where the ratio of the norms is of no use as a scale; SKIPPED where a chunk has met a gradient not finite.
    """
    chunks_a, chunks = counts(p_row, width)
    bad = any_bad(header, chunks)
    scale_a, norm_a, exponent_a, scale_b, norm_b, exponent_b = reduce_chunks(
        area, header, chunks_a, chunks, RC, BM, WIDE, TC, SCALED
    )
    c, useful = ratio(norm_a, exponent_a, norm_b, exponent_b, code)
    balance = imbalance(area, scale_a, norm_a, scale_b, norm_b, c, RC, BM, TC)
    status, kappa_a, kappa_b = decide(
        p_row, area, r, scale_a, norm_a, scale_b, norm_b, useful, weight, KAPPA_MAX, RC, TC
    )
    status, c = tl.where(bad, col.SKIPPED, status), tl.where(useful, c, 1.0)
    return (
        status, kappa_a, kappa_b, balance, c, norm_a * power_of_two(exponent_a), norm_b * power_of_two(exponent_b)
    )  # fmt: skip


@triton.jit
def decide(
    p_row, area, r, scale_a, norm_a, scale_b, norm_b, useful, weight, KAPPA_MAX: tl.constexpr, RC: tl.constexpr,
    TC: tl.constexpr,
):  # fmt: skip
    """From the Grams in SLOT_A and SLOT_B, which are factored in place: (status, kappa_a, kappa_b).

    weight: of the Grams, which are shrunk towards I / rank (reference.shrink_weight), float64; None for 1.
    """
    p_a = slot(area, SLOT_A, RC, TC)
    rank = fill_absent(area, r, scale_a, scale_b, (norm_a > 0) & (norm_b > 0), RC, TC)
    shift = None
    if weight is not None:
        shift = tl.zeros([2], TC) + ((1.0 - weight) / rank).to(TC)
        scale_a, scale_b = scale_a * weight.to(TC), scale_b * weight.to(TC)
    both = tl.arange(0, 2)
    apart = (RC * RC + RC) * (8 // (TC.primitive_bitwidth // 8))
    kappa = factor_all(p_a, apart, tl.where(both == 0, scale_a, scale_b), shift, r, RC, 2)
    kappa_a, kappa_b = tl.sum(tl.where(both == 0, kappa, 0.0), 0), tl.sum(tl.where(both == 1, kappa, 0.0), 0)
    if rank < r:
        kappa_a, kappa_b = of_present(kappa_a, r, rank), of_present(kappa_b, r, rank)
    kappa_a = tl.where(column(p_row, col.A_SIDE + col.N) < rank, float("inf"), kappa_a)
    kappa_b = tl.where(column(p_row, col.B_SIDE + col.N) < rank, float("inf"), kappa_b)
    most = bound(rank, KAPPA_MAX, TC)
    regular = useful & (kappa_a <= most) & (kappa_b <= most)
    finite = (norm_a < float("inf")) & (norm_b < float("inf"))
    status = tl.where(finite, tl.where(regular, col.REFACTORED, col.DEGENERATE), col.SKIPPED)
    return status, kappa_a, kappa_b


@triton.jit
def bound(rank, KAPPA_MAX: tl.constexpr, TC: tl.constexpr):
    """The condition estimate past which a layer is degenerate, float64."""
    most = tl.full((), KAPPA_MAX, tl.float64)
    if TC == tl.float32:
        most = tl.minimum(most, KAPPA_OF_RANK * tl.sqrt(rank.to(tl.float64)))
    return most


@triton.jit
def fill_absent(area, r, scale_a, scale_b, usable, RC: tl.constexpr, TC: tl.constexpr):
    """Number of a pair's ranks that are not 0 in both factors. In both Grams the others get the diagonal of I over it.

    usable: whether neither factor is 0.
    """
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    i = tl.arange(0, RC)
    o = i * (RC + 1)
    absent = (i < r) & (tl.load(p_a + o) == 0) & (tl.load(p_b + o) == 0)
    rank = tl.where(usable, r - tl.sum(tl.where(absent, 1, 0), 0), r)
    if rank < r:
        # read by all before any of it is overwritten
        tl.debug_barrier()
        each = 1.0 / rank.to(TC)
        tl.store(p_a + o, tl.zeros([RC], TC) + each / scale_a, mask=absent)
        tl.store(p_b + o, tl.zeros([RC], TC) + each / scale_b, mask=absent)
        tl.debug_barrier()
    return rank


@triton.jit
def of_present(kappa, r, rank):
    """A condition estimate without the part of absent ranks."""
    count, others = (r - rank).to(tl.float64), rank.to(tl.float64)
    return tl.sqrt(kappa * kappa / (1.0 + count / others) - count * others)


@triton.jit
def ratio(norm_a, exponent_a, norm_b, exponent_b, code):
    """c = ||B|| / ||A||, and whether c and 1 / c are normal numbers of the type it is applied in."""
    shift = exponent_b - exponent_a
    half = shift >> 1
    c = norm_b / norm_a * power_of_two(half) * power_of_two(shift - half)
    tiny, huge = normal_range(code)
    usable = (norm_a > 0) & (norm_b > 0) & (norm_a < float("inf")) & (norm_b < float("inf"))
    return c, usable & (c >= tiny) & (c <= huge) & (1.0 / c >= tiny) & (1.0 / c <= huge)


@triton.jit
def imbalance(
    area, scale_a, norm_a, scale_b, norm_b, c, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr
):  # fmt: skip
    """`||Ga - Gb||_F / ||Ga||_F` of the factors themselves, from SLOT_A and SLOT_B and what makes their traces 1."""
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    j = tl.arange(0, RC)
    squares = tl.zeros([2], tl.float64)
    for first in range(0, RC, BM):
        o = (first + tl.arange(0, BM))[:, None] * RC + j[None, :]
        a = (tl.load(p_a + o) * scale_a).to(tl.float64)
        d = a - (tl.load(p_b + o) * scale_b).to(tl.float64) * (c * c)
        squares += tl.sum(tl.join(tl.sum(d * d, 1), tl.sum(a * a, 1)), 0)
    between, size = tl.split(squares)
    balance = tl.sqrt(between / size)
    return tl.where((norm_a > 0) & (norm_b > 0), balance, tl.where(norm_a > 0, 1.0, float("inf")))


@triton.jit
def polar_of_pair(
    area, r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr, KEEP_N: tl.constexpr
):
    """Q of `N = Lb^T La = Q H` into SLOT_X, from the packed factors; N into SLOT_N for KEEP_N."""
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    p_x, p_y = slot(area, SLOT_X, RC, TC), slot(area, SLOT_Y, RC, TC)
    multiply(p_x, p_b, FACTOR_T, False, p_a, FACTOR_T, True, r, RC, BM, BK, TC)
    multiply(p_y, p_b, FACTOR_INVERSE, False, p_a, FACTOR_INVERSE, True, r, RC, BM, BK, TC)
    tl.debug_barrier()
    if KEEP_N:
        i = tl.arange(0, RC)
        o = i[:, None] * RC + i[None, :]
        tl.store(slot(area, SLOT_N, RC, TC) + o, tl.load(p_x + o))
    polar_factor(p_x, p_y, r, RC, BM, BK, TC)


@triton.jit
def form_s(
    area, r, c, code, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr
):
    """`S = c La^-T Q^T Lb^T` and `S^-1 = Lb^-T Q La^T / c`, as WIDE elements, to where `mixer` finds them.

    Returns 1 if every element is finite in the type that S is applied in, else 0.
    """
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    p_x, p_y = slot(area, SLOT_X, RC, TC), slot(area, SLOT_Y, RC, TC)
    p_n = slot(area, SLOT_N, RC, TC)
    multiply(p_y, p_x, WHOLE, True, p_b, FACTOR_T, False, r, RC, BM, BK, TC)
    multiply(p_n, p_x, WHOLE, False, p_a, FACTOR_T, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    multiply(p_x, p_a, FACTOR_INVERSE, True, p_y, WHOLE, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    multiply(p_y, p_b, FACTOR_INVERSE, True, p_n, WHOLE, False, r, RC, BM, BK, TC)
    tl.debug_barrier()
    tiny, huge = normal_range(code)
    fits = finish(mixer(area, False, RC, WIDE), p_x, c, huge, True, RC, BM, WIDE)
    fits &= finish(mixer(area, True, RC, WIDE), p_y, 1.0 / c, huge, True, RC, BM, WIDE)
    tl.debug_barrier()
    return fits


@triton.jit
def form_resident(area, r, c, code, RC: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr):
    """`polar_of_pair` and `form_s` of small matrices, which stay in registers: slots are read once, all at a time."""
    p_a, p_b = slot(area, SLOT_A, RC, TC), slot(area, SLOT_B, RC, TC)
    i, j = tl.arange(0, RC)[:, None], tl.arange(0, RC)[None, :]
    la_t, lb_t = read(p_a, i, j, RC, FACTOR_T), read(p_b, i, j, RC, FACTOR_T)
    la_inverse, lb_inverse = read(p_a, i, j, RC, FACTOR_INVERSE), read(p_b, i, j, RC, FACTOR_INVERSE)
    x = product(lb_t, tl.trans(la_t), TC)
    y = product(lb_inverse, tl.trans(la_inverse), TC)
    x = polar_resident(x, y, r, RC, TC)
    S = product(tl.trans(la_inverse), product(tl.trans(x), lb_t, TC), TC)
    S_inv = product(tl.trans(lb_inverse), product(x, la_t, TC), TC)
    tiny, huge = normal_range(code)
    fits = keep(mixer(area, False, RC, WIDE), S, c, huge, RC, WIDE)
    fits &= keep(mixer(area, True, RC, WIDE), S_inv, 1.0 / c, huge, RC, WIDE)
    tl.debug_barrier()
    return fits


@triton.jit
def keep(p_out, x, factor, limit, RC: tl.constexpr, TYPE: tl.constexpr):
    """As `finish`, of a matrix in registers. The slots that it overwrites have been read by all."""
    x = x.to(tl.float64)
    x = 0.5 * (x + tl.trans(x)) * factor
    tl.store(p_out + tl.arange(0, RC)[:, None] * RC + tl.arange(0, RC)[None, :], x.to(TYPE))
    return 1 - tl.max(tl.max(tl.where(tl.abs(x) <= limit, 0, 1), 1), 0)


@triton.jit
def solve_s(
    area, r, status, c, code, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, TC: tl.constexpr
):
    """S and S^-1 of a row that `decide` has found REFACTORED or DEGENERATE. Returns its status after that."""
    if status == col.REFACTORED:
        if RC <= SMALL:
            fits = form_resident(area, r, c, code, RC, WIDE, TC)
        else:
            polar_of_pair(area, r, RC, BM, BK, TC, False)
            fits = form_s(area, r, c, code, RC, BM, BK, WIDE, TC)
        if fits == 0:
            status = tl.full((), col.DEGENERATE, tl.int32)
    if status == col.DEGENERATE:
        form_scaled_identity(area, c, 1.0 / c, RC, WIDE)
    return status


@triton.jit
def form_scaled_identity(area, value, inverse, RC: tl.constexpr, TYPE: tl.constexpr):
    """S becomes value I and S^-1 inverse I."""
    i = tl.arange(0, RC)
    o = i[:, None] * RC + i[None, :]
    diagonal = i[:, None] == i[None, :]
    zeros = tl.zeros([RC, RC], TYPE)
    tl.store(mixer(area, False, RC, TYPE) + o, tl.where(diagonal, value.to(TYPE), zeros))
    tl.store(mixer(area, True, RC, TYPE) + o, tl.where(diagonal, inverse.to(TYPE), zeros))
    tl.debug_barrier()


@triton.jit
def mixer(area, INVERSE: tl.constexpr, RC: tl.constexpr, TYPE: tl.constexpr):
    """S, or S^-1, at the beginning of an area."""
    p = area.to(tl.pointer_type(TYPE))
    if INVERSE:
        p += RC * RC
    return p
