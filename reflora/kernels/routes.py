"""Which route and how many warps a rank class takes on which device: the one table to change after a measurement.

The warps are the fewest with which nothing, or least, spills (benchmarks/results/compile_table.md). The route has not
yet been measured on a GPU: "split" is what the arithmetic of benchmarks/NOTES.md says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SPLIT, ROW, TORCH = "split", "row", "torch"


@dataclass(frozen=True)
class Route:
    """route: of the AdamW step. Warps of the solve, of the update, and of one that carries Grams.

    block_n, update_block_n: columns of a factor in a block. block_m, block_k: rows and inner block of a product of
    matrices.
    update_registers: what a thread of the update may have, fewer where that spills nothing and lets more programs share
    a multiprocessor. shared: bytes of shared memory that the step takes at most, on whatever device.
    """

    route: str
    warps: int
    update_warps: int
    carry_warps: int
    block_n: int
    block_m: int
    block_k: int
    update_block_n: int = 16
    update_registers: int = 255
    shared: int = 64 * 1024


# by rank class. Without float64 tensor cores the chunk Grams of r = 128 take 128 KiB of shared memory
ROUTES: dict[int, Route] = {
    16: Route(SPLIT, 2, 4, 4, 32, 16, 16, 32),
    32: Route(SPLIT, 4, 4, 4, 32, 32, 16, update_registers=128),
    64: Route(SPLIT, 8, 8, 16, 32, 32, 16, update_registers=128),
    128: Route(SPLIT, 16, 16, 16, 16, 32, 16, shared=128 * 1024),
}

# "split" or "row" for every class, to measure one against the other
forced: str | None = None


def route_of(rank_class: int, shared: int | None) -> Route:
    """shared: bytes that a block of the device can opt in to, None without a device (compiling ahead)."""
    route = ROUTES[rank_class]
    return route if shared is None or route.shared <= shared else replace(route, route=TORCH)
