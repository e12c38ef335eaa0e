"""RefLoRA-S around an optimizer class: the factors are refactored after its step, once their norms have met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ambient import independent
from ..backends.torch_solve import met
from ..columns import BALANCED, PLAIN
from ..diagnostics import uniform
from ..reference import meet
from .state import PHASE
from .transport import Transport
from .wrapped_pairs import OwnPairs


class ScalarStep(OwnPairs):
    """The part of Wrapped for scalar=True."""

    _balanced: set[int]
    _base_step: Callable[..., None]
    _hold_places: Callable[[], None]

    def _scalar_step(self, active: list[bool], steps: int, moving: bool, *loss: Any) -> None:
        """RefLoRA-S. `moving` is False in a step that only makes state, such as a loader's."""
        gentle = self._gentle
        self._units.return_to_identity(i for i, on in enumerate(active) if on)
        if steps == 0 and not gentle and not self.warmup_steps and moving:
            self._refactor(active, with_grads=True)
        waiting = [i for i, on in enumerate(active) if on and gentle and i not in self._balanced]
        Transport(self, [self.pairs[i] for i in waiting])  # fails now rather than once a pair begins
        before = self._ops.norms(waiting)
        self._base_step(*loss)
        if waiting:
            self._look(before, self._ops.norms(waiting))
            self._hold_places()
        after_warmup = steps + 1 - (self.warmup_steps or 0)
        if after_warmup >= 0 and after_warmup % self.interval == 0 and moving:
            chosen = [on and not (gentle and i not in self._balanced) for i, on in enumerate(active)]
            if any(chosen):
                return self._refactor(chosen, with_grads=False)
        self._skip = uniform(self.pairs, PLAIN)

    @independent()
    def _look(self, before: dict[int, Tensor], after: dict[int, Tensor]) -> None:
        """Mark as balanced the pairs whose norms `[2, experts]` have met in all experts, in the state of each A."""
        begun: list[Tensor] = []
        for i, norms in after.items():
            own = self.state[self.pairs[i].A]
            phase = own.get(PHASE, torch.zeros_like(norms[0], dtype=torch.float32))
            (old_A, old_B), (norm_A, norm_B), equal = before[i], norms, meet(self.pairs[i].A.dtype)
            own[PHASE] = phase.masked_fill(met(old_A, old_B, norm_A, norm_B, equal), BALANCED)
            begun.append((own[PHASE] == BALANCED).all().to(begun[0].device if begun else own[PHASE].device))
        self._balanced.update(i for i, on in zip(after, torch.stack(begun).tolist()) if on)

    @independent()
    def _refactor(self, active: list[bool], with_grads: bool) -> None:
        chosen = [index for index, on in enumerate(active) if on]
        move = Transport(self, [self.pairs[i] for i in chosen], with_grads)
        roots = self._ops.refactor(active, scalar=True)
        move.apply([roots[i] for i in chosen])
