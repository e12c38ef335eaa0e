"""Layers of one rank and dtype on one device, and what GradientHooks keep for them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ..engine import apply_dtype
from ..pairs import LoRAPair


@dataclass
class HookGroup:
    """Layers of one rank and dtype on one device, and what is kept for them, one row per expert.

    units float64 `[rows, 3]`: those of A and B, as new_units has them, and whether S has been other than I. counts
    float32 `[rows]`, on the host for a schedule that is looked up there: steps that the pair has taken part in.
    matrices `[rows, 2, r, r]`: S and S^-1 over their units.
    """

    indices: list[int]
    experts: list[int]
    units: Tensor
    counts: Tensor
    matrices: Tensor

    def moved(self, pairs: Sequence[LoRAPair]) -> bool:
        """Whether a factor has changed its device, rank or dtype."""
        ours = self.units.device, *self.matrices.shape[-1:], self.matrices.dtype
        return any(kind_of(pairs[i]) != ours for i in self.indices)

    def split(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rows by pair, as views."""
        return zip(self.indices, tensor.split(self.experts))

    def rows_of(self, indices: Container[int]) -> tuple[list[int], Any]:
        """The pairs of the group that are among `indices`, and an index of their rows."""
        chosen = [i for i in self.indices if i in indices]
        if not chosen or chosen == self.indices:
            return chosen, slice(None)
        numbers = [[i in indices] * experts for i, experts in zip(self.indices, self.experts)]
        rows = torch.tensor(list(chain.from_iterable(numbers)), dtype=torch.bool, device="cpu").nonzero()[:, 0]
        return chosen, rows.to(self.units.device, non_blocking=True)

    def after(self, backward: Container[int]) -> HookGroup:
        """A copy with one more step for pairs that have had a backward pass, and room for new matrices."""
        if all(i in backward for i in self.indices):
            counts = self.counts + 1
        else:
            steps = [[float(i in backward)] * experts for i, experts in zip(self.indices, self.experts)]
            own = torch.tensor(list(chain.from_iterable(steps)), dtype=torch.float32, device="cpu")
            counts = self.counts + own.to(self.counts.device, non_blocking=True)
        return replace(self, units=self.units.clone(), counts=counts, matrices=torch.empty_like(self.matrices))

    def below(self, steps: int) -> list[int]:
        """The pairs that have taken part in fewer steps; for counts on the host."""
        taken = iter(self.counts.tolist())
        most = (max(islice(taken, experts)) for experts in self.experts)
        return [i for i, top in zip(self.indices, most) if top < steps]


def kind_of(pair: LoRAPair) -> tuple[Any, ...]:
    return pair.A.device, pair.rank, apply_dtype(pair)


def grouped(kind: tuple[Any, ...], indices: list[int], state: Mapping[int, Tensor], host: bool) -> HookGroup:
    """host: whether counts are kept there."""
    device, rank, dtype = kind
    whole = torch.cat([state[i].to(device, torch.float64) for i in indices])
    counts = whole[:, 3].to("cpu" if host else device, torch.float32)
    matrices = torch.empty(len(whole), 2, rank, rank, dtype=dtype, device=device)
    return HookGroup(indices, [len(state[i]) for i in indices], whole[:, :3].clone(), counts, matrices)


def sides(units: Tensor) -> Tensor:
    """`[rows, 2, 1, 1]`: what S, for B's gradients, and S^-1, for A's, are multiplied by."""
    of_A, of_B = units.unbind(1)
    return torch.stack([1 / of_B, of_A], 1)[..., None, None]
