"""RefLoRA around any torch optimizer class: the gradients of its LoRA pairs are preconditioned inside `step`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import check_backend, check_flags, check_precision, check_schedule, fail
from ..columns import SKIPPED
from ..diagnostics import Diagnostics, uniform
from ..pairs import PairLike, as_pairs, check_unhooked, check_unhooked_since, local
from .base_class import check_base, check_in_step, check_kept, evaluated, separate, takes_closure
from .membership import NO_GRADIENT, check_single, pairs_of_unseen, say_reversed
from .operations import ops_of
from .options import check_group_options, check_like_defaults
from .pairs import finite_and_moving
from .scaler import watched
from .state import GRAM, MEAN_GRAM, PHASE, SAVED, STEPS, compare_shapes, shapes_of_pair
from .transport import check_movable, proportional
from .units import UNIT, Units
from .wrapped_full import FullStep, Written, same, versions
from .wrapped_pairs import DEFAULTS, SKIPS
from .wrapped_scalar import ScalarStep

if TYPE_CHECKING:
    from .pairs import PairOps
    from .sharded import ShardedOps

# what is kept of a pair in the state of its A, or of both factors, with its dtype
DTYPES = {
    SAVED: None, PHASE: torch.float32, STEPS: torch.float32, UNIT: torch.float64, GRAM: torch.float64,
    MEAN_GRAM: torch.float64,
}  # fmt: skip
OPTIONS = ("pairs", *DEFAULTS, "_places")

REEVALUATED = (
    "{} has replaced the gradients inside its step, so RefLoRA has not preconditioned them. Use a class that takes "
    "them as they are, or put RefLoRA inside it."
)

_classes: dict[type[Optimizer], type[Wrapped]] = {}


def reflora_class(base: type[Optimizer]) -> type[Wrapped]:
    """The subclass of `base` that steps with RefLoRA; the same one for every call.

    Raises what `check_base` raises.
    """
    if base in _classes:
        return _classes[base]
    if isinstance(base, type) and issubclass(base, Wrapped):
        return base
    check_base(base)
    members = {"base": base, "__doc__": f"{base.__name__} with RefLoRA.", "__module__": __name__}
    _classes[base] = type(f"Wrapped{base.__name__}", (Wrapped, base), members)
    return _classes[base]


class Wrapped(FullStep, ScalarStep):
    """Mixed into an optimizer class by `reflora_class`.

    pairs, scalar, interval, warmup_steps, backend, precision: as in RefLoRAAdamW. Other arguments go to the base class,
    as does `base_options`, for options of its own that have one of these names.

    A step evaluates the closure, if any, then preconditions once, then takes the base class's step. Hooks run once.
    If a gradient is not finite, for this check or for the gradient scaler, the whole step is skipped: no parameter,
    state or step count changes. On a GPU the check costs one read of the gradients and one sync per step; RefLoRAAdamW
    skips single layers without either.
    By default S comes without its scale, and the gradients stay in the units of S = I. In front of SGD, whose steps
    grow with the gradient, and with warmup_steps, S has its scale: where it stops being I (after a warm-up, or once B
    is no longer 0), state that the table of transport.py knows is moved to the gradients' new unit; in front of any
    other class the gradients keep the old one.
    scalar=True refactors after each step and moves the state; it needs a class in that table. By default a pair waits
    until its norms have met (experts in one pair: until all have); with warmup_steps=0, and in front of SGD, it is
    refactored before the first step as well. S is phased in over the steps that a pair has taken part in; warm-up and
    interval count those of the optimizer.
    """

    scalar: bool
    interval: int
    warmup_steps: int | None
    backend: str | None
    precision: str
    # as in Storage
    grams = ""

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[PairLike],
        *,
        scalar: bool = False,
        interval: int = 1,
        warmup_steps: int | None = None,
        backend: str | None = None,
        precision: str = "float64",
        base_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        check_single(type(self))
        check_flags({"scalar": scalar})
        check_schedule(interval, warmup_steps)
        check_backend(backend)
        check_precision(precision)
        own = {
            "scalar": scalar, "interval": interval, "warmup_steps": warmup_steps, "backend": backend,
            "precision": precision,
        }  # fmt: skip
        given = {name: value for name, value in own.items() if value != DEFAULTS[name]}
        kwargs.update(separate(self.base, given, base_options, kwargs))
        check_like_defaults(self.base, kwargs)
        if scalar:
            check_movable(self.base)
        self.pairs = as_pairs(pairs, sharded=True)
        vars(self).update(own)
        # after a failed step of the base class: gradients already preconditioned, and entries still to be kept
        self._pending: tuple[Written, dict[Tensor, dict[str, Tensor]]] | None = None
        self._told: set[str] = set()
        self._seen: set[int] = set()
        self._hooked = -1
        self._balanced: set[int] = set()  # numbers of the pairs of RefLoRA-S whose norms have met
        self._skip: Diagnostics | None = None
        check_unhooked(self.pairs)
        super().__init__(params, **kwargs)
        check_kept(self, own)
        check_in_step(self.param_groups)
        ours = {"pairs": pairs, **own}
        check_group_options(self.param_groups, {name: ours[name] for name in ours if name not in self.defaults})
        for group in self.param_groups:
            group[STEPS], group[SKIPS] = 0, 0
        place = {param: number for number, param in enumerate(self._params())}
        self._places = [(place.get(pair.A), place.get(pair.B)) for pair in self.pairs]
        assert self._ops  # built now, so that it raises here
        self._again, self._built = getattr(pairs, "again", None), True
        say_reversed(self.pairs, by_S=True, stacklevel=4)

    @property
    def _gentle(self) -> bool:
        """Whether S is phased in; in front of SGD it need not be, and its scale is part of the step."""
        return self.warmup_steps is None and not proportional(self.base)

    @functools.cached_property
    def _units(self) -> Units:
        return Units(self)

    @functools.cached_property
    def _ops(self) -> PairOps | ShardedOps:
        return self._make_ops()

    def _make_ops(self) -> PairOps | ShardedOps:
        return ops_of(self.pairs, self.backend, self.precision)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch sets it on instances of its fused classes, and reads it with a default
        if "_takes_scale" not in vars(self):
            raise AttributeError("_step_supports_amp_scaling")
        return self._takes_scale and not watched(self)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._takes_scale = value

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because of a non-finite gradient; part of the state_dict."""
        return self.param_groups[0].get(SKIPS, 0)

    def diagnostics(self) -> Diagnostics:
        """What the last preconditioning or refactoring did, layer by layer; reading its properties syncs.

        After a step that was skipped whole, every layer counts as skipped.
        """
        return self._ops.diagnostics() if self._skip is None else self._skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's value, if there is a closure."""
        loss: Any = None
        given: tuple[Any, ...] = ()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            given = (loss,)
        if scaler_found_inf(self):
            return loss
        self._check_written()
        self._follow()  # before the model is searched, which would find what has replaced a pair as a further one
        self._take_in(pairs_of_unseen(self, sharded=True))
        active = self._active()
        grads = [local(p.grad) for p in self._params() if p.grad is not None and not p.grad.is_sparse]
        finite, moving = self._ops.agree(*finite_and_moving(grads))
        if not finite:
            self._count(SKIPS)
            self._skip = uniform(self.pairs, SKIPPED)
            return loss
        if self.pairs and not any(active):
            warnings.warn(NO_GRADIENT, stacklevel=4)
        self._say_plain(active)
        self._skip = None
        steps, fresh = self.param_groups[0].get(STEPS, 0), not self.state
        self._hooked = check_unhooked_since(self.pairs, self._hooked)
        if self.scalar:
            self._scalar_step(active, steps, moving, *given)
        else:
            kept = self._preconditioned(active, steps)
            try:
                self._base_step(*given)
            except BaseException:
                self._units.keep_moved(kept)
                raise
            self._pending = None
            # only now: many optimizers take empty state as the sign of a first step
            for param, entries in kept.items():
                self.state[param].update(entries)
            if kept:
                self._hold_places()
        if moving or not fresh:  # a loader's step, which only makes state, does not count
            self._count(STEPS)
            stepped = (self.state.get(pair.A, {}) for pair, on in zip(self.pairs, active) if on)
            if counts := [own[STEPS] for own in stepped if STEPS in own]:
                torch._foreach_add_(counts, 1)
        return loss

    def _check_written(self) -> None:
        """Raises TypeError or ValueError for what has been written to groups and attributes."""
        for group in self.param_groups:
            check_like_defaults(self.base, {name: group[name] for name in self.defaults if name in group})
        check_in_step(self.param_groups)
        check_flags({"scalar": self.scalar})
        check_schedule(self.interval, self.warmup_steps)
        check_backend(self.backend)
        check_precision(self.precision)
        if self.scalar:
            check_movable(self.base)
        if (self._ops.backend, self._ops.precision) != (self.backend, self.precision):
            self._ops = self._make_ops()

    def _base_step(self, *loss: Any) -> None:
        """The base class's own step; loss: the closure's value, if there was a closure."""
        step, params = _unhooked_step(self.base), self._params()
        grads = [p.grad for p in params]
        if loss and takes_closure(self.base):
            before = versions(params)
            step(self, evaluated(loss[0], lambda: same(versions(params), before)))
        else:
            step(self)
        if REEVALUATED not in self._told and any(map(_replaced, params, grads)):
            self._told.add(REEVALUATED)
            warnings.warn(REEVALUATED.format(self.base.__name__), stacklevel=5)

    def _hold_places(self) -> None:
        """Add an entry for parameters without state of the base class: checkpoints need state for all or for none."""
        experts = {pair.A: pair.experts for pair in self.pairs}
        for param in self._params():
            if param.grad is not None and not self.state.get(param):
                self.state[param][PHASE] = torch.zeros(experts.get(param, 1), dtype=torch.float32, device=param.device)

    def _count(self, key: str) -> None:
        value = self.param_groups[0].get(key, 0) + 1
        for group in self.param_groups:
            group[key] = value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave, or the state of the base class over the same parameters.

        Raises ValueError for a pair's entry of the wrong shape.
        """
        pairs = {pair.A: pair for pair in self.pairs}
        for param, entries in entries_of(self, state_dict):
            if not self.grams and (matrices := [name for name in (GRAM, MEAN_GRAM) if name in entries]):
                remedy = "Its second moments are matrices: load the state of the base class."
                fail("loaded state", f"{self.base.__name__}'s", f"InvariantAdamW's, with {matrices[0]}", remedy)
            if param in pairs:
                compare_shapes(entries, shapes_of_pair(pairs[param]))
        super().load_state_dict(state_dict)
        self._balanced = set()
        self.__dict__.pop("_units", None)
        for param, entries in entries_of(self, state_dict):
            for name, dtype in DTYPES.items():
                if name in entries:  # torch has cast it to the parameter's dtype
                    self.state[param][name] = entries[name].to(param.device, dtype or entries[name].dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OPTIONS}}

    def __reduce__(self) -> tuple[Any, ...]:
        fresh = {"_hooked": -1, "_skip": None, "_pending": None, "_again": None, "_built": True}
        return (
            _blank,
            (self.base,),
            {**self.__getstate__(), "_balanced": set(), "_told": set(), "_seen": set(), **fresh},
        )


def entries_of(optimizer: Optimizer, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with its entries in a saved state."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [(param, state_dict["state"].get(key, {})) for param, key in zip(params, saved)]


def scaler_found_inf(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler tells a base class that supports it to skip the step; syncs."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _replaced(param: Tensor, grad: Tensor | None) -> bool:
    return param.grad is not None and grad is not None and param.grad is not grad


def _unhooked_step(base: type[Optimizer]) -> Callable[..., Any]:
    """`base.step` without torch's hook runner around it: ours runs the hooks already."""
    step: Any = base.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


def _blank(base: type[Optimizer]) -> Wrapped:
    cls = reflora_class(base)
    return cls.__new__(cls)
