"""The units that the state of a wrapped optimizer is in: those of S = I, or of an S with its scale c."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..columns import BALANCED, REFACTORED_UNITS, SKIPPED
from ..pairs import LoRAPair, local
from .pairs import new_units
from .state import PHASE, SAVED
from .transport import Transport, movable

if TYPE_CHECKING:
    from .wrapper import Wrapped

UNIT = "reflora_unit"


class Units:
    """Where S stops or starts being I, state that the table of transport.py knows is moved by c.

    In front of any other class the gradients keep the unit of the state: reflora_unit `[experts, 2]`, from `new_units`,
    by which A's are multiplied and B's divided.
    """

    def __init__(self, owner: Wrapped):
        self.owner = owner
        # numbers of pairs that need no further look: S is not I, or the state is in units of I; and those of the latter
        # whose gradients are kept in other units
        self._left: set[int] = set()
        self._at_identity: set[int] = set()
        self._scaled: set[int] = set()
        # by number, what the next step keeps for pairs whose B has moved while A had no state
        self._owed: dict[int, dict[str, Tensor]] = {}

    def identity(self, pair: LoRAPair) -> dict[str, Tensor]:
        """What a plain step leaves in the state: every key there will be, since checkpoints are loaded key by key."""
        factor = local(pair.A)
        kept = {PHASE: torch.zeros(pair.experts, dtype=torch.float32, device=factor.device)}
        if not movable(self.owner.base):
            kept[UNIT] = torch.ones(pair.experts, 2, dtype=torch.float64, device=factor.device)
        if self.owner.interval > 1:
            dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
            kept[SAVED] = torch.eye(pair.rank, dtype=dtype, device=factor.device).repeat(pair.experts, 2, 1, 1)
        return kept

    def return_to_identity(self, chosen: Iterable[int]) -> None:
        """Move loaded state in units of S to those of I, or keep the gradients in its units.

        Reads a flag per pair from the device, once.
        """
        asked = [i for i in chosen if i not in self._at_identity]
        self._at_identity.update(asked)
        states = {
            i: self.owner.state[self.owner.pairs[i].A]
            for i in asked
            if PHASE in self.owner.state.get(self.owner.pairs[i].A, {})
        }
        if not states:
            return
        if not self.owner.scalar:  # full steps end the balance of RefLoRA-S
            for own in states.values():
                own[PHASE] = own[PHASE].masked_fill(own[PHASE] == BALANCED, 0.0)
        flags = [
            torch.stack([(own[PHASE] == REFACTORED_UNITS).any(), (own.get(UNIT, own[PHASE] * 0 + 1) != 1).any()])
            for own in states.values()
        ]
        found = dict(zip(states, torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()))
        self._scaled.update(i for i, each in found.items() if any(each))
        moved = [i for i, (refactored, _) in found.items() if refactored]
        self._left.difference_update(moved)
        move = Transport(self.owner, [self.owner.pairs[i] for i in moved]) if movable(self.owner.base) else None
        units = []
        for i, norms in self.owner._ops.norms(moved).items():
            own, finite = states[i], norms.isfinite().all(0)
            returns, c = (own[PHASE] == REFACTORED_UNITS) & finite, norms[1] / norms[0]
            units.append(c.where(returns & (c > 0) & c.isfinite(), 1.0))
            own[PHASE] = own[PHASE].where(~returns, 0.0)
            if move is None:
                before = own.get(UNIT, torch.ones_like(norms.mT))
                own[UNIT] = before.where(before > 0, 1.0) / units[-1][:, None]
            if not finite.all():
                self._at_identity.discard(i)  # the pair is skipped
        if move is not None:
            move.apply([1 / unit for unit in units])

    def leave_identity(self, chosen: Iterable[int]) -> dict[int, dict[str, Tensor]]:
        """Where a layer's S has just stopped being I, move its state by c, or from now on its gradients by 1 / c.

        Returns what to keep for these layers: reflora_phase `[experts]`, 1 where S is not I, and for a class whose
        state cannot be moved reflora_unit `[experts, 2]`, from `new_units`. Reads one flag per layer from the device
        until that layer has left I, nothing afterwards.
        """
        kept = {i: self._owed.pop(i) for i in chosen if i in self._owed}
        staying = [i for i in chosen if i not in self._left]
        if not staying:
            return kept
        move = Transport(self.owner, [self.owner.pairs[i] for i in staying]) if movable(self.owner.base) else None
        outcome = self.owner._ops.outcome()
        units = []
        for i in staying:
            found, own = outcome[i], self.owner.state.get(self.owner.pairs[i].A, {})
            before = own.get(PHASE, torch.zeros_like(found.scale)).double()
            after = before.where(found.status == SKIPPED, found.left.double())
            units.append(found.scale.where((after == 1) & (before != 1), 1.0))
            kept[i] = {PHASE: after.float()}
            if move is None:
                own_units = own.get(UNIT, found.scale.new_zeros(len(before), 2))
                kept[i][UNIT] = new_units(own_units, before, found, self.owner.interval > 1)
            if after.all():
                self._left.add(i)
        self._at_identity.difference_update(staying)
        if move is not None:
            move.apply(units)
        return kept

    def keep_moved(self, kept: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """After a failed step of the base class: state that was moved says so, and pairs without any are new again."""
        for i, pair in enumerate(self.owner.pairs):
            entries = kept.get(pair.A, {})
            if own := self.owner.state.get(pair.A):
                own.update(entries)
            elif self.owner.state.get(pair.B):
                self._owed[i] = {name: entries[name] for name in (PHASE, UNIT) if name in entries}
            else:
                self._left.discard(i)

    def scale_grads(self, chosen: Iterable[int], kept: Mapping[Tensor, Mapping[str, Tensor]], everywhere: bool) -> None:
        """Scale gradients into the units of state that cannot be moved. kept: entries about to be added to it;
        everywhere: for all pairs, not only those known to need it.
        """
        if movable(self.owner.base):
            return
        for i in chosen:
            A = self.owner.pairs[i].A
            units = kept.get(A, {}).get(UNIT, self.owner.state.get(A, {}).get(UNIT))
            if units is not None and (everywhere or i in self._scaled):
                self.owner._ops.scale_grads(i, units.where(units > 0, 1.0))
