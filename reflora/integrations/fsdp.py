"""How FSDP2 should cut LoRA factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ..checks import check_count
from .peft import find_pairs

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def shard_placement(model: nn.Module, shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """For `fully_shard(..., shard_placement_fn=)`: A `[r, n_in]` is cut along n_in, all else as FSDP2 does by default.

    Cut along r, A and its gradient would be resharded in every step. Call it before the model is sharded.
    Raises what `reflora.find_pairs` raises.

    Args:
        model: A PEFT model.
        shards: Number of processes that a parameter is cut over; an A whose n_in is not a multiple of it is left to
            FSDP2.
    """
    check_count("shards", shards, 1)
    lying = {id(pair.A) for pair in find_pairs(model) if pair.A.shape[1] % shards == 0}

    def placement(parameter: nn.Parameter) -> Shard | None:
        from torch.distributed.tensor import Shard

        return Shard(1) if id(parameter) in lying else None

    return placement
