"""Pairs on a backend: one engine per device, with their table and what is kept for them between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Generic, TypeVar

import torch
from torch import Tensor

from . import columns as col
from .backends import resolve
from .checks import check_real
from .constants import START_STEPS
from .diagnostics import Diagnostics, diagnose
from .pairs import LoRAPair, as_pairs
from .plan import Plan, by_device

# one (of A, of B) per pair; None: the pair does not take part
Sides = Sequence[tuple[Tensor | None, Tensor | None]]
_DEVICE = attrgetter("device")


class Engine:
    """The pairs of one device: entries `chosen` of a longer list, whose rows are numbered from `first_rows`.

    results: float64 `[rows, RESULTS]` of the last call, on the device; None before it.
    """

    def __init__(
        self, pairs: Sequence[LoRAPair], chosen: Sequence[int], first_rows: Sequence[int], backend: str | None
    ):
        self.pairs, self.chosen, self.first_rows = list(pairs), list(chosen), list(first_rows)
        self.plan = Plan(self.pairs)
        self.plan.tag(self.first_rows)
        self.backend = resolve(backend, self.plan.device)
        self.results: Tensor | None = None

    @property
    def parted(self) -> bool:
        """Whether a factor has left the device: its pair needs another engine."""
        return {*map(_DEVICE, self.plan.factors)} != {self.plan.device}

    def refresh(self) -> None:
        """Check all factors and read again where they lie, once any has moved; nothing is kept."""
        as_pairs(self.pairs)
        self.plan.rebuild()
        self.plan.tag(self.first_rows)

    def refactor(self, scalar: bool, precision: str, active: Sequence[bool] | None = None) -> Tensor:
        """`reflora.refactor_` of the active pairs; active=None: of all."""
        on = active or [True] * len(self.pairs)
        factors = [(p.A, p.B) if each else (None, None) for p, each in zip(self.pairs, on)]
        self.plan.bind_grads(factors)
        self.results = self.backend.refactor(self.plan, scalar, precision)
        return self._done(factors)

    def precondition(
        self, grads: Sides, scalar: bool, precision: str, counts: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        """`reflora.precondition_`; counts: by pair, its steps, float32 `[experts]`, for an S that is phased in."""
        self.plan.bind_grads(grads)
        self.results = self.backend.precondition(self.plan, scalar, precision, self._bind_counts(counts))
        return self._done(grads)

    def solve(
        self, precision: str, counts: Mapping[int, Tensor] | None = None, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """S and S^-1 of each pair, `[experts, 2, r, r]` in float32 (float64 for float64 factors), new or in `out`."""
        found = [_room(pair) for pair in self.pairs] if out is None else list(out)
        self.plan.bind_grads([(pair.A, pair.B) for pair in self.pairs])
        self.plan.bind_once(col.SAVED, found)
        self.results = self.backend.solve(self.plan, precision, self._bind_counts(counts))
        self.plan.release_grads()
        self.plan.pair_tensors.pop(col.SAVED, None)
        return found

    def _bind_counts(self, counts: Mapping[int, Tensor] | None) -> int:
        if counts is None:
            return 0
        places = range(len(self.pairs))
        self.plan.bind_once(col.COUNT, [counts[i] if i in counts else _no_steps(self.pairs[i]) for i in places])
        return START_STEPS

    def _done(self, written: Sides) -> Tensor:
        self.plan.release_grads()
        mark_written([t for a, b in written if a is not None and b is not None for t in (a, b)])
        assert self.results is not None
        return self.results


E = TypeVar("E", bound=Engine)


class Engines(Generic[E]):
    """The engines of pairs on any devices, made on first use, and again where a pair has moved.

    make: builds an engine from pairs, their places among all, their first rows, and the backend.
    """

    def __init__(
        self, pairs: Sequence[LoRAPair], backend: str | None,
        make: Callable[[list[LoRAPair], list[int], list[int], str | None], E],
    ):  # fmt: skip
        self.pairs, self.backend, self._make = list(pairs), backend, make
        self._engines: list[E] = []
        for device in {pair.A.device for pair in self.pairs}:
            resolve(backend, device)

    def ready(self) -> list[E]:
        """One per device, none of them stale."""
        check_real()
        moved = [engine for engine in self._engines if engine.plan.moved()]
        if any(engine.parted for engine in moved):
            self._engines, moved = [], []
        for engine in moved:
            engine.refresh()
        if not self._engines:
            first_rows = [0, *accumulate(pair.experts for pair in self.pairs)]
            self._engines = [
                self._make([self.pairs[i] for i in chosen], chosen, [first_rows[i] for i in chosen], self.backend)
                for chosen in by_device(self.pairs).values()
            ]
        return self._engines

    @property
    def made(self) -> list[E]:
        """The engines made so far."""
        return self._engines

    def diagnostics(self, reuses: bool = False) -> Diagnostics:
        """What the last call did, layer by layer."""
        done = [(engine, engine.results) for engine in self._engines if engine.results is not None]
        plans, results = [engine.plan for engine, _ in done], [found for _, found in done]
        return diagnose(self.pairs, [engine.chosen for engine, _ in done], plans, results, reuses)

    def reports(self, of: Callable[[Tensor], Tensor] = lambda results: results) -> dict[int, Tensor]:
        """Of the last call, by pair: its rows of the result table, `[experts, RESULTS]` on the pair's device.

        of: what to make of an engine's results `[rows, RESULTS]` before they are split.
        """
        found: dict[int, Tensor] = {}
        for engine in self._engines:
            if engine.results is not None:
                found.update(zip(engine.chosen, of(engine.results).split([pair.experts for pair in engine.pairs])))
        return found


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Writes through raw pointers bypass autograd's version counters."""
    torch.autograd.graph.increment_version(tensors)


def apply_dtype(pair: LoRAPair) -> torch.dtype:
    """The dtype in which S is kept and applied."""
    return torch.float64 if pair.A.dtype == torch.float64 else torch.float32


def _no_steps(pair: LoRAPair) -> Tensor:
    return torch.zeros(pair.experts, dtype=torch.float32, device=pair.A.device)


def _room(pair: LoRAPair) -> Tensor:
    """Memory for S and S^-1 of a pair."""
    return torch.empty(pair.experts, 2, pair.rank, pair.rank, dtype=apply_dtype(pair), device=pair.A.device)
