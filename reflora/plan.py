"""Where everything lies: pairs become table rows of raw pointers, strides and sizes. No numerics.

One row is one `[r, n_in]` x `[n_out, r]` factor pair (an expert of an experts pair has a row of its own). Both sides
are read the same way, element (i, k) of a side at `P + i * SR + k * SN` with i < r, so that B is read as its transpose.
csrc/table.h and reflora/kernels/table.py mirror the columns; tests/test_plan.py holds them to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import RANK_CLASSES, STORAGE_DTYPES, LoRAPair, fail

# columns of one side; strides in elements. M, V, X (exp_avg, exp_avg_sq, max_exp_avg_sq) share the strides of P.
P, P_SR, P_SN, G, G_SR, G_SN, M, V, X, STEP, HYPER, N = range(12)
SIDE = 12
A_SIDE, B_SIDE = 0, SIDE
# columns of the row; PHASE and SAVED are pointers, 0 where unused
R, DTYPE, ACTIVE, PHASE, SAVED = range(2 * SIDE, 2 * SIDE + 5)
COLUMNS = 32

# columns of the float64 result table, one row a table row
STATUS, KAPPA_A, KAPPA_B, BALANCE, SCALE, NORM_A, NORM_B = range(7)
RESULTS = 8

# columns of the float64 hyperparameter table, one row a parameter group
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, AMSGRAD, MAXIMIZE = range(7)
HYPERS = 8


@dataclass(frozen=True)
class Row:
    """A row's owner: pair `pair` of the plan, expert `expert` of it, with 2-D views of its factors."""

    pair: int
    expert: int
    A: Tensor
    B: Tensor


