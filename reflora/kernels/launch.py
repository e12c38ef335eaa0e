"""What every launcher needs: the plan's table on its device, and a group of rows with its constants a rank class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton.language as tl
from torch import Tensor

from ..contract import KAPPA_MAX, STORAGE_DTYPES
from ..plan import Plan
from .dtypes import BFLOAT16, FLOAT16, MIXED
from .pair import SLOTS

WARPS = {16: 2, 32: 4, 64: 8, 128: 16}
# columns of a factor in a block; the rows and the inner block of a product
BLOCK_N = {16: 64, 32: 64, 64: 32, 128: 16}
BLOCK_M = {16: 16, 32: 32, 64: 64, 128: 32}
BLOCK_K = {16: 16, 32: 16, 64: 16, 128: 16}


@dataclass(frozen=True)
class Group:
    """The rows of a rank class, the longest first. numbers: int32 row numbers `[programs]` on the plan's device."""

    rank_class: int
    numbers: Tensor
    dtype: int
    wide: torch.dtype

    @property
    def constants(self) -> dict[str, Any]:
        block_n = max(16, BLOCK_N[self.rank_class] // (2 if self.wide == torch.float64 else 1))
        return {
            "RC": self.rank_class, "BN": block_n, "BM": BLOCK_M[self.rank_class],
            "BK": BLOCK_K[self.rank_class], "WIDE": TYPES[self.wide],
        }  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        return launch_options(self.rank_class)

    def workspace(self) -> Tensor:
        elements = self.rank_class * self.rank_class + self.rank_class
        return torch.empty(len(self.numbers), SLOTS.value, elements, dtype=torch.float64, device=self.numbers.device)


def launch_options(rank_class: int) -> dict[str, int]:
    # left to itself, ptxas spills a few bytes to raise the occupancy of programs that are one to a multiprocessor
    warps = WARPS[rank_class]
    return {"num_warps": warps, "num_stages": 1, "maxnreg": min(255, 65536 // (32 * warps))}


TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def solve_constants(group: Group, precision: str) -> dict[str, Any]:
    """The compute type, and what follows from it.

    16-bit rows go through the run-time branch in front of a float64 solve: a 16-bit load straight in front of a float64
    dot makes Triton choose an operand layout that its code generator refuses ("fp64 don't support largeK MMA").
    """
    narrow = group.dtype in (BFLOAT16.value, FLOAT16.value)
    return {
        "DTYPE": MIXED.value if narrow and precision == "float64" else group.dtype,
        "KAPPA_MAX": KAPPA_MAX[precision],
        "TC": TYPES[getattr(torch, precision)],
        "SCALED": precision == "float32" or group.wide == torch.float64,
    }


class _Copy:
    """A tensor of the host on the device, copied again only when its values have changed."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._copy: Tensor | None = None

    def __call__(self, tensor: Tensor, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return tensor.contiguous()
        if self._seen is None or self._copy is None or not torch.equal(self._seen, tensor):
            self._seen = tensor.clone()
            self._copy = to_device(tensor, device)
        return self._copy


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without a wait."""
    if device.type == "cpu":
        return tensor
    # the caching host allocator holds a pinned block back until the copies that read it are done
    return tensor.pin_memory().to(device, non_blocking=True)


class Prepared:
    """A plan's groups, and the plan's table and a step's hyperparameters on the device."""

    def __init__(self, plan: Plan):
        self._rows = plan.rows
        self._table, self._hypers = _Copy(), _Copy()
        classes = plan.classes()
        self.oversized = classes.pop(0, [])
        self.oversized_index = to_device(torch.tensor(self.oversized, dtype=torch.int64), plan.device)
        self.groups = [_group(plan, rank_class, numbers) for rank_class, numbers in sorted(classes.items())]

    def current(self, plan: Plan) -> bool:
        return self._rows is plan.rows

    def table(self, plan: Plan) -> Tensor:
        return self._table(plan.table, plan.device)

    def hypers(self, plan: Plan, hypers: Tensor) -> Tensor:
        return self._hypers(hypers, plan.device)


_prepared: WeakKeyDictionary[Plan, Prepared] = WeakKeyDictionary()


def prepare(plan: Plan) -> Prepared:
    prepared = _prepared.get(plan)
    if prepared is None or not prepared.current(plan):
        prepared = _prepared[plan] = Prepared(plan)
    return prepared


def _group(plan: Plan, rank_class: int, numbers: list[int]) -> Group:
    rows = [plan.rows[number] for number in numbers]
    dtypes = {row.A.dtype for row in rows}
    dtype = STORAGE_DTYPES.index(dtypes.pop()) if len(dtypes) == 1 else MIXED.value
    wide = torch.float64 if any(row.A.dtype == torch.float64 for row in rows) else torch.float32
    longest = sorted(numbers, key=lambda n: -(plan.rows[n].A.shape[1] + plan.rows[n].B.shape[0]))
    return Group(rank_class, to_device(torch.tensor(longest, dtype=torch.int32), plan.device), dtype, wide)
