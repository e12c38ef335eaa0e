"""The engine of an optimizer over pairs: its table points at parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import columns as col
from ..backends import Step
from ..checks import check_gradient, fail
from ..columns import A_SIDE, B_SIDE, PLAIN
from ..constants import STORAGE_DTYPES
from ..engine import Engine, mark_written
from ..pairs import LoRAPair
from .grams import init_gram, part, rejoin
from .state import (
    MASTER,
    MOMENTS,
    PHASE,
    SAVED,
    SQUARES,
    STEPS,
    Storage,
    check_pair,
    fit,
    init_pair,
    init_param,
    leave_units,
)

Slot = tuple[int, int]
_DTYPE, _LAYOUT, _VERSION = map(attrgetter, ("dtype", "layout", "_version"))


class AdamWEngine(Engine):
    """An engine that steps pairs with their optimizer's state and rebinds only what has changed.

    captured: not empty once a step has gone into a CUDA graph; all engines of an optimizer share it.
    """

    def __init__(
        self, pairs: Sequence[LoRAPair], chosen: Sequence[int], first_rows: Sequence[int], backend: str | None,
        storage: Storage, captured: set[str],
    ):  # fmt: skip
        super().__init__(pairs, chosen, first_rows, backend)
        self.storage, self.captured = storage, captured
        self._owner: Any = None
        # all keys and values of the state; entries of the sides of owned pairs; their tensors in the table, and where
        # these lay
        self._all: list[Any] = []
        self._entries: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        self._bound: list[Tensor] = []
        self._seen: list[int] = []
        # numbers of owned pairs without state: they have had no gradient
        self._idle: set[int] = set()
        self._options: tuple[Any, ...] = ()
        # numbers of pairs whose moments the next step moves back to units of S = I, or parts, before plain steps
        self._leaving: list[int] = []
        # numbers of pairs with AdamW's second moments beside their Grams, and those that come back in the next step
        self._parted: set[int] = set()
        self._returning: list[int] = []
        # factors that the next step updates
        self.written: list[Tensor] = []
        self._versions: list[int] = []
        self.stepped = False

    def refresh(self) -> None:
        super().refresh()
        self._owner = None

    def bind_state(
        self, state: MutableMapping[Tensor, Any], slots: list[Slot | None], grads: Sequence[Tensor | None],
        amsgrad: bool, keep_S: bool,
    ) -> None:  # fmt: skip
        """Point at moments, step counts and whatever else the step reads; slots: the groups of each pair's A and B.

        grads: of A and B alternately. As in torch, a pair has no state before its first gradient.
        """
        moments, grams = self.storage.moments_of(amsgrad), self.storage.grams
        names = (*moments, "step", *([grams] if grams else []))
        options = (slots, names, keep_S)
        wakes = [i for i in self._idle if grads[2 * i] is not None or grads[2 * i + 1] is not None]
        if self._owner is state and self._options == options and not wakes and self._still_bound(state):
            return
        if wakes and capturing(self.plan.device):
            remedy = "Take a step with gradients of all pairs outside the graph first."
            fail("CUDA graph capture", "pairs that have been stepped", self.pairs[wakes[0]].name, remedy, RuntimeError)
        self._owner = None  # until all is bound: what raises below leaves nothing that seems bound
        self._options, self._versions = options, []
        self._idle = self._without_state(state, slots, grads)
        kept = [slot is not None and i not in self._idle for i, slot in enumerate(slots)]
        for pair in compress(self.pairs, kept):
            check_pair(state, pair)
        sides: tuple[list[Any], list[Any]] = ([], [])
        for pair, keep in zip(self.pairs, kept):
            for factor, states in zip((pair.A, pair.B), sides):
                # a pair without state is not active: its row points at the factor, harmlessly
                entries = state[factor] if keep else dict.fromkeys(moments, factor)
                init_param(entries, factor, amsgrad, pair.experts, self.storage)
                fit(entries, factor, pair.experts, self.storage)
                if grams:
                    init_gram(entries, pair, factor, grams)
                states.append(entries)
            if not grams:
                init_pair(sides[0][-1], pair, keep_S)
        self._parted = {i for i, both in enumerate(zip(*sides)) if grams and any(SQUARES in own for own in both)}
        for index, (side, states) in enumerate(zip((A_SIDE, B_SIDE), sides)):
            for name in moments:
                self.plan.bind(side, MOMENTS[name].column, [entries[name] for entries in states])
            if grams:
                matrices = [entries[grams].view(-1, p.rank, p.rank) for entries, p in zip(states, self.pairs)]
                self.plan.bind_once(side + col.V, matrices)
            self.plan.bind_some(side, col.W, [entries.get(MASTER) for entries in states])
            self.plan.bind_once(side + col.STEP, [entries["step"] for entries in states])
            self.plan.bind_groups(side, [slot[index] if slot else 0 for slot in slots])
        self.plan.set(col.STATE, [STORAGE_DTYPES.index(self.storage.dtype(pair.A)) for pair in self.pairs])
        for column, name in self._columns_of_pair(keep_S):
            self.plan.bind_once(column, [entries[name] for entries in sides[0]])
        self._owner, self._all = state, [*state, *state.values()]
        self._entries = tuple([entries for entries, keep in zip(side, kept) if keep] for side in sides)  # type: ignore[assignment]
        self._bound = self._tensors()
        self._seen = list(map(Tensor.data_ptr, self._bound))

    def _without_state(
        self, state: MutableMapping[Tensor, Any], slots: list[Slot | None], grads: Sequence[Tensor | None]
    ) -> set[int]:
        found = set()
        for index, (pair, slot) in enumerate(zip(self.pairs, slots)):
            graded = grads[2 * index] is not None or grads[2 * index + 1] is not None
            if slot is not None and not graded and not state.get(pair.A) and not state.get(pair.B):
                found.add(index)
        return found

    def _still_bound(self, state: MutableMapping[Tensor, Any]) -> bool:
        """Whether the table points at the state's tensors: entries may have been replaced, and `.data` too."""
        try:
            same = _identical([*state, *state.values()], self._all) and _identical(self._tensors(), self._bound)
        except KeyError:  # an entry was deleted
            return False
        return same and list(map(Tensor.data_ptr, self._bound)) == self._seen

    def _tensors(self) -> list[Tensor]:
        """The state tensors of every owned pair."""
        _, names, keep_S = self._options
        of_pair = (*names, *(name for _, name in self._columns_of_pair(keep_S)))
        sides = (map(itemgetter(*wanted), found) for wanted, found in zip((of_pair, names), self._entries))
        found = list(chain.from_iterable(chain.from_iterable(sides)))
        if self.storage.master:  # of 16-bit factors alone
            found += [entries[MASTER] for side in self._entries for entries in side if MASTER in entries]
        return found

    def _columns_of_pair(self, keep_S: bool) -> list[tuple[int, str]]:
        """What A's state holds for the pair, with its column."""
        if self.storage.grams:
            return []
        return [(col.PHASE, PHASE), (col.COUNT, STEPS), *([(col.SAVED, SAVED)] if keep_S else [])]

    def bind_grads(self, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, int]]:
        """Point at this step's gradients, of A and B alternately.

        Returns factors whose partner has none, with their group: they take plain steps, for which `leave` moves the
        moments of their pairs back to units of S = I. So it does where a factor has left the optimizer.
        """
        slots, active = self._options[0], self.plan.factors
        sides = list(zip(grads[::2], grads[1::2]))
        strays: list[tuple[Tensor, int]] = []
        self._leaving = []
        self._returning = [i for i in self._parted if all(g is not None for g in sides[i])]
        present = list(map(is_not, grads, repeat(None)))
        given = [grad for grad in grads if grad is not None]
        self._check(given, present)
        if None in slots or not all(present):
            if not {*map(_LAYOUT, given)} <= {torch.strided}:
                self._refuse(given, present)
            for index, (pair, slot, (a, b)) in enumerate(zip(self.pairs, slots, sides)):
                if slot is not None and a is not None and b is not None:
                    continue
                owned = [] if slot is None else [("A", pair.A, slot[0], a), ("B", pair.B, slot[1], b)]
                lone = [(factor, group) for _, factor, group, grad in owned if grad is not None]
                for side, factor, _, grad in owned:
                    if grad is not None:
                        check_gradient(f"{pair.name}, gradient of {side}", grad, factor)
                if lone or slot is None:
                    self._leaving.append(index)
                strays += lone
                sides[index] = (None, None)
            active = [t for pair, (a, _) in zip(self.pairs, sides) if a is not None for t in (pair.A, pair.B)]
        try:
            self.plan.bind_grads(sides)
        except RuntimeError:  # a gradient without an address
            self._refuse(given, present)
            raise
        self.written = active
        return strays

    def _check(self, grads: Sequence[Tensor], present: Sequence[bool]) -> None:
        """Gradients are of their factors' dtypes, and no lazy negatives. present: whether each factor has one."""
        if any(map(Tensor.is_neg, grads)):
            remedy = "Call .resolve_neg() first."
            fail("a gradient", "the values themselves in memory", "their negatives (is_neg)", remedy)
        if list(map(_DTYPE, grads)) != list(compress(self.plan.dtypes, present)):
            self._refuse(grads, present)

    def _refuse(self, grads: Sequence[Tensor], present: Sequence[bool]) -> None:
        """Raise for the first gradient that is not dense or of another dtype than its factor."""
        for factor, grad in zip(compress(self.plan.factors, present), grads):
            if grad.layout is not torch.strided or grad.dtype is not factor.dtype:
                name = next(pair.name for pair in self.pairs if pair.A is factor or pair.B is factor)
                remedy = "Densify or cast the gradient before the step."
                got = f"{grad.dtype}, {grad.layout}"
                fail(f"{name}, gradient", f"{factor.dtype}, strided, like its factor", got, remedy)

    def leave(self, groups: Sequence[dict[str, Any]]) -> None:
        """Move the moments of pairs that take plain steps from now on, and of those that no longer do."""
        state = self._owner
        for pair in (self.pairs[i] for i in self._leaving):
            leave_units(state.get(pair.A, {}), state.get(pair.B, {}), pair)
            for factor in (pair.A, pair.B):
                part(state.get(factor, {}), pair, factor, self.storage, groups)
        for pair in (self.pairs[i] for i in self._returning):
            for factor in (pair.A, pair.B):
                rejoin(state[factor], pair, factor, self.storage.grams)
        if self.storage.grams:
            self._parted = self._parted.union(self._leaving).difference(self._returning)

    def step(self, step: Step) -> None:
        """One step of the pairs with gradients."""
        if not self.written:
            shape = (len(self.plan.rows), col.RESULTS)
            self.results = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
            self.results[:, col.STATUS] = PLAIN
            return
        self.results = (self._carried(step) if step.carry else step).on(self.backend, self.plan)
        self.plan.release_grads()
        mark_written(self.written)
        self.stepped = True
        if step.carry:
            self._versions = list(map(_VERSION, self.plan.factors))

    def _carried(self, step: Step) -> Step:
        """Mark the rows whose factors still have the Grams of the last step.

        A replayed graph writes factors without running Python: nothing is carried in a capture, nor after one.
        """
        if capturing(self.plan.device):
            self.captured.add("yes")
        # nor in the first step: a capture may launch only what has been launched before
        if self.captured or not self.stepped:
            self.plan.table[:, col.KEPT] = 0
            return replace(step, carry=False)
        now = list(map(_VERSION, self.plan.factors))
        if now == self._versions:
            self.plan.table[:, col.KEPT] = 1
            return step
        known = [a == b for a, b in zip(now, self._versions)] or [False] * len(now)
        self.plan.set(col.KEPT, [a and b for a, b in zip(known[::2], known[1::2])])
        return step

    def invalidate(self) -> None:
        """Forget the Grams of the last step."""
        self._versions = []


def capturing(device: torch.device) -> bool:
    """Whether launches on `device` now go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _identical(found: Sequence[object], known: Sequence[object]) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(found) == len(known) and all(map(is_, found, known))
