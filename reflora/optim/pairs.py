"""Operations on the pairs of an optimizer, step after step: `reflora.functional` with its engines kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import columns as col
from ..ambient import independent, outside_inference
from ..checks import check_backend, check_precision
from ..columns import DEGENERATE, REFACTORED, SKIPPED
from ..diagnostics import Diagnostics
from ..direct import check_grads
from ..engine import Engine, Engines
from ..pairs import LoRAPair
from ..plan import by_device

# by number of a pair: the steps that it has taken part in, float32 `[experts]` on its device. With them S is phased in,
# without its scale c; without them it is the paper's
Counts = Mapping[int, Tensor]
# the columns of Outcome
OUTCOME = (col.STATUS, col.SCALE, col.NORM_A, col.NORM_B)


class Outcome(NamedTuple):
    """What became of a pair, or of several: columns of the result table, float64 `[rows]` each."""

    status: Tensor
    scale: Tensor
    norm_A: Tensor
    norm_B: Tensor

    @classmethod
    def of(cls, report: Tensor) -> Outcome:
        """report: rows of the result table, `[rows, RESULTS]`."""
        # views: indexing with a list of columns would sync
        return cls(*(report[:, column] for column in OUTCOME))

    @property
    def started(self) -> Tensor:
        """0 where a factor was 0, else 1, float32."""
        return ((self.norm_A != 0) & (self.norm_B != 0)).float()

    @property
    def identity(self) -> Tensor:
        """Whether S was I: a degenerate layer without a scale."""
        return (self.status == DEGENERATE) & (self.scale == 1)

    @property
    def left(self) -> Tensor:
        """Whether there was an S other than I."""
        return (self.status != SKIPPED) & ~self.identity


class PairOps:
    """`active`: one bool per pair; inactive pairs are left alone."""

    def __init__(self, pairs: Sequence[LoRAPair], backend: str | None = None, precision: str = "float64"):
        check_backend(backend)
        check_precision(precision)
        self.pairs = list(pairs)
        self.backend, self.precision = backend, precision
        self._engines = Engines(self.pairs, backend, Engine)
        # operations on a subset, and its numbers: of the last call if that solved a subset; of the latest subset
        self._solved: tuple[PairOps, list[int]] | None = None
        self._some: tuple[PairOps, list[int]] | None = None

    def diagnostics(self) -> Diagnostics:
        """What the last call did, layer by layer."""
        return self._engines.diagnostics() if self._solved is None else self._solved[0].diagnostics()

    def reports(self) -> dict[int, Tensor]:
        """By pair, its rows of the last call's result table, `[experts, RESULTS]` on the pair's device."""
        if self._solved is not None:
            inner, chosen = self._solved
            return {chosen[index]: report for index, report in inner.reports().items()}
        return self._engines.reports()

    def outcome(self) -> dict[int, Outcome]:
        """Outcome of the last call by pair, on the pair's device."""
        return {index: Outcome.of(report) for index, report in self.reports().items()}

    def started(self) -> dict[int, Tensor]:
        """By pair, 0 where the last call found a factor at 0, else 1, float32 `[experts]`."""
        if self._solved is not None:
            inner, chosen = self._solved
            return {chosen[index]: flags for index, flags in inner.started().items()}
        return self._engines.reports(lambda results: Outcome.of(results).started)

    def with_finite_grads(self, active: Sequence[bool]) -> list[bool]:
        """The active pairs themselves: where pairs are whole, the kernels check their gradients."""
        return list(active)

    def agree(self, finite: bool, moving: bool) -> tuple[bool, bool]:
        """As given: one process needs no vote."""
        return finite, moving

    def norms(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """Frobenius norms of A and B of some pairs, float64 `[2, experts]`."""
        chosen, found = list(indices), {}
        for places in by_device([self.pairs[i] for i in chosen]).values():
            pairs = {chosen[place]: self.pairs[chosen[place]] for place in places}
            views = [v for p in pairs.values() for v in (*p.views_A(p.A.detach()), *p.views_B(p.B.detach()))]
            norms = torch.stack(torch._foreach_norm(views, dtype=torch.float64))
            split = norms.split([2 * pair.experts for pair in pairs.values()])
            found.update({index: own.view(2, -1) for index, own in zip(pairs, split)})
        return found

    def precondition(self, active: Sequence[bool], scalar: bool = False, counts: Counts | None = None) -> None:
        """`reflora.precondition_` of each active pair's `.grad`; counts: of the active pairs, see `Counts`."""
        grads = [(p.A.grad, p.B.grad) if on else (None, None) for p, on in zip(self.pairs, active)]
        check_grads(self.pairs, grads)
        with self._ready() as engines:
            for engine in engines:
                own = [grads[i] for i in engine.chosen]
                engine.precondition(own, scalar, self.precision, _among(engine, counts))

    def refactor(self, active: Sequence[bool], scalar: bool) -> list[Tensor]:
        """`reflora.refactor_` of each active pair. Returns sqrt(s), float64 `[experts]` per pair, 1 if left alone."""
        with self._ready() as engines:
            for engine in engines:
                engine.refactor(scalar, self.precision, [active[i] for i in engine.chosen])
        outcome = self.outcome()
        found = [outcome[index] for index in range(len(self.pairs))]
        return [one.scale.sqrt().where(one.status == REFACTORED, 1.0) for one in found]

    def solve(
        self, indices: Iterable[int], counts: Counts | None = None, out: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:  # fmt: skip
        """S and S^-1 of some pairs, `[experts, 2, r, r]` in float32 (float64 for float64 factors), new or in `out`.

        I where a factor is not finite. Without a sync.
        """
        chosen = list(indices)
        if not chosen:
            return {}
        inner = self._of(chosen)
        found: dict[int, Tensor] = {}
        with inner._ready() as engines:
            for engine in engines:
                own = [chosen[place] for place in engine.chosen]
                of_own = counts and {place: counts[i] for place, i in enumerate(own)}
                room = None if out is None else [out[i] for i in own]
                found.update(zip(own, engine.solve(self.precision, of_own, room)))
        self._solved = None if inner is self else (inner, chosen)
        return found

    def _of(self, chosen: list[int]) -> PairOps:
        """The operations on some of the pairs, kept while these stay the same."""
        if chosen == list(range(len(self.pairs))):
            self._some = None
            return self
        if self._some is None or self._some[1] != chosen:
            self._some = PairOps([self.pairs[i] for i in chosen], self.backend, self.precision), chosen
        return self._some[0]

    def apply(self, saved: Mapping[int, Tensor]) -> None:
        """`gA <- S^-1 gA`, `gB <- gB S` with the matrices that `solve` returned, for those pairs."""
        views: list[Tensor] = []
        factors: list[Tensor] = []
        for index, matrices in saved.items():
            pair = self.pairs[index]
            gA, gB = pair.A.grad, pair.B.grad
            if gA is not None and gB is not None:
                views += [*pair.views_A(gA), *(view.mT for view in pair.views_B(gB))]
                factors += [*matrices[:, 1].unbind(), *matrices[:, 0].unbind()]
        multiply(views, factors)

    def scale_grads(self, index: int, unit: Tensor) -> None:
        """`gA` times A's unit, `gB` over B's, `[experts, 2]`: as if S had been divided by the units."""
        scale_sides(self.pairs[index], self.pairs[index].A.grad, self.pairs[index].B.grad, unit)

    @contextmanager
    def _ready(self) -> Iterator[list[Engine]]:
        with independent(), outside_inference([pair.A for pair in self.pairs]):
            self._solved = None
            yield self._engines.ready()


def _among(engine: Engine, counts: Counts | None) -> Counts | None:
    """The counts by the engine's own numbers."""
    return counts and {place: counts[i] for place, i in enumerate(engine.chosen) if i in counts}


def scale_sides(pair: LoRAPair, A: Tensor | None, B: Tensor | None, unit: Tensor) -> None:
    """Scale tensors like a pair's factors: A's times the unit, B's over it, `[experts]`, or `[experts, 2]` of both."""
    if A is not None and B is not None:
        views = [*pair.views_A(A), *pair.views_B(B)]
        of_A, of_B = unit.unbind(1) if unit.dim() == 2 else (unit, unit)
        torch._foreach_mul_(views, [*of_A.unbind(), *(1 / of_B).unbind()])


def new_units(units: Tensor, phase: Tensor, found: Outcome, kept: bool = False) -> Tensor:
    """Factor for A's gradients; B's are divided by it. For an optimizer whose state cannot be moved.

    units: `[experts, 2]` of A and B, 0 for a factor without state, which gets no gradient while the other is 0.
    phase: `[experts]`, 1 where S was not I before. kept: whether this S serves later steps too, in which both factors
    have gradients.

    Where S stops being I, a factor with state keeps the old unit of its gradients. A side without state starts at 1;
    a tiny c would sink it below Adam's eps.
    """
    still = (found.identity & (phase == 0))[:, None]
    touched = torch.stack([found.norm_B > 0, found.norm_A > 0], -1) | kept
    units = units.where(~still | (units > 0), touched.to(units))
    leaving = (found.left & (phase == 0))[:, None]
    return units.where(~leaving, (units * found.scale[:, None]).where(units > 0, 1.0))


@independent()
def multiply(views: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
    """Multiply each `[r, n]` view in place by its `[r, r]` matrix from the left, those of a shape at once."""
    groups: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for view, matrix in zip(views, matrices, strict=True):
        same, factors = groups.setdefault((view.shape, view.dtype, view.device), ([], []))
        same.append(view)
        factors.append(matrix)
    for (_, dtype, _), (same, factors) in groups.items():
        huge = torch.finfo(dtype).max
        stack, values = torch.stack(factors), torch.stack(same)
        wide = torch.promote_types(stack.dtype, dtype)
        product = stack.to(wide) @ values.to(wide)
        finite = values.isfinite().all(2).all(1)[:, None, None]
        torch._foreach_copy_(same, list(product.clamp(-huge, huge).where(finite, product).to(dtype).unbind()))


@independent()
def finite_and_moving(grads: list[Tensor]) -> tuple[bool, bool]:
    """Whether all are finite, and whether any is not zero."""
    grads = [grad for grad in grads if grad.numel()]  # this process may hold nothing of a sharded one
    norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
    if not math.isfinite(norm) or (grads and norm == 0):
        # the 2-norm is fast, but may overflow, or vanish, where the largest entry does not
        norm = float(torch.nn.utils.get_total_norm(grads, math.inf))
    return math.isfinite(norm), norm > 0
