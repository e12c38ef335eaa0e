"""Which route and how many warps a rank class takes on which device: the one table to change after a measurement.

The warps are the fewest with which nothing, or least, spills (benchmarks/results/compile_table.md). The route has not
yet been measured on a GPU: "split" is what the arithmetic of benchmarks/NOTES.md says.
"""

from __future__ import annotations

from dataclasses import dataclass

# where Triton's float64 products run on tensor cores. Elsewhere their operands take registers, and large blocks spill
FLOAT64_TENSOR_CORES = (80, 90)
SPLIT, ROW, TORCH = "split", "row", "torch"


@dataclass(frozen=True)
class Update:
    """How an update runs: warps, columns of a factor in a block, and the registers that a thread may have.

    Fewer registers where that spills nothing and lets more programs share a multiprocessor.
    """

    warps: int
    block_n: int
    registers: int = 255


@dataclass(frozen=True)
class Route:
    """route: of the AdamW step. warps: of the solve. block_n: columns of a factor in a block.

    block_m, block_k: rows and inner block of a product of matrices; tensor_k: the inner block on tensor cores. Where it
    is the whole class, the solve's iterates stay in registers. wide, narrow: the update with accesses of 16 bytes and
    without; carry_warps: of one that carries Grams, 0 where reading them anew takes less. gram_warps: of the chunks'
    Grams where S is solved for in a launch of its own, 0 where the last chunk to arrive does; whiten_warps: of frames
    and of what whitens in them; move_warps: of InvariantAdamW's update where it leaves Grams, both_grams: of its Grams
    of factors and gradients where none are carried (None for gram_warps), both with float64 tensor cores. shared: bytes
    of shared memory that the step takes at most, on whatever device; single: where nothing of it is in float64.

    matrices: warps of `polar`, `geometric_mean` and `sqrtm` in float32 and in float64; eigh, svd, inv_root: of these.
    """

    route: str
    warps: int
    block_n: int
    block_m: int
    block_k: int
    tensor_k: int
    wide: Update
    narrow: Update
    carry_warps: int
    matrices: tuple[int, int]
    eigh: tuple[int, int]
    svd: tuple[int, int]
    inv_root: tuple[int, int]
    gram_warps: int = 0
    whiten_warps: int = 2
    move_warps: int = 2
    both_grams: Update | None = None
    shared: int = 64 * 1024
    single: int = 64 * 1024

    def inner_block(self, precision: str, capability: int) -> int:
        """Of a product of matrices in `precision` on a device of `capability`."""
        return self.tensor_k if precision == "float64" and capability in FLOAT64_TENSOR_CORES else self.block_k


# by rank class, in ascending order. A block of the update takes its operands from shared memory: the more of it a
# thread works on, the less is read from there, which bounds the larger classes. At 128 float64 takes 144 KiB, as do
# Grams without float64 tensor cores. Where those are not of the older kind (sm_86, sm_89, sm_100), products of matrices
# take more registers: hence 8 warps at 32
ROUTES: dict[int, Route] = {
    16: Route(
        SPLIT, 2, 32, 16, 16, 16, Update(4, 32), Update(4, 32), 4, move_warps=1, both_grams=Update(1, 32),
        matrices=(2, 2), eigh=(1, 2), svd=(2, 2), inv_root=(2, 2),
    ),
    32: Route(
        SPLIT, 4, 32, 32, 16, 32, Update(4, 32, 168), Update(4, 16, 128), 4, gram_warps=2,
        both_grams=Update(1, 16),
        matrices=(4, 8), eigh=(2, 4), svd=(4, 8), inv_root=(2, 4),
    ),
    64: Route(
        SPLIT, 8, 16, 32, 16, 64, Update(4, 32), Update(8, 16, 128), 0, gram_warps=4,
        matrices=(8, 8), eigh=(4, 8), svd=(8, 8), inv_root=(4, 8),
    ),
    128: Route(
        SPLIT, 8, 16, 64, 16, 32, Update(8, 32), Update(16, 16), 0, gram_warps=8, whiten_warps=8,
        shared=144 * 1024, single=80 * 1024,
        matrices=(8, 8), eigh=(16, 16), svd=(16, 16), inv_root=(16, 16),
    ),
}  # fmt: skip
LARGEST = max(ROUTES)


def class_of(rank: int) -> int:
    """The rank class of a rank or of the order of a matrix; 0 past the largest, which goes through torch."""
    return next((rank_class for rank_class in ROUTES if rank <= rank_class), 0)


# "split" or "row" for every class that has a route here, to measure one against the other
forced: str | None = None


def route_of(rank_class: int, shared: int | None, double: bool = True) -> str:
    """The route of a step. shared: bytes that a block of the device can opt in to, None without a device.

    double: whether Grams and solve, or what they are of, are in float64.
    """
    route = ROUTES[rank_class]
    if shared is not None and shared < (route.shared if double else route.single):
        return TORCH
    return forced or route.route
