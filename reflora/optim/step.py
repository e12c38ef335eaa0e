"""A step of pairs and plain parameters as a function of groups, gradients and state; compiled graphs hold it too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..backends import AdamWStep, InvariantStep, Step
from ..checks import (
    check_carry,
    check_flags,
    check_gradient,
    check_held,
    check_places,
    check_precision,
    check_reg,
    check_schedule,
    check_whitening,
    fail,
)
from ..constants import start_of
from ..engine import Engines
from ..pairs import LoRAPair
from .adamw_engine import AdamWEngine, Slot, capturing
from .groups import check_no_amsgrad, hyper_table
from .membership import LONE, NO_GRADIENT, say_plain
from .plain import TORCH_STEPS, GradOf, State, prepare_plain, step_plain, step_stray
from .scaler import Scaler
from .state import Storage, check_fits, check_kept_moments


@dataclass(frozen=True)
class Options:
    """How pairs are stepped, whichever the rule. storage: what is kept for them."""

    precision: str = "float64"
    carry_grams: bool = False
    check_grads: bool = True
    storage: Storage = Storage()

    keeps_S: ClassVar[bool] = False  # whether the last S is part of the state

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what has been written to an attribute of the optimizer."""
        check_precision(self.precision)
        check_flags({"carry_grams": self.carry_grams, "check_grads": self.check_grads})

    def step(self, hypers: Tensor, **more: Any) -> Step:
        """One step by this rule; more: the fields of Step that differ from step to step."""
        raise NotImplementedError

    def _common(self) -> dict[str, Any]:
        return {"precision": self.precision, "carry": self.carry_grams}


@dataclass(frozen=True)
class AdamWOptions(Options):
    """The arguments of RefLoRAAdamW."""

    scalar: bool = False
    interval: int = 1
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags({"scalar": self.scalar})
        check_schedule(self.interval, self.warmup_steps)
        check_carry(self.carry_grams, self.scalar)

    @property
    def keeps_S(self) -> bool:  # type: ignore[override]
        return self.interval > 1 and not self.scalar

    def step(self, hypers: Tensor, **more: Any) -> Step:
        return AdamWStep(
            hypers, scalar=self.scalar, warmup_steps=self.warmup_steps or 0, start=start_of(self.warmup_steps),
            interval=self.interval, **self._common(), **more,
        )  # fmt: skip


@dataclass(frozen=True)
class RiemannianOptions(Options):
    """The arguments of RiemannianAdamW."""

    reg: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reg(self.reg)
        object.__setattr__(self, "reg", float(self.reg))

    def step(self, hypers: Tensor, **more: Any) -> Step:
        return AdamWStep(hypers, reg=self.reg, **self._common(), **more)


@dataclass(frozen=True)
class InvariantOptions(Options):
    """The arguments of InvariantAdamW."""

    metric: str = "reflora"
    moments: str = "gradients"
    damping: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whitening(self.metric, self.moments, self.damping)
        check_kept_moments(self.storage.grams, self.moments)
        object.__setattr__(self, "damping", float(self.damping))

    def step(self, hypers: Tensor, **more: Any) -> Step:
        own = {"metric": self.metric, "moments": self.moments, "damping": self.damping, "late": self.carry_grams}
        return InvariantStep(hypers, **own, **self._common(), **more)  # type: ignore[arg-type]


class Members(NamedTuple):
    """slots: the groups of each pair's A and B, None where either is in no group. plain: other parameters, by group."""

    slots: list[Slot | None]
    plain: list[list[Tensor]]


def engines_of(
    pairs: Sequence[LoRAPair], backend: str | None, storage: Storage, captured: set[str]
) -> Engines[AdamWEngine]:  # fmt: skip
    """storage, captured: as in AdamWEngine."""
    return Engines(pairs, backend, partial(AdamWEngine, storage=storage, captured=captured))


