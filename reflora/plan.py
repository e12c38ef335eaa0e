"""Where everything lies: pairs become table rows of raw pointers, strides and sizes. No numerics.

One row is one `[r, n_in]` x `[n_out, r]` factor pair (an expert of an experts pair has its own row). Both sides are
read the same way, element (i, k) of a side at `P + i * SR + k * SN` with i < r, so that B is read as its transpose.
reflora/columns.py has the columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, is_not
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import check_gradient, fail
from .columns import (
    A_SIDE,
    ACTIVE,
    B_SIDE,
    COLUMNS,
    DTYPE,
    G_SN,
    G_SR,
    HYPER,
    P_SN,
    P_SR,
    STATE,
    TAG,
    G,
    N,
    P,
    R,
)  # fmt: skip
from .constants import STORAGE_DTYPES
from .pairs import LoRAPair

K = TypeVar("K")


@dataclass(frozen=True)
class Row:
    """A row's owner: pair `pair` of the plan, its expert `expert`, with 2-D views of its factors."""

    pair: int
    expert: int
    A: Tensor
    B: Tensor


class Plan:
    """The rows of pairs that share a device, as an int64 table on the CPU, `[rows, COLUMNS]`.

    What a column points at is also kept as tensors, one per pair, in `tensors[side + column]` and
    `pair_tensors[column]`, for the backend that works on tensors. What a backend keeps is lost once a factor moves.
    """

    def __init__(self, pairs: Sequence[LoRAPair]):
        self.pairs = list(pairs)
        self.device = self.pairs[0].A.device
        self.factors = [t for pair in self.pairs for t in (pair.A, pair.B)]
        self.rebuild()

    def rebuild(self) -> None:
        """Read pointers, strides and sizes of the factors again, after any of them has moved."""
        self.rows = [
            Row(index, expert, A, B)
            for index, pair in enumerate(self.pairs)
            for expert, (A, B) in enumerate(zip(pair.views_A(pair.A.detach()), pair.views_B(pair.B.detach())))
        ]
        self.table = torch.zeros(len(self.rows), COLUMNS, dtype=torch.int64, device="cpu")
        entries = []
        for row in self.rows:
            a, b = _side(row.A, False), _side(row.B, True)
            entries.append([*a, *b, row.A.shape[0], STORAGE_DTYPES.index(row.A.dtype), 1])
        columns = [A_SIDE + P, A_SIDE + P_SR, A_SIDE + P_SN, A_SIDE + N, B_SIDE + P, B_SIDE + P_SR, B_SIDE + P_SN]
        self.table[:, columns + [B_SIDE + N, R, DTYPE, ACTIVE]] = torch.tensor(entries, dtype=torch.int64, device="cpu")
        self.table[:, STATE] = self.table[:, DTYPE]
        self.table[:, TAG] = _integers(range(len(self.rows)))
        self._kept: dict[Any, Any] = {}
        self.tensors: dict[int, list[Tensor]] = {}
        self.pair_tensors: dict[int, list[Tensor]] = {}
        self._seen = self._where()
        _, self._strides, self._shapes, self.dtypes = self._seen
        self._pair_of_row = _integers([row.pair for row in self.rows])
        self._expert_of_row = _integers([row.expert for row in self.rows])
        self._grad_strides: list[tuple[int, ...]] = []  # of the last gradients
        # where each row begins in its factor, in bytes and in elements
        self._starts, self._offsets = {}, {}
        for side, factors in ((A_SIDE, self.factors[::2]), (B_SIDE, self.factors[1::2])):
            self._starts[side] = self.table[:, side + P] - _pointers(factors)[self._pair_of_row]
            self._offsets[side] = self._starts[side] // _sizes(factors)[self._pair_of_row]

    def kept(self, cls: Callable[[Plan], K]) -> K:
        """What a backend keeps for these rows between calls: a `cls` of its own, made on first use."""
        if cls not in self._kept:
            self._kept[cls] = cls(self)
        found: K = self._kept[cls]
        return found

    def forget(self, cls: Callable[[Plan], object]) -> None:
        self._kept.pop(cls, None)

    def moved(self) -> bool:
        """Whether a factor differs from what the table says, in place or form: `.data` may have been replaced."""
        return self._where() != self._seen

    def _where(self) -> list[list[Any]]:
        read = (Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype"))
        return [list(map(function, self.factors)) for function in read]

    def bind_grads(self, grads: Sequence[tuple[Tensor | None, Tensor | None]]) -> None:
        """Point at this step's gradients, one `(gA, gB)` per pair; a pair without both is inactive."""
        tensors: list[Any] = list(chain.from_iterable(grads))
        self.table[:, ACTIVE] = 1
        if not all(map(is_not, tensors, repeat(None))):
            active = [a is not None and b is not None for a, b in grads]
            self.set(ACTIVE, active)
            both = (flag for flag in active for _ in range(2))
            tensors = [t if flag else factor for t, flag, factor in zip(tensors, both, self.factors)]
        addresses = list(map(Tensor.data_ptr, tensors))
        if 0 in addresses:
            name = self.pairs[addresses.index(0) // 2].name
            fail(f"{name}, gradient", "a tensor with memory", "one whose storage was freed", "Compute it again.")
        if list(map(Tensor.size, tensors)) != self._shapes:
            self._check_shapes(tensors)
        pointers = _integers(addresses).view(-1, 2)[self._pair_of_row]
        for number, side in enumerate((A_SIDE, B_SIDE)):
            self.tensors[side + G] = tensors[number::2]
            self.table[:, side + G] = pointers[:, number] + self._starts[side]
        strides = list(map(Tensor.stride, tensors))
        if strides != self._grad_strides:
            self._grad_strides = strides
            for side in (A_SIDE, B_SIDE):
                self.table[:, side + G_SR : side + G_SN + 1] = self.table[:, side + P_SR : side + P_SN + 1]
        if strides != self._strides:
            for index, (tensor, ours) in enumerate(zip(tensors, self._strides)):
                if strides[index] != ours:
                    self._bind_strided((A_SIDE, B_SIDE)[index % 2], index // 2, tensor)

    def release_grads(self) -> None:
        """Release the gradients, which would otherwise outlive zero_grad."""
        for side in (A_SIDE, B_SIDE):
            self.tensors.pop(side + G, None)

    def bind(self, side: int, column: int, tensors: Sequence[Tensor]) -> None:
        """Point `column` at one tensor per pair, laid out like the factor itself, of any dtype."""
        self.tensors[side + column] = list(tensors)
        starts = self._offsets[side] * _sizes(tensors)[self._pair_of_row]
        self.table[:, side + column] = _pointers(tensors)[self._pair_of_row] + starts

    def bind_some(self, side: int, column: int, tensors: Sequence[Tensor | None]) -> None:
        """As `bind`; 0 for a pair without one."""
        if any(t is not None for t in tensors):
            factors = self.factors[0 if side == A_SIDE else 1 :: 2]
            self.bind(side, column, [factor if t is None else t for t, factor in zip(tensors, factors)])
            self.table[:, side + column] *= _integers([t is not None for t in tensors])[self._pair_of_row]
        else:
            self.tensors.pop(side + column, None)
            self.table[:, side + column] = 0

    def bind_once(self, column: int, tensors: Sequence[Tensor]) -> None:
        """Point `column` at one contiguous tensor per pair, `[E, ...]` with an entry per expert, or a scalar."""
        self.pair_tensors[column] = list(tensors)
        stride = _integers([t.stride(0) * t.element_size() if t.dim() else 0 for t in tensors])
        self.table[:, column] = _pointers(tensors)[self._pair_of_row] + stride[self._pair_of_row] * self._expert_of_row

    def bind_groups(self, side: int, groups: Sequence[int]) -> None:
        """The row of the hyperparameter table that a side of each pair uses."""
        self.set(side + HYPER, groups)

    def set(self, column: int, values: Sequence[int]) -> None:
        """Write one number per pair into `column` of all its rows."""
        self.table[:, column] = _integers(values)[self._pair_of_row]

    def tag(self, first: Sequence[int]) -> None:
        """Number the rows: those of a pair count up from its entry in `first`."""
        self.set(TAG, first)
        self.table[:, TAG] += self._expert_of_row

    def _check_shapes(self, tensors: Sequence[Tensor]) -> None:
        for index, (tensor, factor) in enumerate(zip(tensors, self.factors)):
            check_gradient(f"{self.pairs[index // 2].name}, gradient of {'AB'[index % 2]}", tensor, factor)

    def _bind_strided(self, side: int, number: int, tensor: Tensor) -> None:
        pair = self.pairs[number]
        factor = pair.B if side == B_SIDE else pair.A
        layouts = zip(factor.stride(), tensor.stride(), factor.shape)
        if pair.read.storage_order and any(ours != theirs and size > 1 for ours, theirs, size in layouts):
            remedy = "Give gradients the memory format of their parameter."
            fail(f"{pair.name}, gradient", f"strides {factor.stride()} like its factor's", tensor.stride(), remedy)
        views = pair.views_B(tensor) if side == B_SIDE else pair.views_A(tensor)
        for row, view in zip((i for i, r in enumerate(self.rows) if r.pair == number), views):
            pointer, sr, sn, _ = _side(view, side == B_SIDE)
            self.table[row, [side + G, side + G_SR, side + G_SN]] = _integers([pointer, sr, sn])


def by_device(pairs: Sequence[LoRAPair]) -> dict[torch.device, list[int]]:
    """Which pairs lie on each device; a plan serves one."""
    groups: dict[torch.device, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.A.device, []).append(index)
    return groups


def _integers(values: Sequence[int]) -> Tensor:
    """int64 on the host, whatever the default device: the kernels of the CPU read the table where it lies."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _pointers(tensors: Sequence[Tensor]) -> Tensor:
    return _integers(list(map(Tensor.data_ptr, tensors)))


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    return _integers(list(map(Tensor.element_size, tensors)))


def _side(view: Tensor, transposed: bool) -> tuple[int, int, int, int]:
    """(P, P_SR, P_SN, N) of a 2-D view."""
    rank_dim, n_dim = (1, 0) if transposed else (0, 1)
    return view.data_ptr(), view.stride(rank_dim), view.stride(n_dim), view.shape[n_dim]
