"""Which operations serve a list of pairs: those for whole pairs, or those for sharded ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..pairs import LoRAPair
from .pairs import PairOps

if TYPE_CHECKING:
    from .sharded import ShardedOps


def ops_of(pairs: Sequence[LoRAPair], backend: str | None = None, precision: str = "float64") -> PairOps | ShardedOps:
    """The operations on these pairs: PairOps where all are whole, else ShardedOps."""
    if any(pair.sharded for pair in pairs):
        from .sharded import ShardedOps  # torch.distributed.tensor is slow to import

        return ShardedOps(pairs, backend, precision)
    return PairOps(pairs, backend, precision)
