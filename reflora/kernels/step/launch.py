"""What every launcher needs: groups of rows with constants per rank class, and their buffers on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...columns import A_SIDE, B_SIDE, DTYPE, G_SN, G_SR, P_SN, P_SR, STATE, G, M, N, P, R, V, W, X
from ...constants import KAPPA_MAX, STORAGE_DTYPES
from ...plan import Plan
from .. import options, routes
from ..dtypes import BFLOAT16, FLOAT16, MIXED
from ..options import TYPES, launch_options
from ..routes import Route
from ..staging import OnDevice, current_stream, hold, int_table
from .chunks import CHUNKS, HEADER
from .pair import SLOTS_FLOAT32, SLOTS_FLOAT64, WHITENING

# a chunk has at least so many blocks, so that a small layer is not cut into programs with nothing to do
LEAST_BLOCKS = 4


class RankClass:
    """The rows of a rank class, the longest first, and what their kernels share.

    dtype, state: storage codes of factors and moments, MIXED where rows differ. wide: the type S is applied in. rows:
    their numbers in the table; sizes: `(n_in, n_out)` of each. master: whether one has master weights.
    """

    def __init__(
        self, rank_class: int, dtype: int, state: int, wide: torch.dtype, device: torch.device,
        rows: Sequence[int] = (), sizes: Sequence[tuple[int, int]] = (), master: bool = False,
    ):  # fmt: skip
        self.rank_class, self.dtype, self.state, self.wide = rank_class, dtype, state, wide
        self.device, self.rows, self.sizes, self.master = device, rows, sizes, master

    @property
    def route(self) -> Route:
        return routes.ROUTES[self.rank_class]

    @cached_property
    def capability(self) -> int:
        return options.capability(self.device)

    @cached_property
    def shared(self) -> int | None:
        return options.shared_memory(self.device)

    def step_route(self, precision: str) -> str:
        """How a full AdamW step is taken; whatever is not by TORCH has an S here."""
        double = precision == "float64" or self.wide == torch.float64
        return routes.route_of(self.rank_class, self.shared, double)

    @property
    def block_n(self) -> int:
        return max(16, self.route.block_n // (2 if self.wide == torch.float64 else 1))

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {
            "RC": self.rank_class, "BN": self.block_n, "BM": self.route.block_m, "WIDE": TYPES[self.wide],
        }  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        return launch_options(self.route.warps)

    @property
    def apart(self) -> bool:
        """Whether the split route solves in a launch of its own."""
        return self.route.gram_warps > 0

    @property
    def carries(self) -> bool:
        """Whether Grams are worth carrying from a step to the next."""
        return self.route.carry_warps > 0

    @property
    def gram_options(self) -> dict[str, int]:
        return launch_options(self.route.gram_warps or self.route.warps)

    def both_grams_options(self, precision: str, carry: bool, target: int | None = None) -> dict[str, int]:
        """BN and launch options of the Grams of factors and gradients; carry: the update leaves the next step's."""
        how = self.route.both_grams
        # carried Grams are summed in blocks of their own
        if how is None or carry or self.wide == torch.float64 or not self.tensor_cores(precision, target):
            return {"BN": self.block_n, **self.gram_options}
        return {"BN": how.block_n, **launch_options(how.warps, how.registers)}

    @property
    def whiten_options(self) -> dict[str, int]:
        return launch_options(self.route.whiten_warps)

    def update_options(self, carry: bool, vector: bool) -> dict[str, int]:
        """BN and launch options of the update; vector: its accesses are of 16 bytes."""
        if carry:  # a carried Gram is summed block by block as a fresh one is
            return {"BN": self.block_n, **launch_options(self.route.carry_warps)}
        # what takes registers of its own has small blocks, and as many registers as there are
        plain = not (self.master or self.wide == torch.float64)
        how = self.route.wide if vector and plain else self.route.narrow
        return {"BN": how.block_n, **launch_options(how.warps, how.registers if plain else 255)}

    def tensor_cores(self, precision: str, target: int | None = None) -> bool:
        """Whether there are some that take the compute type; target: as in solve_constants."""
        target = self.capability if target is None else target
        return precision == "float64" and target in routes.FLOAT64_TENSOR_CORES

    def move_options(self, precision: str, carry: bool, vector: bool, target: int | None = None) -> dict[str, int]:
        """As update_options, of InvariantAdamW; carry: it leaves Grams."""
        if carry and self.tensor_cores(precision, target):
            return {"BN": self.block_n, **launch_options(self.route.move_warps)}
        return self.update_options(carry, vector)

    @property
    def scalar_options(self) -> dict[str, int]:
        """Of RefLoRA-S: with 16 warps, at 128 registers, it would spill."""
        return launch_options(min(8, self.route.warps))

    @cached_property
    def workspace(self) -> Tensor:
        return self._slots(0)

    @cached_property
    def whitening(self) -> Tensor:
        """The workspace of InvariantAdamW."""
        return self._slots(WHITENING.value)

    def _slots(self, more: int) -> Tensor:
        elements = self.rank_class * self.rank_class + self.rank_class
        slots = SLOTS_FLOAT64.value if self.wide == torch.float64 else SLOTS_FLOAT32.value
        return torch.empty(len(self.rows), slots + more, elements, dtype=torch.float64, device=self.device)

    @cached_property
    def headers(self) -> Tensor:
        return torch.zeros(len(self.rows), HEADER.value, dtype=torch.float64, device=self.device)

    @cached_property
    def arrivals(self) -> Tensor:
        return torch.zeros(len(self.rows), dtype=torch.int32, device=self.device)

    @cached_property
    def _widths(self) -> list[int]:
        return [chunk_width(n_a, n_b, self.block_n) for n_a, n_b in self.sizes]

    @cached_property
    def entries(self) -> Tensor:
        """Number in the table and columns of a chunk of every row, int32 `[rows, 2]`."""
        return int_table(list(zip(self.rows, self._widths)), torch.int32, self.device)

    @cached_property
    def items(self) -> Tensor:
        """Place in entries, chunk, and what the entry says, of every chunk: int32 `[chunks, 4]`."""
        items = [
            (index, chunk, row, width)
            for index, (row, width, sizes) in enumerate(zip(self.rows, self._widths, self.sizes))
            for chunk in range(sum(-(-n // width) for n in sizes))
        ]
        return int_table(items, torch.int32, self.device)


def chunk_width(n_a: int, n_b: int, block: int) -> int:
    """Columns of a chunk of a row, a multiple of `block`; at most CHUNKS chunks in all. Depends on no other row."""
    blocks = max(LEAST_BLOCKS, -(-(n_a + n_b) // (CHUNKS.value * block)))
    while -(-n_a // (blocks * block)) - (-n_b // (blocks * block)) > CHUNKS.value:
        blocks += 1
    return blocks * block


# columns of the table: addresses; the stride between neighbours, which are columns of A and ranks of B, and the address
# of what has it; that between lines of these, and how many lines there are; what is a multiple of four where lines are
# cut into fours
_ADDRESSES = [side + column for side in (A_SIDE, B_SIDE) for column in (P, G, M, V, X, W)]
_NEAR = [A_SIDE + P_SN, A_SIDE + G_SN, B_SIDE + P_SR, B_SIDE + G_SR]
_OF_NEAR = [A_SIDE + P, A_SIDE + G, B_SIDE + P, B_SIDE + G]
_FAR = [A_SIDE + P_SR, A_SIDE + G_SR, B_SIDE + P_SN, B_SIDE + G_SN]
_LINES = [R, R, B_SIDE + N, B_SIDE + N]
_FOURS = [*_FAR, A_SIDE + N, R]


def aligned(table: Tensor, rows: Sequence[int]) -> bool:
    """Whether accesses of these rows may take 16 bytes, and offsets 32 bits.

    In every factor, gradient and moment that there is four neighbours lie together, from a multiple of 16 bytes on: as
    PEFT's linear layers do where r and n_in are multiples of four. Its experts do not, ranks of their B being apart.
    """
    own = table.numpy() if len(rows) == len(table) else table.numpy()[rows]
    near = (own[:, _NEAR] == 1) | (own[:, _OF_NEAR] == 0)
    whole = near.all() and not (own[:, _FOURS] & 3).any() and not (own[:, _ADDRESSES] & 15).any()
    return bool(whole and (own[:, _FAR] * own[:, _LINES] < 2**31).all())


def solve_constants(group: RankClass, precision: str, target: int | None = None) -> dict[str, Any]:
    """The compute type, and what follows from it; target: the capability to compile for, the device's for None.

    16-bit rows go through the run-time branch in front of a float64 solve: a 16-bit load straight in front of a float64
    dot makes Triton choose an operand layout that its code generator refuses ("fp64 don't support largeK MMA").
    """
    target = group.capability if target is None else target
    return {
        "DTYPE": _branched(group.dtype, precision),
        "BK": group.route.inner_block(precision, target),
        "KAPPA_MAX": KAPPA_MAX[precision],
        "TC": TYPES[getattr(torch, precision)],
        "SCALED": precision == "float32" or group.wide == torch.float64,
    }


def constants_of(plan: Plan, group: RankClass, precision: str) -> dict[str, Any]:
    """Of the kernels over a group's chunks and rows."""
    own = {"VECTOR": aligned(plan.table, group.rows)}
    return {**group.constants, **solve_constants(group, precision), **own}


def taken(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Those that a kernel has arguments for."""
    return {name: constants[name] for name in kernel.arg_names if name in constants}


def _branched(code: int, precision: str) -> int:
    narrow = code in (BFLOAT16.value, FLOAT16.value)
    return MIXED.value if narrow and precision == "float64" else code


def state_constants(group: RankClass, precision: str) -> dict[str, Any]:
    return {"STATE": _branched(group.state, precision), "MASTER": group.master}


def scalar_constants(group: RankClass) -> dict[str, Any]:
    """Of RefLoRA-S, which has no dot and so no need of the branch."""
    kept = {name: group.constants[name] for name in ("RC", "BN", "WIDE")}
    return {**kept, "DTYPE": group.dtype, "STATE": group.state, "MASTER": group.master}


class Prepared:
    """A plan's groups, and the plan's table and a step's hyperparameters on the device."""

    def __init__(self, plan: Plan):
        self.table, self.hypers = OnDevice(plan.device), OnDevice(plan.device)
        self.stream = current_stream(plan.device)
        classes: dict[int, list[int]] = {}
        for number, row in enumerate(plan.rows):
            classes.setdefault(routes.class_of(row.A.shape[0]), []).append(number)
        self.oversized = classes.pop(0, [])
        self.oversized_index = int_table(self.oversized, torch.int64, plan.device)
        self.groups = [_group(plan, rank_class, numbers) for rank_class, numbers in sorted(classes.items())]
        # by precision, rows whose S has no kernel here
        self.rerouted = {precision: self._without_route(precision) for precision in ("float64", "float32")}
        self.rerouted_index = {
            precision: int_table(rows, torch.int64, plan.device) for precision, rows in self.rerouted.items()
        }  # fmt: skip

    def _without_route(self, precision: str) -> list[int]:
        return [n for group in self.groups if group.step_route(precision) == routes.TORCH for n in group.rows]


def prepare(plan: Plan) -> Prepared:
    prepared = plan.kept(Prepared)
    owners = (vars(prepared), prepared.rerouted_index, *map(vars, prepared.groups))
    kept = chain.from_iterable(owner.values() for owner in owners)
    own = (value for value in kept if isinstance(value, Tensor))
    hold(own, prepared.stream, plan.device)
    return prepared


def _group(plan: Plan, rank_class: int, numbers: list[int]) -> RankClass:
    sizes = {n: (plan.rows[n].A.shape[1], plan.rows[n].B.shape[0]) for n in numbers}
    longest = sorted(numbers, key=lambda n: -sum(sizes[n]))
    wide = torch.float64 if STORAGE_DTYPES.index(torch.float64) in plan.table[numbers, DTYPE] else torch.float32
    master = bool((plan.table[numbers][:, [A_SIDE + W, B_SIDE + W]] != 0).any())
    return RankClass(
        rank_class, _code(plan, numbers, DTYPE), _code(plan, numbers, STATE), wide, plan.device, longest,
        [sizes[n] for n in longest], master,
    )  # fmt: skip


def _code(plan: Plan, numbers: list[int], column: int) -> int:
    codes = plan.table[numbers, column].unique().tolist()
    return int(codes[0]) if len(codes) == 1 else MIXED.value
