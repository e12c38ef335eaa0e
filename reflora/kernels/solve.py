"""Small dense linear algebra of one program: Cholesky with its inverse, Gauss-Jordan, the polar factor.

Matrices are `[RC, RC]` (RC the rank class), zero outside their leading `[r, r]`. Those that do not fit in registers
live in slots of an L2 workspace: RC * RC elements, then a vector of RC. A slot is written and read by one program
only, with a barrier between. No block of `[RC, RC]` changes its layout, which at RC = 128 would take 128 KiB of shared
memory: products and transposes go in panels of BM rows.
"""

import triton
import triton.language as tl

# how the elements of a slot are read: as they are, or as L^T or L^-1 of a slot that `factor` has packed
WHOLE, FACTOR_T, FACTOR_INVERSE = (tl.constexpr(c) for c in range(3))
# more than any X takes: 4 to 13, up to 20 at the bound of degenerate layers, 190 over the whole range of float64
SCHULZ_STEPS = tl.constexpr(200)


@triton.jit
def tall(RC: tl.constexpr):
    """Row and column numbers of a matrix in registers, as a block `[RC / W, RC, W]` with W = min(RC, 32).

    So a thread holds few rows of few columns. Of a square block it would hold RC / 4 rows of one column, and as many
    registers again for every vector along the rows.
    """
    W: tl.constexpr = RC if RC < 32 else 32
    layer, row, lane = tl.arange(0, RC // W), tl.arange(0, RC), tl.arange(0, W)
    return row[None, :, None], layer[:, None, None] * W + lane[None, None, :]


@triton.jit
def total(x):
    """Sum of a block of three dimensions."""
    return tl.sum(tl.sum(tl.sum(x, 0), 1), 0)


@triton.jit
def along_rows(x):
    """`[RC]`: sums of a tall block over its columns."""
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def frobenius(x):
    """Frobenius norm of a tall block."""
    return tl.sqrt(total(x * x))


@triton.jit
def read(p_slot, i, j, RC: tl.constexpr, KIND: tl.constexpr):
    """Elements (i, j) of a slot; i, j broadcastable index blocks."""
    values = tl.load(p_slot + i * RC + j)
    if KIND == FACTOR_T:
        values = tl.where(j > i, values, 0.0)
        values = tl.where(i == j, tl.load(p_slot + RC * RC + i), values)
    elif KIND == FACTOR_INVERSE:
        values = tl.where(j <= i, values, 0.0)
    return values


@triton.jit
def multiply(
    p_out, p_left, LEFT: tl.constexpr, LEFT_T: tl.constexpr, p_right, RIGHT: tl.constexpr, RIGHT_T: tl.constexpr,
    r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Slot p_out becomes op(left) @ op(right) of two other slots, in panels of BM rows and inner blocks of BK."""
    j = tl.arange(0, RC)
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)
        acc = tl.zeros([BM, RC], TC)
        for start in range(0, r, BK):
            k = start + tl.arange(0, BK)
            if LEFT_T:
                left = tl.trans(read(p_left, k[:, None], i[None, :], RC, LEFT))
            else:
                left = read(p_left, i[:, None], k[None, :], RC, LEFT)
            if RIGHT_T:
                right = tl.trans(read(p_right, j[:, None], k[None, :], RC, RIGHT))
            else:
                right = read(p_right, k[:, None], j[None, :], RC, RIGHT)
            acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=TC)
        tl.store(p_out + i[:, None] * RC + j[None, :], acc)


@triton.jit
def finish(
    p_out, p_slot, factor, limit, SYMMETRIC: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, TYPE: tl.constexpr
):
    """Slot p_out becomes float64 `factor` times another slot (its symmetric part), rounded to TYPE.

    Returns 1 if no element is past `limit` or NaN, else 0.
    """
    j = tl.arange(0, RC)
    bad = tl.full((), 0, tl.int32)
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)
        o = i[:, None] * RC + j[None, :]
        x = tl.load(p_slot + o).to(tl.float64)
        if SYMMETRIC:
            x = 0.5 * (x + tl.load(p_slot + j[None, :] * RC + i[:, None]).to(tl.float64))
        x = x * factor
        bad = tl.maximum(bad, tl.max(tl.max(tl.where(tl.abs(x) <= limit, 0, 1), 1), 0))
        tl.store(p_out + o, x.to(TYPE))
    return 1 - bad


@triton.jit
def invert_transposed(p_slot, T, r, floor, RC: tl.constexpr):
    """`T^-T` of a tall block into a slot (its leading `[r, r]`), by Gauss-Jordan with complete pivoting.

    Rows and columns stay where they are; pivots smaller than `floor` are raised to it. With partial pivoting they could
    follow each other, in a nilpotent T, and the inverse would grow past all bounds. A barrier comes before the slot is
    written.
    """
    row, column_of = tall(RC)
    i = tl.arange(0, RC)
    # row i of the result in place is column home[i] of the transposed inverse, column m is its row source[m]
    home = tl.full([RC], -1, tl.int32)
    source = tl.zeros_like(column_of) - 1
    for _ in range(0, r):
        free = ((home < 0) & (i < r))[None, :, None] & (source < 0) & (column_of < r)
        size = tl.where(free, tl.abs(T), -1.0)
        top = tl.max(tl.max(tl.max(size, 0), 1), 0)
        place = tl.where(size == top, row * RC + column_of, RC * RC)
        place = tl.min(tl.min(tl.min(place, 0), 1), 0)
        p, j = place // RC, place % RC
        column = along_rows(tl.where(column_of == j, T, 0.0))
        line = tl.sum(tl.where(row == p, T, 0.0), 1)[:, None, :]
        pivot = total(tl.where(column_of == j, line, 0.0))
        pivot = tl.where(tl.abs(pivot) < floor, tl.where(pivot < 0, -floor, floor), pivot)
        line = tl.where(column_of == j, 1.0, line) * (1.0 / pivot)
        step = tl.where(i == p, 0.0, column)[None, :, None]
        T = tl.where(column_of == j, 0.0, T) - step * line
        T = tl.where(row == p, line, T)
        home = tl.where(i == p, j, home)
        source = tl.where(column_of == j, p, source)
    tl.debug_barrier()
    # where T was not finite, some may have no place
    placed = (home >= 0)[None, :, None] & (source >= 0)
    tl.store(p_slot + source * RC + home[None, :, None], T, mask=placed & (row < r) & (column_of < r))


@triton.jit
def polar_factor(p_x, p_y, r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr):
    """Slot `p_x` becomes the orthogonal polar factor of the X it holds; slot `p_y` holds `X^-T` and is overwritten.

    One step of Higham's scaled Newton iteration takes the root of the condition number; the cubic Newton-Schulz steps
    that follow, scaled as by Chen and Chow, are products of matrices only. A singular X is moved by its rounding error.
    """
    # barriers: a slot is overwritten after every read of it, and read after every write
    if BK == RC:
        # one inner block: the iterates stay in registers
        o = tl.arange(0, RC)[:, None] * RC + tl.arange(0, RC)[None, :]
        x = polar_resident(tl.load(p_x + o), tl.load(p_y + o), r, RC, TC)
        tl.debug_barrier()
        tl.store(p_x + o, x)
    else:
        z = tl.sqrt(slot_norm(p_y, RC, BM, TC) / slot_norm(p_x, RC, BM, TC))
        tl.debug_barrier()
        newton_update(p_x, p_y, z, RC, BM, TC)
        tl.debug_barrier()
        multiply(p_y, p_x, WHOLE, True, p_x, WHOLE, False, r, RC, BM, BK, TC)
        tl.debug_barrier()
        scale = 1.0 / tl.sqrt(slot_bound(p_y, RC, BM, TC))
        low, away = scale, tl.full((), 1.0, TC)
        step = 0
        while (step < SCHULZ_STEPS) & (away > converged(TC)):
            away = squared_distance(p_y, scale * scale, r, RC, BM, TC)
            own, cube, low = schulz(low, away)
            schulz_panels(p_x, p_y, own * scale, cube * scale * scale * scale, r, RC, BM, BK, TC)
            tl.debug_barrier()
            multiply(p_y, p_x, WHOLE, True, p_x, WHOLE, False, r, RC, BM, BK, TC)
            scale = tl.full((), 1.0, TC)
            tl.debug_barrier()
            step += 1
    tl.debug_barrier()


@triton.jit
def polar_resident(x, y, r, RC: tl.constexpr, TC: tl.constexpr):
    """As `polar_factor`, of an x `[RC, RC]` in registers; y: x^-T."""
    size_x, size_y = tl.sum(tl.sum(x * x, 1), 0), tl.sum(tl.sum(y * y, 1), 0)
    z, inverse = tl.sqrt(tl.sqrt(size_y / size_x)), tl.sqrt(tl.sqrt(size_x / size_y))
    return orthogonalised(0.5 * (z * x + inverse * y), r, RC, TC)


@triton.jit
def orthogonalised(x, r, RC: tl.constexpr, TC: tl.constexpr):
    """The orthogonal polar factor of x `[RC, RC]`, no singular value below 1, by Newton-Schulz steps in registers."""
    i, j = tl.arange(0, RC)[:, None], tl.arange(0, RC)[None, :]
    # not x^T x: operands whose inner index is contiguous are read from shared memory without conflicts
    y = product(x, tl.trans(x), TC)
    scale = 1.0 / tl.sqrt(eigenvalue_bound(y))
    x, y = x * scale, y * (scale * scale)
    low, away = scale, tl.full((), 1.0, TC)
    step = 0
    while (step < SCHULZ_STEPS) & (away > converged(TC)):
        d = tl.where((i == j) & (i < r), y - 1.0, y)
        away = tl.sum(tl.sum(d * d, 1), 0)
        own, cube, low = schulz(low, away)
        x = own * x - cube * product(y, x, TC)
        y = product(x, tl.trans(x), TC)
        step += 1
    return x


@triton.jit
def product(left, right, TC: tl.constexpr):
    return tl.dot(left, right, input_precision="ieee", out_dtype=TC)


@triton.jit
def schulz(low, away):
    """`X <- own X - cube X X^T X` for singular values in [low, 1], and where their least one is after that.

    away: `||X^T X - I||_F^2`. Near the end 1 must map to 1. No more than that follows from it: what is computed from a
    sum over the program, every step waits for.
    """
    square = 3.0 / (1.0 + low + low * low)
    root = tl.sqrt(square)
    least = tl.minimum(0.5 * root * low * (3.0 - square * low * low), 1.0)
    near = away < 0.04
    return tl.where(near, 1.5, 1.5 * root), tl.where(near, 0.5, 0.5 * root * square), tl.where(near, 1.0, least)


@triton.jit
def squared_distance(p_y, scale, r, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """`||scale Y - I||_F^2` of a slot."""
    square = tl.full((), 0.0, TC)
    j = tl.arange(0, RC)[None, :]
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        d = tl.load(p_y + i * RC + j) * scale - tl.where((i == j) & (i < r), 1.0, 0.0).to(TC)
        square += tl.sum(tl.sum(d * d, 1), 0)
    return square


@triton.jit
def schulz_panels(p_x, p_y, own, cube, r, RC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TC: tl.constexpr):
    """`X <- own X - cube X Y`, a panel of rows at a time: it needs no other rows of X."""
    j = tl.arange(0, RC)[None, :]
    for first in range(0, RC, BM):
        i = first + tl.arange(0, BM)[:, None]
        acc = tl.zeros([BM, RC], TC)
        for start in range(0, r, BK):
            k = start + tl.arange(0, BK)
            acc = tl.dot(
                tl.load(p_x + i * RC + k[None, :]), tl.load(p_y + k[:, None] * RC + j), acc, input_precision="ieee",
                out_dtype=TC,
            )  # fmt: skip
        x = own * tl.load(p_x + i * RC + j) - cube * acc
        tl.debug_barrier()
        tl.store(p_x + i * RC + j, x)


@triton.jit
def converged(TC: tl.constexpr):
    """Convergence is quadratic: a distance of sqrt(eps) from orthogonal leaves one of eps. Its square."""
    return tl.full((), 1e-16 if TC == tl.float64 else 4e-8, TC)


@triton.jit
def slot_norm(p_slot, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """Frobenius norm of a slot."""
    square = tl.full((), 0.0, TC)
    for first in range(0, RC, BM):
        x = tl.load(p_slot + (first + tl.arange(0, BM))[:, None] * RC + tl.arange(0, RC)[None, :])
        square += tl.sum(tl.sum(x * x, 1), 0)
    return tl.sqrt(square)


@triton.jit
def slot_bound(p_slot, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """As `eigenvalue_bound`, of the matrix in a slot."""
    square, largest = tl.full((), 0.0, TC), tl.full((), 0.0, TC)
    for first in range(0, RC, BM):
        x = tl.load(p_slot + (first + tl.arange(0, BM))[:, None] * RC + tl.arange(0, RC)[None, :])
        square += tl.sum(tl.sum(x * x, 1), 0)
        largest = tl.maximum(largest, tl.max(tl.sum(tl.abs(x), 1), 0))
    return smaller(largest, tl.sqrt(square))


@triton.jit
def eigenvalue_bound(y):
    """No eigenvalue of symmetric y is larger: its Frobenius norm or, better near a multiple of I, a sum of a row."""
    return smaller(tl.max(tl.sum(tl.abs(y), 1), 0), tl.sqrt(tl.sum(tl.sum(y * y, 1), 0)))


@triton.jit
def smaller(x, y):
    """The smaller one; y where that is NaN, which tl.minimum would drop."""
    return tl.where(x < y, x, y)


@triton.jit
def newton_update(p_x, p_y, z, RC: tl.constexpr, BM: tl.constexpr, TC: tl.constexpr):
    """`X <- (z X + Y / z) / 2`."""
    inverse = 1.0 / z
    for first in range(0, RC, BM):
        o = (first + tl.arange(0, BM))[:, None] * RC + tl.arange(0, RC)[None, :]
        tl.store(p_x + o, 0.5 * (z * tl.load(p_x + o) + tl.load(p_y + o) * inverse))


@triton.jit
def rounding(TC: tl.constexpr):
    """The unit roundoff of a type, about."""
    return tl.full((), 2.2e-16 if TC == tl.float64 else 1.2e-7, TC)
