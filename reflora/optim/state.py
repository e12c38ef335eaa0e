"""The state that is kept for a parameter: how it is made, and how loaded state is fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_held, fail
from ..columns import REFACTORED_UNITS, M, V, X
from ..pairs import LoRAPair


class Moment(NamedTuple):
    """Its column in the table, and its power of the gradient."""

    column: int
    power: int


MOMENTS = {"exp_avg": Moment(M, 1), "exp_avg_sq": Moment(V, 2), "max_exp_avg_sq": Moment(X, 2)}
SQUARES, GRAM, MEAN_GRAM = "exp_avg_sq", "exp_avg_gram", "gram_of_exp_avg"
MASTER = "master"
PHASE, STEPS, SAVED = "reflora_phase", "reflora_steps", "reflora_S"
HALF = (torch.bfloat16, torch.float16)
STRANGE = "The state belongs to another model or rank."


@dataclass(frozen=True)
class Storage:
    """What is kept in float32 beside 16-bit factors: their moments, and the weights themselves.

    grams: the entry that holds the second moments of a factor as one `[r, r]` matrix (grams.py), "" for AdamW's.
    """

    moments: bool = False
    master: bool = False
    grams: str = ""

    def dtype(self, factor: Tensor) -> torch.dtype:
        """The dtype of a factor's moments."""
        return torch.float32 if self.moments and factor.dtype in HALF else factor.dtype

    def has_master(self, factor: Tensor) -> bool:
        return self.master and factor.dtype in HALF

    def moments_of(self, amsgrad: bool) -> list[str]:
        """Names of the moments that are shaped like their parameter."""
        return ["exp_avg"] if self.grams else [name for name in MOMENTS if amsgrad or name != "max_exp_avg_sq"]


# parameters in no pair keep what torch's AdamW keeps
LIKE_TORCH = Storage()


def zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros with the parameter's own strides, which the kernels rely on."""
    zeros = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if zeros.stride() != param.stride():
        zeros = torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=param.device).zero_()
    return zeros


def check_fits(state: Mapping[str, Any], param: Tensor, experts: int) -> None:
    """Raises ValueError where `fit` could not: a moment of another shape, not one count per expert, freed memory."""
    shape = param.shape
    for name in (*MOMENTS, MASTER):
        kept = state.get(name)
        if kept is None:
            continue
        check_held(f"state {name!r}", kept)
        if kept.shape != shape:
            fail(f"state {name!r}", tuple(shape), tuple(kept.shape), STRANGE)
    step = state.get("step")
    if isinstance(step, Tensor):
        check_held("state 'step'", step)
        # of a factor that has left its pair the largest count is taken
        if step.dim() and step.shape != (experts,) and (experts > 1 or not step.numel()):
            fail("state 'step'", (experts,), tuple(step.shape), STRANGE)


def fit(state: dict[str, Any], param: Tensor, experts: int, storage: Storage) -> None:
    """Make moments and step count match their parameter in dtype, device and strides, which the kernels rely on.

    Needed after a load, and after `model.to(...)` has replaced the parameter's data. `check_fits` comes first.
    """
    device, strides, like = param.device, param.stride(), storage.dtype(param)
    for name in (*MOMENTS, MASTER):
        kept = state.get(name)
        if kept is None:
            continue
        dtype = torch.float32 if name == MASTER else like
        same = kept.dtype == dtype and kept.stride() == strides and kept.device == device
        if not same or kept.is_neg() or kept.is_conj():
            state[name] = zeros_like(param, dtype).copy_(kept)
    if MASTER in state and not storage.has_master(param):
        del state[MASTER]
    if "step" in state:
        state["step"] = _counts(state["step"], param, experts)


def counted(step: Any) -> int:
    """Of how many experts a saved step count is."""
    return step.numel() if isinstance(step, Tensor) and step.dim() else 1


def _counts(step: Any, param: Tensor, experts: int) -> Tensor:
    """A step count as one float32 per expert, each in a place of its own, or as a scalar, on the parameter's device."""
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device != param.device:
        step = torch.as_tensor(step, dtype=torch.float32, device=param.device)
    step = step.resolve_neg()
    if experts == 1:
        return step.max() if step.dim() else step
    return (step if step.dim() else step.expand(experts)).contiguous()


