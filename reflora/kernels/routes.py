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

    block_n: columns of a factor in a block. block_m, block_k: rows and inner block of a product of matrices.
    update_registers: what a thread of the update may have, fewer where that spills nothing and lets more programs share
    a multiprocessor.
    """

    route: str
    warps: int
    update_warps: int
    carry_warps: int
    block_n: int
    block_m: int
    block_k: int
    update_registers: int = 255


# by rank class; then by compute capability, where a device needs an entry of its own
ROUTES: dict[int, dict[tuple[int, int] | None, Route]] = {
    16: {None: Route(SPLIT, 2, 2, 2, 32, 16, 16)},
    32: {None: Route(SPLIT, 4, 4, 4, 32, 32, 16, 128)},
    64: {None: Route(SPLIT, 8, 8, 16, 32, 32, 16)},
    128: {None: Route(SPLIT, 16, 16, 16, 16, 32, 16)},
}
# without float64 tensor cores the chunk Grams of r = 128 take 128 KiB of shared memory, and these devices have 99
for capability in ((8, 6), (8, 9), (12, 0)):
    ROUTES[128][capability] = replace(ROUTES[128][None], route=TORCH)

# "split" or "row" for every class, to measure one against the other
forced: str | None = None


def route_of(rank_class: int, capability: tuple[int, int] | None) -> Route:
    """capability: of the device, None without one (the interpreter, compiling ahead)."""
    routes = ROUTES[rank_class]
    return routes.get(capability, routes[None])
