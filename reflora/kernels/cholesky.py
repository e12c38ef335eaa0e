"""Cholesky factors of small matrices with their inverses, of one program: 16 columns at a time.

A column of a block of two matrices has 32 elements, one to each lane of a warp. Every warp holds them all, each column
as a vector of its own: a pivot then costs shuffles, no shared memory and no barrier. Between blocks are products.
"""

import triton
import triton.language as tl

from .solve import FACTOR_INVERSE, FACTOR_T, read

BLOCK = tl.constexpr(16)


@triton.jit
def factor(p_slot, scale, shift, r, RC: tl.constexpr):
    """As `factor_all`, of the matrix in one slot; scale and the condition estimate are scalars."""
    one = tl.zeros([1], scale.dtype)
    if shift is not None:
        shift = one + shift
    return tl.sum(factor_all(p_slot, 0, one + scale, shift, r, RC, 1), 0)


@triton.jit
def factor_all(p_slot, apart, scale, shift, r, RC: tl.constexpr, COUNT: tl.constexpr):
    """Cholesky `G = L L^T` and `L^-1` of `scale` times each of COUNT symmetric matrices, packed in their place.

    The matrices lie in slots `apart` elements from each other, zero outside their leading `[r, r]`; scale `[COUNT]`;
    shift `[COUNT]`: what is added to the diagonals after that, or None. `L^-1` in the lower triangle, `L^T` above it,
    the diagonal of L in the slot's vector. Returns the condition estimates `||L||_F ||L^-1||_F`, float64 `[COUNT]`, inf
    where a pivot was not positive. COUNT is at most 2.
    """
    which = tl.arange(0, COUNT)
    sound = tl.full([COUNT, BLOCK], 1, tl.int32)
    if RC > BLOCK:
        tl.store(p_slot + which[:, None] * apart + RC * RC + tl.arange(0, RC)[None, :], 0.0)
    for first in range(0, r, BLOCK):
        if RC > BLOCK:
            for m in tl.static_range(COUNT):
                own = chosen(shift, which == m)
                reduce_rows(p_slot + m * apart, chosen(scale, which == m), own, first, r, RC)
            tl.debug_barrier()
            sound = factor_block(p_slot, apart, None, None, first, r, sound, RC, COUNT)
            for m in tl.static_range(COUNT):
                finish_rows(p_slot + m * apart, first, RC)
            tl.debug_barrier()
        else:
            sound = factor_block(p_slot, apart, scale, shift, first, r, sound, RC, COUNT)
    return tl.where(tl.min(sound, 1) == 1, condition(p_slot, apart, RC, COUNT), float("inf"))


@triton.jit
def chosen(values, where):
    """The one of `[COUNT]` values that is `where`, as a scalar; None of None."""
    if values is None:
        return None
    else:
        return tl.sum(tl.where(where, values, 0.0), 0)


@triton.jit
def reduce_rows(p_slot, scale, shift, first, r, RC: tl.constexpr):
    """What the rows before `first` leave of a block of rows: of G on and right of the diagonal, of I left of it."""
    i, j = first + tl.arange(0, BLOCK), tl.arange(0, RC)
    right_of = j[None, :] >= first
    o = i[:, None] * RC + j[None, :]
    rest = tl.load(p_slot + o, mask=right_of, other=0.0) * scale
    if shift is not None:
        rest += tl.where((i[:, None] == j[None, :]) & (j < r)[None, :], shift, 0.0)
    taken = tl.zeros([BLOCK, RC], rest.dtype)
    for start in range(0, first, BLOCK):
        k = start + tl.arange(0, BLOCK)
        left = tl.trans(tl.load(p_slot + k[:, None] * RC + i[None, :]))
        right = tl.load(p_slot + k[:, None] * RC + j[None, :])
        right = tl.where(right_of | (j[None, :] <= k[:, None]), right, 0.0)
        taken = tl.dot(left, right, taken, input_precision="ieee", out_dtype=rest.dtype)
    # the block is read by all before any of it is overwritten
    tl.debug_barrier()
    tl.store(p_slot + o, rest - taken)


@triton.jit
def finish_rows(p_slot, first, RC: tl.constexpr):
    """A block of rows beside its diagonal block, once that is factored."""
    i, k, j = first + tl.arange(0, BLOCK), first + tl.arange(0, BLOCK), tl.arange(0, RC)
    beside = (j < first) | (j >= first + BLOCK)
    left = tl.load(p_slot + i[:, None] * RC + k[None, :])
    left = tl.where(i[:, None] >= k[None, :], left, 0.0)
    right = tl.load(p_slot + k[:, None] * RC + j[None, :], mask=beside[None, :], other=0.0)
    rows = tl.dot(left, right, input_precision="ieee", out_dtype=left.dtype)
    # read by all before any of it is overwritten
    tl.debug_barrier()
    tl.store(p_slot + i[:, None] * RC + j[None, :], rows, mask=beside[None, :])