def adamw_(
    engines: Engines[AdamWEngine], members: Members, groups: Sequence[dict[str, Any]], state: State, grad_of: GradOf,
    options: Options, scaler: Scaler, seed: int | None, told: set[str],
) -> None:  # fmt: skip
    """One step, in place: pairs by their engines, other parameters by torch's own AdamW.

    groups: as an optimizer's param_groups. state: by parameter, made where it is missing. seed: of stochastic rounding,
    or None. told: what has been warned about.
    """
    _refuse(members, state, grad_of)
    refuse_amsgrad(members, groups, options.storage)
    ready = engines.ready()
    if any(capturing(engine.plan.device) and not engine.stepped for engine in ready):
        remedy = "Take a step outside the graph first, two with carry_grams=True."
        fail("CUDA graph capture", "an optimizer that has taken a step", "none", remedy, RuntimeError)
    tables = [hyper_table(groups, engine.plan.device) for engine in ready]
    strays = _bind(ready, members.slots, groups, state, grad_of, options)
    _tell(engines, strays, told)
    for engine in ready:
        engine.leave(groups)
    for params, group in zip(members.plain, groups):
        prepare_plain(state, params, grad_of, group["amsgrad"])
    # torch may yet refuse a parameter: then no pair has moved
    for params, group in zip(members.plain, groups):
        step_plain(state, params, grad_of, group, scaler)
    for engine, (hypers, lrs) in zip(ready, tables):
        scale, found_inf = scaler.on(engine.plan.device)
        check = options.check_grads and found_inf is None
        engine.step(options.step(hypers, check=check, seed=seed, grad_scale=scale, found_inf=found_inf, lrs=lrs))
    for number, params in strays.items():
        for p in params:
            step_stray(state, p, grad_of, groups[number], scaler, options.check_grads)


def refuse_amsgrad(members: Members, groups: Sequence[dict[str, Any]], storage: Storage) -> None:
    """Raises ValueError for groups with factors whose second moments are matrices."""
    if storage.grams:
        check_no_amsgrad(groups[number] for slot in members.slots if slot for number in slot)


def _refuse(members: Members, state: State, grad_of: GradOf) -> None:
    """Refuse plain parameters, gradients and state that torch cannot step, before anything has changed."""
    for p, grad in ((p, grad_of(p)) for params in members.plain for p in params):
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            fail("a gradient", "a dense tensor", grad.layout, "Use sparse=False.", RuntimeError)
        check_gradient("a gradient", grad, p)
        if p.dtype not in TORCH_STEPS:
            fail("a parameter", "a dtype of torch's AdamW", p.dtype, "Freeze it, or cast it to a wider dtype.")
        check_held("a parameter", p)
        check_places("a parameter", p)
        check_fits(state.get(p, {}), p, 1)


def _bind(
    ready: list[AdamWEngine], slots: list[Slot | None], groups: Sequence[dict[str, Any]], state: State, grad_of: GradOf,
    options: Options,
) -> dict[int, list[Tensor]]:  # fmt: skip
    """Point every engine at this step's gradients.

    Returns, by group, factors that cannot be preconditioned because their partner has no gradient.
    """
    amsgrad = any(group["amsgrad"] for group in groups)
    strays: dict[int, list[Tensor]] = {}
    for engine in ready:
        grads = list(map(grad_of, engine.plan.factors))
        engine.bind_state(state, [slots[i] for i in engine.chosen], grads, amsgrad, options.keeps_S)
        for factor, group in engine.bind_grads(grads):
            strays.setdefault(group, []).append(factor)
    return strays


def _tell(engines: Engines[AdamWEngine], strays: dict[int, list[Tensor]], told: set[str]) -> None:
    if engines.pairs and not strays and not any(engine.written for engine in engines.made):
        warnings.warn(NO_GRADIENT, stacklevel=6)
    if strays and LONE not in told:
        told.add(LONE)
        lone = {id(factor) for factors in strays.values() for factor in factors}
        say_plain([p.name for p in engines.pairs if {id(p.A), id(p.B)} & lone], LONE, stacklevel=7)