def init_param(state: dict[str, Any], param: Tensor, amsgrad: bool, experts: int, storage: Storage) -> None:
    """torch.optim.AdamW's entries; `step` is `[E]` for experts pairs, one count per expert, else a scalar.

    master: float32, like the factor, where storage asks for it.
    """
    if state.get("step") is None:
        state["step"] = torch.zeros((experts,) if experts > 1 else (), dtype=torch.float32, device=param.device)
    for name in storage.moments_of(amsgrad):
        if state.get(name) is None:
            state[name] = zeros_like(param, storage.dtype(param))
    if state.get(MASTER) is None and storage.has_master(param):
        state[MASTER] = zeros_like(param, torch.float32).copy_(param.detach())


def init_pair(state: dict[str, Any], pair: LoRAPair, keep_S: bool) -> None:
    """Entries of A for its pair.

    reflora_phase `[E]` float32: 0 where S = I was last used, 1 where the moments are in units of S, 2 where RefLoRA-S
    balances the layer (moments in units of I).
    reflora_steps `[E]` float32: steps that the pair has taken part in, which drive phasing in, warm-up and interval.
    While S is phased in, steps that began with a factor at 0 count as one.
    reflora_S `[E, 2, r, r]`: the last S and S^-1, kept only for interval > 1; zeros before the first.
    """
    device, experts, r = pair.A.device, pair.experts, pair.rank
    for name in (PHASE, STEPS):
        if name not in state:
            state[name] = torch.zeros(experts, dtype=torch.float32, device=device)
        state[name] = state[name].to(device, torch.float32).resolve_neg().contiguous()
    if keep_S:
        dtype = torch.float64 if pair.A.dtype == torch.float64 else torch.float32
        saved = state.get(SAVED)
        if saved is None:  # zeros: none yet, the kernels then compute one
            saved = torch.zeros(experts, 2, r, r, dtype=dtype, device=device)
        state[SAVED] = saved.to(dtype=dtype, device=device).contiguous()
    else:  # with a larger interval later on, one is computed anew
        state.pop(SAVED, None)


def gram_shape(pair: LoRAPair) -> tuple[int, ...]:
    """Of a factor's second moments as a matrix: `[r, r]`, with one matrix per expert `[E, r, r]`."""
    r = pair.rank
    return (pair.experts, r, r) if pair.experts > 1 else (r, r)


def grams_of(moments: str) -> str:
    """The entry with the second moments of InvariantAdamW's moments=."""
    return MEAN_GRAM if moments == "momentum" else GRAM


def check_kept_moments(grams: str, moments: str) -> None:
    """Raises ValueError for moments= that are not those that the state holds."""
    if grams and grams != grams_of(moments):
        fail("moments", "what the optimizer was built with", repr(moments), "Build another, and load this one's state.")


def check_names(entries: Mapping[str, Any], grams: str) -> None:
    """Raises ValueError for another optimizer's state. grams: as in Storage; AdamW's second moments serve as well."""
    remedy = "The state belongs to another optimizer: load one saved by AdamW."
    if entries and (missing := [name for name in ("step", "exp_avg") if name not in entries]):
        fail("loaded state", "step and exp_avg", f"one without {', '.join(missing)}", remedy)
    if grams == GRAM and MEAN_GRAM in entries:
        remedy = 'Build the optimizer with moments="momentum", or load a state of gradients.'
        fail("loaded state", f"{GRAM}, a mean of Grams", f"{MEAN_GRAM}, a Gram of the mean", remedy)
    if not grams and (matrices := [name for name in (GRAM, MEAN_GRAM) if name in entries]):
        fail("loaded state", "second moments of elements", f"InvariantAdamW's, with {matrices[0]}", remedy)
    usable = (SQUARES, *((GRAM, MEAN_GRAM) if grams else ()))
    if entries and not any(name in entries for name in usable):
        fail("loaded state", f"second moments: {' or '.join(usable)}", "none", remedy)
    if grams and (others := [name for name in (PHASE, STEPS, SAVED) if name in entries]):
        fail(
            "loaded state",
            "means of the gradients themselves",
            f"means in the units of S, with {others[0]}",
            remedy,
        )


