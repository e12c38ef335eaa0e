"""What RefLoRAAdamW and its kin share: AdamW whose LoRA pairs take another step, in one call per device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ambient import independent, outside_inference
from ..backends import resolve
from ..checks import check_backend, check_carry, check_flags, check_hypers, check_precision, check_storage, fail
from ..diagnostics import Diagnostics, row_names
from ..pairs import PairLike, as_pairs, check_unhooked, check_unhooked_since
from . import state as keys
from .compiled import SEED, CompiledStep
from .grouped_pairs import GroupedPairs
from .groups import check_amsgrad, check_group, flatten, lr_on_host
from .membership import check_single, pairs_of_unseen, say_reversed
from .options import check_group_options, check_owned
from .reset import chosen, start_over
from .scaler import Scaler, watched
from .state import LIKE_TORCH, Storage, adopt
from .step import adamw_, engines_of

_GRAD = attrgetter("grad")
FLAGS = (
    "amsgrad", "maximize", "scalar", "carry_grams", "check_grads", "master_weights", "stochastic_rounding",
)  # fmt: skip


class PairedAdamW(CompiledStep, GroupedPairs, torch.optim.AdamW):  # type: ignore[misc]
    """An AdamW over parameters of which some make up pairs; isinstance sees torch's, none of whose code runs."""

    precision: str
    carry_grams: bool

    def _build(
        self, params: Iterable[Any], pairs: Iterable[PairLike] | None, defaults: Mapping[str, Any],
        given: Mapping[str, Any], differentiable: bool, grams: str = "",
    ) -> None:  # fmt: skip
        """The rest of a constructor. defaults: torch.optim.AdamW's options; given: those of the whole optimizer.

        grams: as in Storage.
        """
        self._check(defaults, given, differentiable)
        for name in (*self.OWN, "backend", "stochastic_rounding"):
            setattr(self, name, given[name])
        self.storage = Storage(
            given["state_dtype"] is not None or given["master_weights"], given["master_weights"], grams
        )  # fmt: skip
        own = {**given, "pairs": pairs}
        params, pairs = flatten(params, pairs)
        self.pairs = as_pairs(pairs)
        check_unhooked(self.pairs)
        self._told: set[str] = set()
        self._seen: set[int] = set()
        self._hooked = -1
        self._key: list[tuple[int, ...]] | None = None
        defaults = {**_like_torch(), **defaults}
        if self.stochastic_rounding:
            defaults[SEED] = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        Optimizer.__init__(self, params, defaults)
        check_group_options(self.param_groups, own)
        for group in self.param_groups:
            check_group(group)
            if grams:
                check_amsgrad(group, group["params"], self.pairs)
        check_owned(self.param_groups, self.pairs)
        self._register()
        self._make_engines()
        self._own = tuple(given)
        self._again, self._built = getattr(pairs, "again", None), True
        say_reversed(self.pairs, self._by_S, stacklevel=5)

    @property
    def _by_S(self) -> bool:
        """Whether a step needs both Grams to have full rank."""
        return True

    def _check(self, defaults: Mapping[str, Any], given: Mapping[str, Any], differentiable: bool) -> None:
        check_single(type(self))
        check_hypers(lr_on_host(defaults["lr"]), defaults["betas"], defaults["eps"], defaults["weight_decay"])
        every = {**defaults, **given}
        check_flags({name: every[name] for name in FLAGS if name in every})
        check_flags({name: every[name] for name in ("foreach", "fused", "capturable")}, or_none=True)
        check_backend(given["backend"])
        check_precision(given["precision"])
        if differentiable:
            fail("differentiable", "False", repr(differentiable), "The fused step has no derivative.")
        check_carry(given["carry_grams"], given.get("scalar", False))
        check_storage(given["state_dtype"], given["master_weights"], given["stochastic_rounding"])

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Whether a GradScaler hands over its scale and found_inf, which avoids a sync."""
        return not watched(self) and all(group.get("fused") is not False for group in self.param_groups)

    @property
    def backends(self) -> dict[str, str]:
        """The backend that serves each device."""
        return {str(p.A.device): resolve(self.backend, p.A.device).NAME for p in self.pairs}

    def diagnostics(self) -> Diagnostics:
        """What the last step did, layer by layer; reading its properties syncs with the device."""
        reuses = self.options.keeps_S
        if self.last_was_traced and self._traced_results is not None:
            names = row_names(self.stepped_pairs())
            return Diagnostics(names, [self._traced_results], list(range(len(names))), reuses)
        return self._engines.diagnostics(reuses)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. Returns the closure's value, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._step_traced()
        else:
            with torch.no_grad(), independent(), outside_inference(self.param_groups[0]["params"][:1]):
                self._step_eagerly()
        return loss

    def _step_eagerly(self) -> None:
        self._hooked = check_unhooked_since(self.pairs, self._hooked)
        options, seed = self.options, self.seed
        if self._engines.backend != self.backend:
            self._check_backend()
            self._make_engines()
        self._take_in(pairs_of_unseen(self))
        members = self._membership()
        if self._only_makes_state():
            self._init_group()
            return
        adamw_(
            self._engines, members, self.param_groups, self.state, _GRAD, options, Scaler.of(self), seed, self._told,
        )  # fmt: skip
        self._see_version()

    def _only_makes_state(self) -> bool:
        """Whether this is the step with lr = 0 and zero gradients that torch.distributed.checkpoint takes to load."""
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def invalidate(self) -> None:
        """Forget carried Grams (carry_grams=True), after a write to a factor that autograd does not see."""
        for engines in (self._engines, self._compiled.engines):
            for engine in engines.made if engines else ():
                engine.invalidate()

    @torch.no_grad()
    def reset(self, given: Iterable[PairLike | Tensor]) -> None:
        """Let these pairs and parameters start afresh, as if they had taken no step; all others go on.

        For systems with slots, whose factors are overwritten by those of another adapter: write them first, in place.
        Their state is zeroed at its addresses, so a compiled step or a captured graph stays valid, and nothing is read
        from the device.

        Args:
            given: Pairs, such as `reflora.find_pairs(model, "adapter")`, or parameters.

        Raises:
            TypeError: Something else.
            ValueError: A parameter that the optimizer does not have, one factor of a pair alone, or state that has been
                freed. Nothing has changed then.
        """
        owned = {param for group in self.param_groups for param in group["params"]}
        start_over(self.state, chosen(given, owned, self.pairs))
        self.invalidate()

    def _make_engines(self) -> None:
        self._engines = engines_of(self.pairs, self.backend, self.storage, self.captured)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave, or the state of a torch.optim.AdamW over the same parameters.

        Group options that the loaded state lacks keep the constructor's values.

        Raises:
            ValueError: A loaded tensor has the wrong shape for its parameter. Nothing has changed then.
        """
        with outside_inference(self.param_groups[0]["params"][:1]):
            self._load(state_dict)
        self._make_engines()

    def _load(self, state_dict: dict[str, Any]) -> None:
        self._check_backend()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        raw = {p: state_dict["state"].get(key, {}) for p, key in zip(params, saved)}
        owners = {t: pair for pair in self.pairs for t in (pair.A, pair.B)}
        for param, entries in raw.items():
            keys.check_shapes(entries, param, owners.get(param), self.storage.grams)
        if self.storage.grams:
            for group, own in zip(state_dict["param_groups"], self.param_groups):
                check_amsgrad(group, own["params"], self.pairs)
        Optimizer.load_state_dict(self, state_dict)
        for param, entries in raw.items():
            if entries:
                # others may be in a pair that is found later
                storage = self.storage if param in owners or self._again else LIKE_TORCH
                experts = owners[param].experts if param in owners else keys.counted(entries.get("step"))
                adopt(self.state[param], entries, param, experts, storage)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("pairs", "backend", "storage", "stochastic_rounding", "_own", *self.OWN)
        return {**Optimizer.__getstate__(self), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._key = None
        if not self._built:  # a copy; torch calls this in load_state_dict, too
            self._told, self._seen, self._hooked, self._again, self._built = set(), set(), -1, None, True
        self._register()
        self._make_engines()


@functools.cache
def _like_torch() -> dict[str, Any]:
    """What torch's AdamW has in its groups: checkpoints are matched to them key by key."""
    return torch.optim.AdamW([torch.zeros(1, dtype=torch.float32, device="cpu")]).defaults
