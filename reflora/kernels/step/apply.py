"""A matrix or a number times the columns of a side, in place: the last launch of `precondition_` and `refactor_`."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import routes
from .. import table as col
from ..dtypes import load, store
from .chunks import FACTOR_A, FACTOR_B, MATRIX, NUMBER, RUN, counts, span
from .gather import part
from .launch import RankClass, taken
from .mean import mixer
from .pair import block_zeros, column, load_columns, offsets
from .update import product


@triton.jit
def mix_in_panels(
    p_matrix, address, sr, sn, start, r, end, code, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """`product` of a matrix too large to keep and the block that starts at column `start`, BK ranks at a time."""
    acc = block_zeros(SIDE, RC, BN, TYPE)
    i = tl.arange(0, RC)
    for inner in range(0, RC, BK):
        j = inner + tl.arange(0, BK)
        o, m = offsets(start, sr, sn, r - inner, end, SIDE, BK, BN)
        x = load(address, o + inner * sr, m, code, DTYPE, WIDE).to(TYPE)
        if SIDE == col.A_SIDE:
            left = tl.load(p_matrix + i[:, None] * RC + j[None, :]).to(TYPE)
            acc = tl.dot(left, x, acc, input_precision="ieee", out_dtype=TYPE)
        else:
            right = tl.load(p_matrix + j[:, None] * RC + i[None, :]).to(TYPE)
            acc = tl.dot(x, right, acc, input_precision="ieee", out_dtype=TYPE)
    return acc


@triton.jit
def apply_matrix(
    p_row, area, begin, end, r, code, COLUMN: tl.constexpr, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, STORED: tl.constexpr, TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Columns begin to end of a side by the matrix that `mixer` finds for it."""
    address = column(p_row, SIDE + COLUMN)
    sr, sn = column(p_row, SIDE + COLUMN + 1), column(p_row, SIDE + COLUMN + 2)
    p_matrix = mixer(area, SIDE == col.A_SIDE, RC, STORED)
    if BK == RC:
        i = tl.arange(0, RC)
        matrix = tl.load(p_matrix + i[:, None] * RC + i[None, :]).to(TYPE)
        # the next block is on its way while this one is worked on, where registers allow
        AHEAD: tl.constexpr = RC <= 32 and WIDE == tl.float32
        if AHEAD:
            x = load_columns(address, sr, sn, begin, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
        for start in range(begin, end, BN):
            if not AHEAD:
                x = load_columns(address, sr, sn, start, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
            mixed = product(matrix, x.to(TYPE), SIDE, TYPE)
            if AHEAD:
                x = load_columns(address, sr, sn, start + BN, end, r, code, SIDE, RC, BN, DTYPE, WIDE, VECTOR)
            o, m = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
            # the block is read by all before any of it is overwritten
            tl.debug_barrier()
            store(address, o, mixed, m, code, DTYPE, VECTOR)
    else:
        for start in range(begin, end, BN):
            mixed = mix_in_panels(
                p_matrix, address, sr, sn, start, r, end, code, SIDE, RC, BN, BK, DTYPE, WIDE, TYPE
            )  # fmt: skip
            o, m = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
            tl.debug_barrier()
            store(address, o, mixed, m, code, DTYPE, VECTOR)


@triton.jit
def apply_number(
    p_row, factor, begin, end, r, code, COLUMN: tl.constexpr, SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The same by a float64 scalar, in float64."""
    address = column(p_row, SIDE + COLUMN)
    sr, sn = column(p_row, SIDE + COLUMN + 1), column(p_row, SIDE + COLUMN + 2)
    for start in range(begin, end, BN):
        o, m = offsets(start, sr, sn, r, end, SIDE, RC, BN, VECTOR)
        x = load(address, o, m, code, DTYPE, WIDE, VECTOR).to(tl.float64) * factor
        store(address, o, x, m, code, DTYPE, VECTOR)


@triton.jit
def apply_side(
    p_row, area, header, own_chunk, width, r, code, run, COLUMN: tl.constexpr, MATRICES: tl.constexpr,
    SIDE: tl.constexpr, RC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    STORED: tl.constexpr, TYPE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """own_chunk: the number of the chunk within its side."""
    begin, end = span(p_row, own_chunk, width, SIDE)
    if MATRICES:
        if run == MATRIX:
            apply_matrix(
                p_row, area, begin, end, r, code, COLUMN, SIDE, RC, BN, BK, DTYPE, WIDE, STORED, TYPE, VECTOR
            )  # fmt: skip
    if run == NUMBER:
        factor = tl.load(header + (FACTOR_A if SIDE == col.A_SIDE else FACTOR_B))
        apply_number(p_row, factor, begin, end, r, code, COLUMN, SIDE, RC, BN, DTYPE, WIDE, VECTOR)


@triton.jit
def apply_kernel(
    table, items, headers, work, COLUMN: tl.constexpr, MATRICES: tl.constexpr, RC: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr, STORED: tl.constexpr,
    TYPE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per chunk; arguments as gram_kernel's. COLUMN: P or G. STORED, TYPE: of matrices and products.

    RUN says whether a row has matrices (STORED, where `mixer` finds them) or numbers (float64, in its header).
    """
    _, chunk, _, width, p_row, area, header, r, code = part(table, items, headers, work, RC, WIDE)
    chunks_a, _ = counts(p_row, width)
    run = tl.load(header + RUN)
    if run != 0:
        if chunk < chunks_a:
            apply_side(
                p_row, area, header, chunk, width, r, code, run, COLUMN, MATRICES, col.A_SIDE, RC, BN, BK, DTYPE, WIDE,
                STORED, TYPE, VECTOR,
            )  # fmt: skip
        else:
            apply_side(
                p_row, area, header, chunk - chunks_a, width, r, code, run, COLUMN, MATRICES, col.B_SIDE, RC, BN, BK,
                DTYPE, WIDE, STORED, TYPE, VECTOR,
            )  # fmt: skip


def apply_chunks(group: RankClass, table: Tensor, constants: dict[str, Any], **own: Any) -> None:
    """own: COLUMN, MATRICES, STORED and TYPE."""
    kept = {**constants, **own}
    blocks, options = apply_options(group, kept)
    apply_kernel[(len(group.items),)](
        table, group.items, group.headers, group.workspace,
        **taken(apply_kernel, {**kept, **blocks}), **options,
    )  # fmt: skip


def product_type(group: RankClass, constants: dict[str, Any]) -> Any:
    """Of S with gradients: float64 where tensor cores make that faster, rounded once; else the type S is kept in."""
    whole = constants["BK"] == constants["RC"] and group.capability in routes.FLOAT64_TENSOR_CORES
    return constants["TC"] if whole and constants["TC"] == tl.float64 else constants["WIDE"]


def apply_options(group: RankClass, constants: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of blocks and launch options: as an update's where the products are in float32, as a solve's in float64."""
    if constants["TYPE"] != tl.float32:
        return {}, group.options
    options = group.update_options(False, constants["VECTOR"])
    return {"BN": options.pop("BN"), "BK": group.rank_class}, options