class Plan:
    """The rows of pairs that share a device, as an int64 table on the CPU, `[rows, COLUMNS]`.

    What a column points at is also kept as tensors, one a pair, in `tensors[side + column]` and
    `pair_tensors[column]`, for the backend that works on tensors.
    """

    def __init__(self, pairs: Sequence[LoRAPair]):
        self.pairs = list(pairs)
        self.device = self.pairs[0].A.device
        self.rebuild()

    def rebuild(self) -> None:
        """Read pointers, strides and sizes of the factors again, after any of them has moved."""
        self.rows = [
            Row(index, expert, A, B)
            for index, pair in enumerate(self.pairs)
            for expert, (A, B) in enumerate(zip(pair.views_A(pair.A.detach()), pair.views_B(pair.B.detach())))
        ]
        self.table = torch.zeros(len(self.rows), COLUMNS, dtype=torch.int64)
        entries = []
        for row in self.rows:
            a, b = _side(row.A, False), _side(row.B, True)
            entries.append([*a, *b, row.A.shape[0], STORAGE_DTYPES.index(row.A.dtype), 1])
        columns = [A_SIDE + P, A_SIDE + P_SR, A_SIDE + P_SN, A_SIDE + N, B_SIDE + P, B_SIDE + P_SR, B_SIDE + P_SN]
        self.table[:, columns + [B_SIDE + N, R, DTYPE, ACTIVE]] = torch.tensor(entries, dtype=torch.int64)
        self.tensors: dict[int, list[Tensor]] = {}
        self.pair_tensors: dict[int, list[Tensor]] = {}
        self._seen = self._where()
        self._pair_of_row = torch.tensor([row.pair for row in self.rows])
        self._expert_of_row = torch.tensor([row.expert for row in self.rows])
        factors = [[pair.A for pair in self.pairs], [pair.B for pair in self.pairs]]
        self._strides = [[t.stride() for t in side] for side in factors]
        self._offsets = {side: self._from_base(side, t) for side, t in zip((A_SIDE, B_SIDE), factors)}

    def moved(self) -> bool:
        """Whether a factor is not where, or not what, the table says: `.data` may have been replaced."""
        return self._where() != self._seen

    def _where(self) -> list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for pair in self.pairs for t in (pair.A, pair.B)]

    def classes(self) -> dict[int, list[int]]:
        """Row numbers by rank class: 16, 32, 64, 128, and 0 for r > 128."""
        groups: dict[int, list[int]] = {}
        for number, row in enumerate(self.rows):
            rank = row.A.shape[0]
            groups.setdefault(next((c for c in RANK_CLASSES if rank <= c), 0), []).append(number)
        return groups

    def bind_grads(self, grads: Sequence[tuple[Tensor | None, Tensor | None]]) -> None:
        """Point at this step's gradients, one `(gA, gB)` a pair; a pair without both is inactive."""
        active: list[bool] = []
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for (grad_a, grad_b), pair in zip(grads, self.pairs):
            both = grad_a is not None and grad_b is not None
            active.append(both)
            sides[0].append(grad_a if both and grad_a is not None else pair.A)
            sides[1].append(grad_b if both and grad_b is not None else pair.B)
        self.table[:, ACTIVE] = torch.tensor(active, dtype=torch.int64)[self._pair_of_row]
        for side, tensors, strides in zip((A_SIDE, B_SIDE), sides, self._strides):
            self.bind(side, G, tensors)
            self.table[:, side + G_SR : side + G_SN + 1] = self.table[:, side + P_SR : side + P_SN + 1]
            for number, tensor in enumerate(tensors):
                if tensor.stride() != strides[number]:
                    self._bind_strided(side, number, tensor)

    def release_grads(self) -> None:
        """Let go of the gradients, which would otherwise outlive zero_grad."""
        for side in (A_SIDE, B_SIDE):
            self.tensors.pop(side + G, None)

    def bind(self, side: int, column: int, tensors: Sequence[Tensor]) -> None:
        """Point `column` at one tensor a pair that is laid out like the factor itself."""
        self.tensors[side + column] = list(tensors)
        base = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
        self.table[:, side + column] = base[self._pair_of_row] + self._offsets[side]

    def bind_once(self, column: int, tensors: Sequence[Tensor]) -> None:
        """Point `column` at one contiguous tensor a pair, `[E, ...]` with an entry an expert, or a scalar."""
        self.pair_tensors[column] = list(tensors)
        base = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
        stride = torch.tensor([t.stride(0) * t.element_size() if t.dim() else 0 for t in tensors])
        self.table[:, column] = base[self._pair_of_row] + stride[self._pair_of_row] * self._expert_of_row

    def bind_groups(self, side: int, groups: Sequence[int]) -> None:
        """The row of the hyperparameter table that a side of each pair uses."""
        self.table[:, side + HYPER] = torch.tensor(groups, dtype=torch.int64)[self._pair_of_row]

    def _bind_strided(self, side: int, number: int, tensor: Tensor) -> None:
        pair = self.pairs[number]
        factor = pair.B if side == B_SIDE else pair.A
        layouts = zip(factor.stride(), tensor.stride(), factor.shape)
        if pair.layout == "conv" and any(ours != theirs and size > 1 for ours, theirs, size in layouts):
            remedy = "Give gradients the memory format of their parameter."
            fail(f"{pair.name}, gradient", f"strides {factor.stride()} like its factor's", tensor.stride(), remedy)
        views = pair.views_B(tensor) if side == B_SIDE else pair.views_A(tensor)
        for row, view in zip((i for i, r in enumerate(self.rows) if r.pair == number), views):
            pointer, sr, sn, _ = _side(view, side == B_SIDE)
            self.table[row, [side + G, side + G_SR, side + G_SN]] = torch.tensor([pointer, sr, sn])

    def _from_base(self, side: int, factors: list[Tensor]) -> Tensor:
        base = torch.tensor([t.data_ptr() for t in factors], dtype=torch.int64)
        return self.table[:, side + P] - base[self._pair_of_row]


def by_device(pairs: Sequence[LoRAPair]) -> dict[torch.device, list[int]]:
    """Which pairs lie on each device; a plan serves one."""
    groups: dict[torch.device, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.A.device, []).append(index)
    return groups


def _side(view: Tensor, transposed: bool) -> tuple[int, int, int, int]:
    """(P, P_SR, P_SN, N) of a 2-D view."""
    rank_dim, n_dim = (1, 0) if transposed else (0, 1)
    return view.data_ptr(), view.stride(rank_dim), view.stride(n_dim), view.shape[n_dim]
