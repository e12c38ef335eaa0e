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
from .state import MOMENTS, PHASE, SAVED, init_pair, init_param

Slot = tuple[int, int]


class Binding:
    """`pairs` are entries `chosen` of the optimizer's pairs; `results` is what the last step returned."""

    def __init__(self, pairs: Sequence[LoRAPair], chosen: list[int], backend: Backend):
        self.pairs, self.chosen, self.backend = list(pairs), chosen, backend
        self.plan = Plan(self.pairs)
        self.results: Tensor | None = None
        self._owner: Any = None
        self._states: list[dict[str, Any]] = []
        self._bound: list[Tensor] = []
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
        if self._owner is state and self._options == options and state.get(self.pairs[0].A) is self._states[0]:
            now = [entries.get(name) for entries in self._states for name in names]
            if all(map(is_, now, self._bound)):
                return
        for pair in self.pairs:
            for factor in (pair.A, pair.B):
                init_param(state[factor], factor, amsgrad, pair.experts)
            init_pair(state[pair.A], pair, keep_S)
        sides = [[state[pair.A] for pair in self.pairs], [state[pair.B] for pair in self.pairs]]
        for index, (side, states) in enumerate(zip((A_SIDE, B_SIDE), sides)):
            for column, name in zip((col.M, col.V, col.X), names[:-1]):
                self.plan.bind(side, column, [entries[name] for entries in states])
            self.plan.bind_once(side + col.STEP, [entries["step"] for entries in states])
            self.plan.bind_groups(side, [slot[index] if slot else 0 for slot in slots])
        self.plan.bind_once(col.PHASE, [entries[PHASE] for entries in sides[0]])
        if keep_S:
            self.plan.bind_once(col.SAVED, [entries[SAVED] for entries in sides[0]])
        self._owner, self._options, self._states = state, options, [*sides[0], *sides[1]]
        self._bound = [entries[name] for entries in self._states for name in names]

    def bind_grads(self) -> list[tuple[Tensor, int]]:
        """Point at this step's gradients; returns factors whose partner has none, with their group."""
        grads: list[tuple[Tensor | None, Tensor | None]] = []
        strays = []
        for pair, slot in zip(self.pairs, self._options[0]):
            a, b = pair.A.grad, pair.B.grad
            if slot is None or a is None or b is None:
                if slot is not None:
                    strays += [
                        (t, g) for t, g, grad in ((pair.A, slot[0], a), (pair.B, slot[1], b)) if grad is not None
                    ]
                a = b = None
            elif a.layout is not torch.strided or b.layout is not torch.strided:
                fail(
                    f"{pair.name}, gradient", "a dense tensor", a.layout, "Use sparse=False in the layer.", RuntimeError
                )
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
