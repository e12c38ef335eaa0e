"""RefLoRA in front of an optimizer that never sees the factors: DeepSpeed's ZeRO-1 and 2 flatten and share them out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract import SKIPPED, fail, is_sharded
from ..diagnostics import Diagnostics
from ..optim.pairs import PairOps, is_identity, multiply
from .peft import find_pairs


class GradientHooks:
    """Preconditions the gradients of a model's LoRA pairs as autograd makes them: `gA <- S^-1 gA`, `gB <- gB S`.

    For use with an Adam-like optimizer of whatever kind steps the parameters, or parts of them. The hooks run before
    gradients are accumulated, averaged over processes, clipped or shared out. S is linear and stays as it is until
    `refresh()`, which is to be called after every step that has moved the weights (oftener does no harm): so
    preconditioning commutes with all of that but clipping, which then sees the preconditioned gradients.

    S is divided by one constant a layer, ||B||_F / ||A||_F when it first was not I: Adam divides a constant away, and
    training from B = 0 has no jump where S leaves I. The constants are the `state_dict`, for a resumed run.
    Raises as `reflora.find_pairs`, and ValueError for sharded factors (FSDP2).
    """

    def __init__(self, model: nn.Module, backend: str | None = None, precision: str = "float64"):
        self.pairs = find_pairs(model)
        for pair in self.pairs:
            if is_sharded(pair.A):
                remedy = "FSDP2 is served by reflora.create_reflora_optimizer."
                fail(pair.name, "factors that this process holds whole", "DTensor", remedy)
        self._ops = PairOps(self.pairs, backend, precision)
        self._units: list[Tensor | None] = [None] * len(self.pairs)
        self._matrices: dict[int, Tensor] = {}
        self.refresh()
        self._handles = [
            factor.register_hook(_Multiply(self, index, side))
            for index, pair in enumerate(self.pairs)
            for side, factor in ((1, pair.A), (0, pair.B))
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take S of the factors as they are now."""
        solved = self._ops.solve(range(len(self.pairs)))
        for index, (status, scale) in self._ops.outcome().items():
            left = (status != SKIPPED) & ~is_identity(status, scale)
            unit = self._units[index]
            unit = torch.ones_like(scale) if unit is None else unit.to(scale)
            unit = scale.where((unit == 1) & left, unit)
            self._units[index] = unit
            by = torch.stack([1 / unit, unit], 1)[..., None, None].where(left[:, None, None, None], 1.0)
            self._matrices[index] = solved[index] * by.to(solved[index])

    def diagnostics(self) -> Diagnostics:
        """Of the last `refresh`, layer by layer; reading its properties synchronises."""
        return self._ops.diagnostics()

    def remove(self) -> None:
        """Let the gradients be."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """The constant of each layer, `[experts]`, by name."""
        return {pair.name: unit.clone() for pair, unit in zip(self.pairs, self._units) if unit is not None}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Raises ValueError for the state of other layers."""
        names = [pair.name for pair in self.pairs]
        if set(state_dict) != set(names):
            fail(
                "state_dict",
                f"the layers {', '.join(names[:3])}, ...",
                sorted(state_dict)[:3],
                "Load the same model's.",
            )
        self._units = [state_dict[name].clone() for name in names]
        self.refresh()


class _Multiply:
    """The hook of one factor; side 1 is A."""

    def __init__(self, owner: GradientHooks, index: int, side: int):
        self.owner, self.index, self.side = owner, index, side

    def __call__(self, grad: Tensor) -> Tensor:
        pair = self.owner.pairs[self.index]
        made = grad.detach().clone()
        views = pair.views_A(made) if self.side else [view.mT for view in pair.views_B(made)]
        multiply(views, self.owner._matrices[self.index][:, self.side].unbind())
        return made