@triton.jit
def factor_block(p_slot, apart, scale, shift, first, r, sound, RC: tl.constexpr, COUNT: tl.constexpr):
    """Diagonal blocks of all matrices, packed in their place. Returns sound, 0 where a pivot was not positive."""
    which = tl.arange(0, COUNT)
    i, j = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    p = p_slot + which[:, None, None] * apart + first * (RC + 1)
    size = tl.minimum(r - first, BLOCK)
    block = tl.load(p + i * RC + j)
    if scale is not None:
        block *= scale[:, None, None]
    if shift is not None:
        block += tl.where(i == j, shift[:, None, None], 0.0)
    # the identity beyond r
    columns = unstack(tl.where((i < size) & (j < size), block, tl.where(i == j, 1.0, 0.0)), COUNT)
    pivots = tl.full([COUNT, BLOCK], 1.0, block.dtype)
    for pivot in range(0, size):
        columns, pivots, sound = eliminate(columns, pivots, sound, pivot, COUNT)
    diagonal = tl.sqrt(pivots)
    within = (tl.arange(0, BLOCK) < size)[None, :]
    inverse = tl.where(within, 1.0 / diagonal, 0.0)
    # they have gone round
    j = (j + size) % BLOCK
    block = tl.where(i == j, 1.0, stack(columns, COUNT)) * inverse[:, :, None]
    tl.debug_barrier()
    tl.store(p + i * RC + j, tl.where(j < size, block, 0.0))
    o = which[:, None] * apart + RC * RC + first + tl.arange(0, BLOCK)[None, :]
    tl.store(p_slot + o, tl.where(within, diagonal, 0.0))
    tl.debug_barrier()
    return sound


@triton.jit
def unstack(block, COUNT: tl.constexpr):
    """The columns of `[COUNT, BLOCK, BLOCK]`, each `[COUNT, BLOCK]`."""
    columns = (tl.reshape(block, [COUNT, BLOCK, 2, 2, 2, 2]),)
    for level in tl.static_range(4):
        even, odd = (), ()
        for place in tl.static_range(2**level):
            low, high = tl.split(columns[place])
            even, odd = even + (low,), odd + (high,)
        columns = even + odd
    return columns


@triton.jit
def stack(columns, COUNT: tl.constexpr):
    """What `unstack` takes apart."""
    for level in tl.static_range(4):
        joined = ()
        for place in tl.static_range(8 // 2**level):
            joined = joined + (tl.join(columns[place], columns[place + 8 // 2**level]),)
        columns = joined
    return tl.reshape(columns[0], [COUNT, BLOCK, BLOCK])


@triton.jit
def eliminate(columns, pivots, sound, j, COUNT: tl.constexpr):
    """Column j of diagonal blocks below the pivot; the freed column takes that of the unit triangular inverse.

    Column j comes first, and last afterwards.
    """
    i = tl.arange(0, BLOCK)[None, :]
    pivot = element(columns[0], j, COUNT)
    usable = (pivot > 0) & (pivot < float("inf"))
    pivot = tl.where(usable, pivot, 1.0)
    step = tl.where(i > j, columns[0] * (1.0 / pivot), 0.0)
    left = ()
    for place in tl.static_range(1, BLOCK):
        left = left + (columns[place] - step * element(columns[place], j, COUNT),)
    left = left + (tl.where(i > j, -step, columns[0]),)
    return left, tl.where(i == j, pivot, pivots), tl.where(usable, sound, 0)


@triton.jit
def element(column, j, COUNT: tl.constexpr):
    """`[COUNT, BLOCK]`: element j of each vector, everywhere."""
    return tl.gather(column, tl.zeros([COUNT, BLOCK], tl.int32) + j, 1)


@triton.jit
def condition(p_slot, apart, RC: tl.constexpr, COUNT: tl.constexpr):
    """`||L||_F ||L^-1||_F` of packed slots, float64 `[COUNT]`. All sums are one reduction between warps."""
    rows = squares(p_slot, RC)
    if COUNT == 2:
        total = tl.sum(tl.permute(tl.join(rows, squares(p_slot + apart, RC)), [0, 2, 1]), 0)
    else:
        total = tl.sum(rows, 0)[None, :]
    lower, upper = tl.split(tl.sqrt(total))
    return (lower * upper).to(tl.float64)


@triton.jit
def squares(p_slot, RC: tl.constexpr):
    """Of each row of a packed slot, the squares of `L^-1` and of `L^T`; `[RC, 2]`."""
    i, j = tl.arange(0, RC)[:, None], tl.arange(0, RC)[None, :]
    lower, upper = read(p_slot, i, j, RC, FACTOR_INVERSE), read(p_slot, i, j, RC, FACTOR_T)
    return tl.join(tl.sum(lower * lower, 1), tl.sum(upper * upper, 1))
