"""RefLoRA around an optimizer class: gradients are preconditioned in front of its step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ambient import independent
from ..columns import PLAIN
from ..diagnostics import uniform
from ..pairs import local
from .state import PHASE, SAVED, STEPS
from .wrapped_pairs import OwnPairs

if TYPE_CHECKING:
    from .pairs import Counts

Written = list[tuple[Tensor, int]]


class FullStep(OwnPairs):
    """The part of Wrapped for scalar=False."""

    _pending: tuple[Written, dict[Tensor, dict[str, Tensor]]] | None

    def _preconditioned(self, active: list[bool], steps: int) -> dict[Tensor, dict[str, Tensor]]:
        """`_precondition`, but not again after a failed step of the base class: its gradients already are."""
        if self._pending is None or not same(self._pending[0], versions(self._params())):
            self._pending = None
            kept = self._precondition(active, steps)
            self._pending = versions(self._params()), kept
        return self._pending[1]

    @independent()
    def _precondition(self, active: list[bool], steps: int) -> dict[Tensor, dict[str, Tensor]]:
        """Gradients times S. Returns what to keep in the state of each A once the base class has made its own."""
        since, gentle = steps - (self.warmup_steps or 0), self._gentle
        chosen = [index for index, on in enumerate(active) if on]
        kept: dict[Tensor, dict[str, Tensor]] = {}
        in_units_of_I = gentle or since < 0
        if in_units_of_I:
            new = (self.pairs[i] for i in chosen if PHASE not in self.state.get(self.pairs[i].A, {}))
            kept = {pair.A: self._units.identity(pair) for pair in new}
            self._units.return_to_identity(chosen)
        if since < 0:
            self._skip = uniform(self.pairs, PLAIN)
        else:
            counts = self._counts(chosen, steps) if gentle else None
            fresh = self._apply_S(active, chosen, since, counts)
            if counts:
                self._count_from_zero({i: counts[i] for i in (chosen if self.interval == 1 else fresh)})
            found = {i: {SAVED: matrices} for i, matrices in fresh.items()}
            for i, count in (counts or {}).items():
                if self.state.get(self.pairs[i].A, {}).get(STEPS) is not count:
                    found.setdefault(i, {})[STEPS] = count
            if not gentle:
                for i, entries in self._units.leave_identity(fresh if self.interval > 1 else chosen).items():
                    found.setdefault(i, {}).update(entries)
            for i, entries in found.items():
                kept.setdefault(self.pairs[i].A, {}).update(entries)
        self._units.scale_grads(chosen, kept, everywhere=not in_units_of_I)
        return kept

    def _apply_S(self, active: list[bool], chosen: list[int], since: int, counts: Counts | None) -> dict[int, Tensor]:
        """Gradients times S. With an interval, returns the matrices newly computed."""
        if self.interval == 1:
            self._ops.precondition(active, counts=counts)
            for i in chosen:  # with a larger interval later on, one is computed anew
                self.state.get(self.pairs[i].A, {}).pop(SAVED, None)
            return {}
        saved = {i: self.state[self.pairs[i].A].get(SAVED) for i in chosen if self.pairs[i].A in self.state}
        due = (i for i in chosen if since % self.interval == 0 or saved.get(i) is None)
        fresh = self._ops.solve(due, counts)
        self._ops.apply({i: fresh[i] if i in fresh else saved[i] for i in chosen})
        return fresh

    def _counts(self, chosen: list[int], steps: int) -> dict[int, Tensor]:
        """Steps that pairs have taken part in; where the state does not say, the fewer of the two factors' own."""
        found = {}
        for i in chosen:
            pair, own = self.pairs[i], self.state.get(self.pairs[i].A, {})
            if STEPS in own:
                found[i] = own[STEPS].to(local(pair.A).device)
                continue
            states = [self.state.get(factor, {}) for factor in (pair.A, pair.B)]
            taken = min(float(state.get("step", steps)) if state else 0.0 for state in states)
            found[i] = torch.full((pair.experts,), taken, dtype=torch.float32, device=local(pair.A).device)
        return found

    def _count_from_zero(self, counts: dict[int, Tensor]) -> None:
        """Reset pairs whose S was just computed with a factor at 0: their start is still to come."""
        if counts:
            started = self._ops.started()
            torch._foreach_mul_(list(counts.values()), [started[i] for i in counts])


def versions(params: Iterable[Tensor]) -> Written:
    """The gradients, each with its version."""
    return [(p.grad, p.grad._version) for p in params if p.grad is not None]


def same(one: Written, other: Written) -> bool:
    return len(one) == len(other) and all(a is b and v == w for (a, v), (b, w) in zip(one, other))