def check_shapes(entries: dict[str, Any], param: Tensor, pair: LoRAPair | None, grams: str = "") -> None:
    """Raises ValueError for another optimizer's state, and for an entry of the wrong shape."""
    remedy = "The state belongs to another optimizer: load one saved by AdamW."
    check_names(entries, grams)
    step = entries.get("step", 0)
    if isinstance(step, Tensor):
        counted = step.numel() > 0 and bool((step >= 0).all())
    else:
        counted = isinstance(step, (int, float)) and step >= 0
    if not counted:
        fail("loaded state 'step'", "a count", repr(step), remedy)
    wanted = {name: tuple(param.shape) for name in (*MOMENTS, MASTER)}
    if pair is not None:
        wanted.update(shapes_of_pair(pair))
        if isinstance(entries.get("step"), Tensor) and entries["step"].dim():
            wanted["step"] = (pair.experts,)
    compare_shapes(entries, wanted)


def check_pair(state: Mapping[Tensor, Any], pair: LoRAPair) -> None:
    """Raises ValueError for the state of a pair that does not fit it."""
    for factor in (pair.A, pair.B):
        check_fits(state.get(factor, {}), factor, pair.experts)
        compare_shapes(state.get(factor, {}), shapes_of_pair(pair), "state")


def shapes_of_pair(pair: LoRAPair) -> dict[str, tuple[int, ...]]:
    """Shapes of the entries of `init_pair` and `init_gram`."""
    counts, square = (pair.experts,), gram_shape(pair)
    saved = (*counts, 2, pair.rank, pair.rank)
    return {PHASE: counts, STEPS: counts, SAVED: saved, GRAM: square, MEAN_GRAM: square}


def compare_shapes(entries: Mapping[str, Any], wanted: dict[str, tuple[int, ...]], what: str = "loaded state") -> None:
    for name, shape in wanted.items():
        if name not in entries:
            continue
        kept = entries[name]
        found = tuple(kept.shape) if isinstance(kept, Tensor) else repr(kept)
        if found != shape:
            fail(f"{what} {name!r}", shape, found, STRANGE)
        check_held(f"{what} {name!r}", kept)


def leave_units(state_A: dict[str, Any], state_B: dict[str, Any], pair: LoRAPair) -> None:
    """Move a pair's moments back to units of S = I, before it takes plain steps; nothing where they already are."""
    if PHASE not in state_A:
        return
    phases = state_A[PHASE]
    moves: list[tuple[Tensor, Tensor]] = []
    for expert, (A, B) in enumerate(zip(pair.views_A(pair.A), pair.views_B(pair.B))):
        c = torch.linalg.vector_norm(B, dtype=torch.float64) / torch.linalg.vector_norm(A, dtype=torch.float64)
        c = c.where((phases[expert] == REFACTORED_UNITS) & c.isfinite() & (c > 0), torch.ones_like(c))
        for state, views, by in ((state_A, pair.views_A, c), (state_B, pair.views_B, 1 / c)):
            for name in MOMENTS.keys() & state.keys():
                check_held(f"state {name!r}", state[name])
                moves.append((views(state[name])[expert], by ** MOMENTS[name].power))
    for moment, by in moves:
        moment.mul_(by.to(moment.dtype))
    phases[phases == REFACTORED_UNITS] = 0


def adopt(state: dict[str, Any], raw: dict[str, Any], param: Tensor, experts: int, storage: Storage) -> None:
    """Fit loaded state to its parameter.

    torch casts every loaded tensor to the parameter's dtype, which would round what is kept in a wider one: that comes
    from `raw`. Raises ValueError for a moment whose shape is not the parameter's.
    """
    if "step" in raw:
        state["step"] = torch.as_tensor(raw["step"], dtype=torch.float32, device=param.device).clone()
    for name in (*MOMENTS, MASTER, PHASE, STEPS, SAVED, GRAM, MEAN_GRAM):
        if name in raw and raw[name].dtype != state[name].dtype:
            state[name] = raw[name].to(param.device).clone()
    fit(state, param, experts, storage)
