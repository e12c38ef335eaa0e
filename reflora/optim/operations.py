"""The operations that serve a list of pairs, whether a process holds them whole or in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..pairs import LoRAPair
from .pairs import PairOps

if TYPE_CHECKING:
    from .sharded import ShardedOps


def ops_of(pairs: Sequence[LoRAPair], backend: str | None = None, precision: str = "float64") -> PairOps | ShardedOps:
    """The operations on these pairs, whether a process holds them whole or in part."""
    if any(pair.sharded for pair in pairs):
        from .sharded import ShardedOps  # torch.distributed.tensor takes its time to load

        return ShardedOps(pairs, backend, precision)
    return PairOps(pairs, backend, precision)
