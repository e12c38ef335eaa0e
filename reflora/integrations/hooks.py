"""RefLoRA in front of an optimizer that never sees the factors: DeepSpeed's ZeRO-1 and 2 flatten and share them out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ambient import independent
from ..contract import check_unhooked, fail, is_sharded
from ..diagnostics import Diagnostics
from ..optim.options import check_schedule
from ..optim.pairs import Outcome, PairOps, multiply, new_units
from .peft import find_pairs


class GradientHooks:
    """Preconditions the gradients of a model's LoRA pairs as autograd makes them: `gA <- S^-1 gA`, `gB <- gB S`.

    For use with an Adam-like optimizer of whatever kind steps the parameters, or parts of them. The hooks run before
    gradients are accumulated, averaged over processes, clipped or shared out. S is linear and stays as it is until
    `refresh()`, which is to be called once after every step that has moved the weights: so
    preconditioning commutes with all of that but clipping, which then sees the preconditioned gradients.

    From B = 0 S is entered gradually, without its scale c = ||B||_F / ||A||_F. With warmup_steps S has its scale, and
    where it leaves I B's gradients are divided by c (A's are multiplied, where it was A that was 0), so that they do
    not jump. These numbers and the steps so far, of each layer, are in the `state_dict`, for a resumed run.

    Args:
        model: A PEFT model; under DeepSpeed `engine.module`.
        backend: None, "triton", "cpp" or "torch".
        precision: "float64" or "float32".
        warmup_steps: None enters S gradually, as RefLoRAAdamW does; a number takes that many first steps of each pair
            with S = I. A step of a pair is a `refresh()` with a backward pass through it before.
        follow: Of warmup_steps alone. True divides by the largest c so far, so that the norm of all gradients stays one
            of both factors, as a clipping of it needs. False divides by c as it was when S left I: what Adam makes of
            that is RefLoRAAdamW's step up to eps, but B's gradients grow with c, and under a clipped norm A then
            hardly moves.

    Raises:
        ValueError: As `reflora.find_pairs`; sharded factors (FSDP2); a model that has such hooks.
    """

    def __init__(
        self, model: nn.Module, backend: str | None = None, precision: str = "float64", *,
        warmup_steps: int | None = None, follow: bool = True,
    ):  # fmt: skip
        check_schedule(1, warmup_steps)
        self.pairs = find_pairs(model)
        self.warmup_steps, self.follow = warmup_steps, follow
        for pair in self.pairs:
            if is_sharded(pair.A):
                remedy = "FSDP2 is served by reflora.create_reflora_optimizer."
                fail(pair.name, "factors that this process holds whole", "DTensor", remedy)
        check_unhooked(self.pairs)
        self._ops = PairOps(self.pairs, backend, precision)
        # [experts, 3] each: of A and B as new_units has them, and whether S has been other than I
        self._units = [torch.zeros(pair.experts, 3, dtype=torch.float64, device="cpu") for pair in self.pairs]
        # float32 [experts] each: steps that the pair has taken part in
        self._counts = [torch.zeros(pair.experts, dtype=torch.float32, device="cpu") for pair in self.pairs]
        self._went_backward: set[int] = set()
        self._in_other_units = False  # a loaded state may be: its gradients are
        self._matrices: dict[int, Tensor] = {}
        self.refresh()
        self._handles = [
            factor.register_hook(_Multiply(self, index, side))
            for index, pair in enumerate(self.pairs)
            for side, factor in ((1, pair.A), (0, pair.B))
        ]

    @torch.no_grad()
    @independent()
    def refresh(self) -> None:
        """Take S of the factors as they are now."""
        self._counts = self._counts_now()
        self._went_backward = set()
        everything, gentle = range(len(self.pairs)), self.warmup_steps is None
        warming = [i for i in everything if self.warmup_steps and float(self._counts[i].max()) < self.warmup_steps]
        self._plain(warming)
        counts = {i: self._counts[i].to(self.pairs[i].A.device) for i in everything} if gentle else {}
        solved = self._ops.solve(sorted({*everything}.difference(warming)), counts or None)
        outcome, started = (self._ops.outcome(), self._ops.started()) if solved else ({}, {})
        for index, found in outcome.items():
            units = self._return_to_identity(index, found.scale) if gentle else self._leave_identity(index, found)
            self._matrices[index] = solved[index] * _sides(units).to(solved[index])
            if gentle:  # from a factor that is 0 the start is still to come
                self._counts[index] = counts[index] * started[index]

    def _plain(self, indices: list[int]) -> None:
        """S = I; gradients stay in the units of a loaded state."""
        if not self._in_other_units:
            for index in indices:
                self._matrices.pop(index, None)
                self._units[index] = self._units[index].new_tensor([1.0, 1.0, 0.0]).expand_as(self._units[index])
            return
        norms = self._ops.norms(indices)
        for index, (norm_A, norm_B) in norms.items():
            units = self._return_to_identity(index, norm_B / norm_A)
            pair = self.pairs[index]
            eye = torch.eye(pair.rank, dtype=torch.promote_types(pair.A.dtype, torch.float32), device=units.device)
            self._matrices[index] = eye.expand(pair.experts, 2, -1, -1) * _sides(units).to(eye)

    def _return_to_identity(self, index: int, c: Tensor) -> Tensor:
        """Units `[experts, 2]` of an S without its scale c; those of a loaded state in which S had it go on."""
        kept = self._units[index].to(c)
        leaves = (kept[:, 2] > 0) & (c > 0) & c.isfinite()
        units = kept[:, :2].where(kept[:, :2] > 0, 1.0) / c.where(leaves, 1.0)[:, None]
        self._units[index] = torch.cat([units, torch.zeros_like(kept[:, 2:])], 1)
        return units

    def _leave_identity(self, index: int, found: Outcome) -> Tensor:
        """Units `[experts, 2]` of an S with its scale c."""
        kept = self._units[index].to(found.scale)
        units = new_units(kept[:, :2], kept[:, 2], found)
        if self.follow:
            further = torch.stack([units[:, 0].minimum(found.scale), units[:, 1].maximum(found.scale)], 1)
            # 0 and 1: nothing to keep a unit for
            units = further.where(found.left[:, None] & (units > 0) & (units != 1), units)
        self._units[index] = torch.cat([units, kept[:, 2:].maximum(found.left[:, None])], 1)
        return units.where(units > 0, 1.0)

    def _counts_now(self) -> list[Tensor]:
        """With the steps whose refresh is still to come."""
        return [count + (index in self._went_backward) for index, count in enumerate(self._counts)]

    def diagnostics(self) -> Diagnostics:
        """Of the last `refresh`, layer by layer; reading its properties synchronises."""
        return self._ops.diagnostics()

    def remove(self) -> None:
        """Let the gradients be."""
        for handle in self._handles:
            handle.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        remedy = "Build GradientHooks(model) over the copy and load this one's state_dict()."
        fail("a copy of GradientHooks", "hooks of one model", "copy or pickle", remedy, TypeError)

    def state_dict(self) -> dict[str, Tensor]:
        """By name of the layer `[experts, 4]`: its constants of A and B, whether they are settled, the steps so far."""
        counts = [count.to(units)[:, None] for count, units in zip(self._counts_now(), self._units)]
        return {pair.name: torch.cat(both, 1) for pair, both in zip(self.pairs, zip(self._units, counts))}

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
        self._units = [state_dict[name][:, :3].clone() for name in names]
        # earlier states have no fourth column
        self._in_other_units = any(bool((units != units.new_tensor([1, 1, 0])).any()) for units in self._units)
        columns = [state_dict[name][:, 3:].float().cpu() for name in names]
        self._counts = [column[:, 0] if column.shape[1] else column.new_zeros(len(column)) for column in columns]
        self._went_backward = set()
        self.refresh()


def _sides(units: Tensor) -> Tensor:
    """`[experts, 2, 1, 1]`: what S, of B's gradients, and S^-1, of A's, are multiplied by."""
    of_A, of_B = units.unbind(1)
    return torch.stack([1 / of_B, of_A], 1)[..., None, None]


class _Multiply:
    """The hook of one factor; side 1 is A."""

    preconditions = True  # what check_unhooked asks

    def __init__(self, owner: GradientHooks, index: int, side: int):
        self.owner, self.index, self.side = owner, index, side

    def __call__(self, grad: Tensor) -> Tensor:
        pair = self.owner.pairs[self.index]
        if not (pair.A.requires_grad and pair.B.requires_grad):
            return grad  # one of them was frozen since: a plain step
        self.owner._went_backward.add(self.index)
        if self.index not in self.owner._matrices:
            return grad
        made = grad.detach().clone()
        views = pair.views_A(made) if self.side else [view.mT for view in pair.views_B(made)]
        multiply(views, self.owner._matrices[self.index][:, self.side].unbind())
        return made
