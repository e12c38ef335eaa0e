"""The state of some parameters as it was before their first step, in place: a slot is given to another adapter."""

from __future__ import annotations

from collections.abc import Container, Iterable, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ..checks import check_held, fail
from ..pairs import LoRAPair, PairLike
from .state import MASTER


def chosen(given: Iterable[PairLike | Tensor], owned: Container[Tensor], pairs: Sequence[LoRAPair]) -> list[Tensor]:
    """The parameters among `given`, factors of pairs included.

    Raises TypeError for anything else, ValueError for a parameter that is not in `owned` and for one factor of a pair
    without the other, whose moments are in the same units.
    """
    if isinstance(given, (Tensor, LoRAPair)) or not isinstance(given, Iterable):
        fail("reset", "a list of pairs or parameters", type(given).__name__, "Wrap a single one in a list.", TypeError)
    params: dict[Tensor, None] = {}
    for one in given:
        for t in (one.A, one.B) if isinstance(one, LoRAPair) else one if isinstance(one, tuple) else (one,):
            if not isinstance(t, Tensor):
                fail("reset", "pairs or parameters", type(t).__name__, "See reflora.find_pairs.", TypeError)
            if t not in owned:
                got = f"one of shape {tuple(t.shape)} that is in no group"
                fail("reset", "parameters of this optimizer", got, "Add it by add_param_group: it starts fresh.")
            params[t] = None
    for pair in pairs:
        if pair.A in owned and pair.B in owned and (pair.A in params) != (pair.B in params):
            fail(f"reset of {pair.name}", "both factors", "one of them", "Pass the pair.")
    return list(params)


def start_over(state: MutableMapping[Tensor, Any], params: Iterable[Tensor]) -> None:
    """Every tensor of their state is what it was at first, at its old address: master weights are the parameter's."""
    entries = [(param, state[param]) for param in params if param in state]
    for _, own in entries:
        for name, kept in own.items():
            if isinstance(kept, Tensor):
                check_held(f"state {name!r}", kept)
    for param, own in entries:
        for name, kept in own.items():
            if name == MASTER:
                kept.copy_(param.detach())
            elif isinstance(kept, Tensor):
                kept.zero_()
            else:  # a count that was loaded as a number
                own[name] = type(kept)(0)
