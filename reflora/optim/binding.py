"""Keeps one device's plan pointing at parameters, gradients and optimizer state, touching only what has moved."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .. import plan as col
from ..backends import AdamWStep, Backend
from ..contract import LoRAPair, as_pairs, fail
from ..functional import mark_written
from ..plan import A_SIDE, B_SIDE, Plan
from .state import MOMENTS, PHASE, SAVED, fit, init_pair, init_param, leave_units

Slot = tuple[int, int]


class Binding:
    """`pairs` are entries `chosen` of the optimizer's pairs; `results` is what the last step returned."""

    def __init__(self, pairs: Sequence[LoRAPair], chosen: list[int], backend: Backend):
        self.pairs, self.chosen, self.backend = list(pairs), chosen, backend
        self.plan = Plan(self.pairs)
        self.results: Tensor | None = None
        self._owner: Any = None
        self._bound: list[Tensor | None] = []
        self._options: tuple[Any, ...] = ()

    def bind_state(
        self, state: MutableMapping[Tensor, Any], slots: list[Slot | None], amsgrad: bool, keep_S: bool
    ) -> None:
        """Point at moments, step counts and what else the step reads; slots: the groups of each pair's A and B."""
        if self.plan.moved():
            as_pairs(self.pairs)
            self.plan.rebuild()
            self._owner = None
        names = (*MOMENTS[: 3 if amsgrad else 2], "step")
        options = (slots, names, keep_S)
        if self._owner is state and self._options == options and all(map(is_, self._now(state), self._bound)):
            return
        self._options = options
        sides: tuple[list[Any], list[Any]] = ([], [])
        for pair, slot in zip(self.pairs, slots):
            for factor, states in zip((pair.A, pair.B), sides):
                # a pair that this optimizer does not own is never active: its row points at the factor, harmlessly
                entries = state[factor] if slot else dict.fromkeys(MOMENTS, factor)
                init_param(entries, factor, amsgrad, pair.experts)
                fit(entries, factor, pair.experts)
                states.append(entries)
            init_pair(sides[0][-1], pair, keep_S)
        for index, (side, states) in enumerate(zip((A_SIDE, B_SIDE), sides)):
            for column, name in zip((col.M, col.V, col.X), names[:-1]):
                self.plan.bind(side, column, [entries[name] for entries in states])
            self.plan.bind_once(side + col.STEP, [entries["step"] for entries in states])
            self.plan.bind_groups(side, [slot[index] if slot else 0 for slot in slots])
        self.plan.bind_once(col.PHASE, [entries[PHASE] for entries in sides[0]])
        if keep_S:
            self.plan.bind_once(col.SAVED, [entries[SAVED] for entries in sides[0]])
        self._owner, self._bound = state, self._now(state)

    def _now(self, state: MutableMapping[Tensor, Any]) -> list[Tensor | None]:
        """The state tensors of every pair, to see whether one has been replaced."""
        slots, names, keep_S = self._options
        found: list[Tensor | None] = []
        for pair, slot in zip(self.pairs, slots):
            if slot:
                a, b = state.get(pair.A, {}), state.get(pair.B, {})
                found += [a.get(PHASE), a.get(SAVED) if keep_S else None]
                for name in names:
                    found += [a.get(name), b.get(name)]
        return found

    def bind_grads(self, state: MutableMapping[Tensor, Any]) -> list[tuple[Tensor, int]]:
        """Point at this step's gradients; returns factors whose partner has none, with their group.

        The moments of such a pair are moved back to units of S = I: it takes plain steps.
        """
        grads: list[tuple[Tensor | None, Tensor | None]] = []
        strays: list[tuple[Tensor, int]] = []
        for pair, slot in zip(self.pairs, self._options[0]):
            a, b = pair.A.grad, pair.B.grad
            if slot is not None and a is not None and b is not None:
                _check_grad(pair, pair.A, a)
                _check_grad(pair, pair.B, b)
            else:
                owned = [] if slot is None else [(pair.A, slot[0], a), (pair.B, slot[1], b)]
                lone = [(factor, group) for factor, group, grad in owned if grad is not None]
                if lone:
                    leave_units(state[pair.A], state[pair.B], pair)
                strays += lone
                a = b = None
            grads.append((a, b))
        self.plan.bind_grads(grads)
        self._written = [t for pair, (a, _) in zip(self.pairs, grads) if a is not None for t in (pair.A, pair.B)]
        return strays

    def run(self, step: AdamWStep) -> None:
        if not self._written:
            self.results = None
            return
        self.results = self.backend.adamw(self.plan, step)
        self.plan.release_grads()
        mark_written(self._written)


def _check_grad(pair: LoRAPair, factor: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided or grad.dtype is not factor.dtype:
        remedy = "Densify or cast the gradient before the step."
        got = f"{grad.dtype}, {grad.layout}"
        fail(f"{pair.name}, gradient", f"{factor.dtype}, strided, like its factor", got, remedy)
