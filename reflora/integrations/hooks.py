"""RefLoRA in front of an optimizer that never sees the factors: DeepSpeed's ZeRO-1 and 2 flatten and partition them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..ambient import independent, outside_inference
from ..checks import check_flags, check_schedule, fail
from ..diagnostics import Diagnostics
from ..optim.adamw_engine import capturing
from ..optim.membership import LONE, Unserved, listed, say_plain
from ..optim.pairs import Outcome, PairOps, multiply, new_units
from ..pairs import HOOKED, LoRAPair, check_unhooked, form_of, is_sharded
from .hook_groups import HookGroup, grouped, kind_of, sides
from .peft import find_pairs

LOADED = "Load the state_dict() of GradientHooks over the same model."
STALE = (
    "GradientHooks: the weights have moved since refresh(), and S is still that of the old ones. Call refresh() once "
    "after every step of the optimizer."
)


class GradientHooks:
    """Preconditions the gradients of a model's LoRA pairs as autograd makes them: `gA <- S^-1 gA`, `gB <- gB S`.

    For any Adam-like optimizer that steps the parameters, or parts of them. The hooks run before gradients are
    accumulated, averaged over processes, clipped or partitioned. S is linear and stays fixed until `refresh()`, to be
    called once after every step that has moved the weights. So preconditioning commutes with all of these but
    clipping, which sees the preconditioned gradients.

    From B = 0, S is phased in gradually, without its scale c = ||B||_F / ||A||_F. With warmup_steps S has its scale,
    and where it leaves I, B's gradients are divided by c (or A's multiplied, if A was 0), so that they do not jump.
    These constants and each layer's step count are in the `state_dict`, for a resumed run.

    Args:
        model: A PEFT model; under DeepSpeed `engine.module`.
        backend: None, "triton", "cpp" or "torch".
        precision: "float64" or "float32".
        warmup_steps: None phases S in gradually, as RefLoRAAdamW does; a number takes that many first steps of each
            pair with S = I. A step of a pair is a `refresh()` after a backward pass through it.
        follow: Only with warmup_steps. True divides by the largest c so far, so that both factors count in the norm of
            all gradients, as clipping needs. False divides by c as it was when S left I: Adam then takes RefLoRAAdamW's
            step up to eps, but B's gradients grow with c, and under a clipped norm A hardly moves.

    Raises:
        ValueError: As `reflora.find_pairs`; sharded factors (FSDP2, tensor parallelism); a model that already has such
            hooks.
    """

    def __init__(
        self, model: nn.Module, backend: str | None = None, precision: str = "float64", *,
        warmup_steps: int | None = None, follow: bool = True,
    ):  # fmt: skip
        check_schedule(1, warmup_steps)
        check_flags({"follow": follow})
        self.pairs = find_pairs(model)
        self._unserved = Unserved(self.pairs, "GradientHooks were made without them. remove() these and make new ones")
        self.warmup_steps, self.follow = warmup_steps, follow
        for pair in self.pairs:
            if pair.sharded:
                remedy = "For FSDP2 and tensor parallelism use reflora.create_reflora_optimizer."
                parts = [form_of(factor) for factor in (pair.A, pair.B) if is_sharded(factor)]
                fail(pair.name, "factors that this process holds whole", parts[0], remedy)
        check_unhooked(self.pairs)
        self._ops = PairOps(self.pairs, backend, precision)
        self._groups = self._grouped(
            {i: torch.zeros(pair.experts, 4, dtype=torch.float64, device="cpu") for i, pair in enumerate(self.pairs)}
        )
        self._went_backward: set[int] = set()
        self._in_other_units = False  # loaded state may be, and its gradients with it
        self._matrices: dict[int, Tensor] = {}
        self._witness: _Witness | None = None
        self._told: set[str] = set()
        self.refresh()
        HOOKED[0] += 1
        self._handles = [
            factor.register_hook(_Multiply(self, index, side))
            for index, pair in enumerate(self.pairs)
            for side, factor in ((1, pair.A), (0, pair.B))
        ]

    @torch.no_grad()
    @independent()
    def refresh(self) -> None:
        """Compute S from the current factors, in a number of launches that does not grow with the model."""
        with outside_inference([pair.A for pair in self.pairs]):
            self._refresh()
        self._unserved.look(stacklevel=5)

    def _refresh(self) -> None:
        groups = self._next_groups()
        gentle = self.warmup_steps is None
        warming = {i for group in groups for i in group.below(self.warmup_steps)} if self.warmup_steps else set()
        matrices = self._plain(groups, warming)
        counts = {i: count for group in groups for i, count in group.split(group.counts)} if gentle else {}
        rooms = {i: room for group in groups for i, room in group.split(group.matrices)}
        solved = self._ops.solve((i for i in range(len(self.pairs)) if i not in warming), counts or None, rooms)
        matrices.update(solved)
        reports = self._ops.reports() if solved else {}
        for group in groups:
            chosen, rows = group.rows_of(reports)
            if not chosen:
                continue
            found, kept = Outcome.of(torch.cat([reports[i] for i in chosen])), group.units[rows]
            units, group.units[rows] = (
                self._return_to_identity(kept, found.scale) if gentle else self._leave_identity(kept, found)
            )
            group.matrices[rows] *= sides(units).to(group.matrices)
            if gentle:  # where a factor is 0 the start is still to come
                group.counts[rows] *= found.started
        # all at once: a failure before this leaves the last S with its units and counts
        self._groups, self._matrices, self._went_backward = groups, matrices, set()
        self._witness = None

    def _note(self, index: int, side: int) -> None:
        """Note a backward pass through a pair; the first one's B is kept, to see whether it moves."""
        self._went_backward.add(index)
        B = self.pairs[index].B
        if side or STALE in self._told or capturing(B.device):
            return
        if self._witness is None:
            self._witness = _Witness(index, B.detach().clone())
        elif self._witness.index == index and self._witness.moved(B):
            self._told.add(STALE)
            warnings.warn(STALE, stacklevel=2)

    def _say_lone(self, pair: LoRAPair) -> None:
        """Warn that one of its factors has been frozen since: it takes a plain step."""
        if LONE not in self._told:
            self._told.add(LONE)
            say_plain([pair.name], LONE, stacklevel=3)

    def _plain(self, groups: Sequence[HookGroup], indices: Set[int]) -> dict[int, Tensor]:
        """S = I. Where loaded state is in other units, returns the matrices that keep gradients in them."""
        norms = self._ops.norms(indices) if self._in_other_units else {}
        found: dict[int, Tensor] = {}
        for group in groups:
            chosen, rows = group.rows_of(indices)
            if chosen and not norms:
                group.units[rows, :2], group.units[rows, 2] = 1, 0
            elif chosen:
                norm_A, norm_B = torch.cat([norms[i] for i in chosen], 1)
                units, group.units[rows] = self._return_to_identity(group.units[rows], norm_B / norm_A)
                eye = torch.eye(group.matrices.shape[-1], dtype=group.matrices.dtype, device=units.device)
                group.matrices[rows] = eye * sides(units).to(eye)
                found.update((i, room) for i, room in group.split(group.matrices) if i in indices)
        return found

    def _return_to_identity(self, kept: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Units `[rows, 2]` of an S without its scale c, and what to keep of them, `[rows, 3]`.

        Units of loaded state in which S had its scale continue.
        """
        leaves = (kept[:, 2] > 0) & (c > 0) & c.isfinite()
        units = kept[:, :2].where(kept[:, :2] > 0, 1.0) / c.where(leaves, 1.0)[:, None]
        return units, torch.cat([units, torch.zeros_like(kept[:, 2:])], 1)

    def _leave_identity(self, kept: Tensor, found: Outcome) -> tuple[Tensor, Tensor]:
        """The same for an S with its scale c."""
        units = new_units(kept[:, :2], kept[:, 2], found)
        if self.follow:
            further = torch.stack([units[:, 0].minimum(found.scale), units[:, 1].maximum(found.scale)], 1)
            # 0 and 1: no unit to keep
            units = further.where(found.left[:, None] & (units > 0) & (units != 1), units)
        final = kept[:, 2:].maximum(found.left[:, None])
        return units.where(units > 0, 1.0), torch.cat([units, final], 1)

    def _next_groups(self) -> list[HookGroup]:
        """The groups after the backward passes so far, in new tensors; factors may have moved since."""
        if any(group.moved(self.pairs) for group in self._groups):
            return self._grouped(self._state())
        return [group.after(self._went_backward) for group in self._groups]

    def _grouped(self, state: Mapping[int, Tensor]) -> list[HookGroup]:
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, pair in enumerate(self.pairs):
            alike.setdefault(kind_of(pair), []).append(index)
        return [grouped(kind, own, state, host=self.warmup_steps is not None) for kind, own in alike.items()]

    def _state(self) -> dict[int, Tensor]:
        """By pair `[experts, 4]`: its units, and its steps including one whose refresh is still to come."""
        groups = [group.after(self._went_backward) for group in self._groups]
        columns = [torch.cat([group.units, group.counts.to(group.units)[:, None]], 1) for group in groups]
        return {i: own for group, whole in zip(groups, columns) for i, own in group.split(whole)}

    def diagnostics(self) -> Diagnostics:
        """What the last `refresh` found, layer by layer; reading its properties syncs."""
        return self._ops.diagnostics()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        remedy = "Build GradientHooks(model) over the copy and load this one's state_dict()."
        fail("a copy of GradientHooks", "hooks of one model", "copy or pickle", remedy, TypeError)

    def state_dict(self) -> dict[str, Tensor]:
        """By layer name `[experts, 4]`: its constants for A and B, whether they are final, and its steps so far."""
        state = self._state()
        return {pair.name: state[index].clone() for index, pair in enumerate(self.pairs)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Raises ValueError or TypeError for the state of other layers. Nothing has changed then."""
        self._check_layers(state_dict)
        state = [_entry(state_dict[pair.name], pair) for pair in self.pairs]
        before = self._groups, self._went_backward, self._in_other_units
        self._in_other_units = any(bool((own[:, :3] != own.new_tensor([1, 1, 0])).any()) for own in state)
        self._groups, self._went_backward = self._grouped(dict(enumerate(state))), set()
        try:
            self.refresh()
        except BaseException:
            self._groups, self._went_backward, self._in_other_units = before
            raise

    def _check_layers(self, state_dict: Any) -> None:
        if not isinstance(state_dict, Mapping):
            fail("state_dict", "a dictionary of layers", type(state_dict).__name__, LOADED, TypeError)
        names = [one.name for one in self.pairs]
        if set(state_dict) != set(names):
            missing = listed([name for name in names if name not in state_dict]) or "none"
            others = listed([str(name) for name in state_dict if name not in set(names)]) or "none"
            fail("state_dict", f"the model's {len(names)} layers", f"missing {missing}; others {others}", LOADED)


def _entry(own: Any, pair: LoRAPair) -> Tensor:
    """A pair's entry in loaded state, `[experts, 4]`; older states have no fourth column."""
    if not isinstance(own, Tensor):
        fail(pair.name, f"a tensor [{pair.experts}, 4]", type(own).__name__, LOADED, TypeError)
    if own.dim() != 2 or len(own) != pair.experts or own.shape[1] not in (3, 4):
        fail(pair.name, f"[{pair.experts}, 4]", list(own.shape), LOADED)
    if not own.isfinite().all():
        fail(pair.name, "finite numbers", "inf or nan", LOADED)
    return torch.cat([own, own.new_zeros(len(own), 4 - own.shape[1])], 1)


class _Witness:
    """B of one pair as it was at its first backward pass since a refresh."""

    def __init__(self, index: int, B: Tensor):
        self.index, self.B, self.passes = index, B, 1

    def moved(self, B: Tensor) -> bool:
        """Checked in backward passes 2, 4, 8, ...: accumulating gradients costs few syncs."""
        self.passes += 1
        return self.passes & (self.passes - 1) == 0 and not torch.equal(self.B, B.detach().to(self.B))


class _Multiply:
    """The hook of one factor; side 1 is A."""

    preconditions = True  # read by check_unhooked

    def __init__(self, owner: GradientHooks, index: int, side: int):
        self.owner, self.index, self.side = owner, index, side

    def __call__(self, grad: Tensor) -> Tensor:
        pair = self.owner.pairs[self.index]
        if not (pair.A.requires_grad and pair.B.requires_grad):
            self.owner._say_lone(pair)
            return grad
        self.owner._note(self.index, self.side)
        if self.index not in self.owner._matrices:
            return grad
        made = grad.detach().clone()
        views = pair.views_A(made) if self.side else [view.mT for view in pair.views_B(made)]
        multiply(views, self.owner._matrices[self.index][:, self.side].unbind())
        return made
