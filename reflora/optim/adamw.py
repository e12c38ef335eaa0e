"""RefLoRAAdamW: AdamW whose LoRA pairs take the step of the optimally refactored pair, in one fused call per device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ambient import independent, outside_inference
from ..backends import resolve
from ..checks import check_flags, check_hypers, check_options, check_storage
from ..diagnostics import Diagnostics, row_names
from ..pairs import PairLike, as_pairs, check_unhooked, check_unhooked_since
from . import state as keys
from .compiled import SEED, CompiledStep
from .grouped_pairs import GroupedPairs
from .groups import check_group, flatten, lr_on_host
from .membership import (
    REVERSED,
    check_single,
    pairs_of_unseen,
    reversed_,
    say_plain,
)
from .options import check_group_options, check_owned
from .scaler import Scaler, watched
from .state import LIKE_TORCH, Storage, adopt
from .step import adamw_, engines_of

_GRAD = attrgetter("grad")


class RefLoRAAdamW(CompiledStep, GroupedPairs, torch.optim.AdamW):  # type: ignore[misc]
    """AdamW (decoupled weight decay) with RefLoRA preconditioning of LoRA pairs (arXiv 2505.18877).

    A layer with a non-finite gradient or factor is skipped, its state untouched, and counted in `diagnostics()`.
    State per parameter is torch.optim.AdamW's; the state_dict also holds whatever else a resumed run needs.

    Args:
        params: What torch optimizers take (parameters, groups, named parameters), or a bare list of pairs.
        pairs: The LoRA pairs among them, as LoRAPair or `(A [r, n_in], B [n_out, r])`, such as
            `reflora.find_pairs(model)`. A and B may sit in different groups. Parameters in no pair, and pairs where
            only one factor has a gradient, get plain AdamW.
        lr: Learning rate; a tensor on the device where a CUDA graph or torch.compile must follow a scheduler.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, as torch.optim.AdamW's.
        amsgrad: As torch.optim.AdamW's.
        maximize: As torch.optim.AdamW's.
        scalar: RefLoRA-S, the scalar refactoring after every step (Theorem 5), instead of S (Theorem 3).
        interval: Recompute S every `interval` steps and reuse it in between.
        warmup_steps: None phases S in gradually, layer by layer: after n steps of a layer its Grams count in S with the
            weight `n^2 / (n^2 + 400^2)`, a multiple of I with the rest. From B = 0 the exact S would keep B near rank
            one, which is what Adam's first step gives it. A number takes that many first steps with S = I, then the
            exact S, as published; 0 is the exact S from the first step, `10**9` is AdamW itself. With scalar=True, None
            leaves a layer alone until the smaller of ||A|| and ||B|| has caught up with the other. Where n_out < n_in
            or the rate is low that may never happen: such a layer stays plain LoRA and counts as
            `diagnostics().inactive`.
        backend: None (the fastest that can serve the device), "triton", "cpp" or "torch".
        precision: Of Grams and solve: "float64" or, faster on GPUs with slow float64, "float32".
        carry_grams: Keep the factors' Grams from one step to the next, which saves one read of the factors (4 of 36
            bytes per float32 parameter; on a GPU up to r = 32). Writes that bump `_version` are noticed; after one that
            does not, through `.data`, raw memory or torch's own fused optimizers, call `invalidate()`. Without
            effect under torch.compile, while a CUDA graph is captured, and after.
        check_grads: Skip a layer whose gradient is not finite, which costs one more read of it. With False, and under
            a GradScaler, which has checked already, a NaN or inf may spread over its column (the r entries that S
            mixes): NaN then counts as 0, infinity as the largest number that can be squared.
        state_dtype: torch.float32 keeps the moments of 16-bit factors in float32; None, like torch, in the factor's
            dtype.
        master_weights: float32 copies of 16-bit factors (state "master"), with moments in float32.
        stochastic_rounding: bfloat16 factors of pairs are rounded up or down with the probability that makes the mean
            exact. Reproducible: the seed is drawn from torch's generator here and kept in the param_groups.
        foreach: Accepted for compatibility with torch; ignored.
        fused: The step is always fused. False, as in torch, makes a GradScaler unscale the gradients before the step,
            which Lightning's clipping under fp16 requires.
        capturable: Accepted for compatibility with torch. With Triton and r <= 128 a step can be captured in a CUDA
            graph, after one outside it (two with carry_grams). Capture again after load_state_dict, add_param_group or
            moving the model.
        differentiable: True is refused.

    Raises:
        ValueError: Pairs or options that are not supported.
        TypeError: Pairs or options of a wrong type.
        RuntimeError: The backend cannot serve the device, with the reason.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[PairLike] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        scalar: bool = False,
        interval: int = 1,
        warmup_steps: int | None = None,
        backend: str | None = None,
        precision: str = "float64",
        carry_grams: bool = False,
        check_grads: bool = True,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        check_single(type(self))
        check_hypers(lr_on_host(lr), betas, eps, weight_decay)
        check_flags({
            "amsgrad": amsgrad, "maximize": maximize, "scalar": scalar, "carry_grams": carry_grams,
            "check_grads": check_grads, "master_weights": master_weights, "stochastic_rounding": stochastic_rounding,
        })  # fmt: skip
        check_flags({"foreach": foreach, "fused": fused, "capturable": capturable}, or_none=True)
        check_options(interval, warmup_steps, backend, precision, differentiable)
        check_storage(state_dtype, master_weights, stochastic_rounding, carry_grams and scalar)
        own = {
            "scalar": scalar, "interval": interval, "warmup_steps": warmup_steps, "backend": backend,
            "precision": precision, "carry_grams": carry_grams, "check_grads": check_grads,
            "state_dtype": state_dtype, "master_weights": master_weights, "stochastic_rounding": stochastic_rounding,
            "pairs": pairs,
        }  # fmt: skip
        params, pairs = flatten(params, pairs)
        self.pairs = as_pairs(pairs)
        check_unhooked(self.pairs)
        self.scalar, self.interval, self.warmup_steps = scalar, interval, warmup_steps
        self.backend, self.precision = backend, precision
        self.carry_grams, self.check_grads = carry_grams, check_grads
        self.stochastic_rounding = stochastic_rounding
        self.storage = Storage(state_dtype is not None or master_weights, master_weights)
        self._told: set[str] = set()
        self._seen: set[int] = set()
        self._hooked = -1
        self._key: list[tuple[int, ...]] | None = None
        defaults = {
            **_like_torch(), "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "fused": fused,
        }  # fmt: skip
        if stochastic_rounding:
            defaults[SEED] = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        Optimizer.__init__(self, params, defaults)  # isinstance sees torch's AdamW; none of its code runs
        check_group_options(self.param_groups, own)
        for group in self.param_groups:
            check_group(group)
        check_owned(self.param_groups, self.pairs)
        self._register()
        self._make_engines()
        self._own = tuple(name for name in own if name != "pairs")
        self._again, self._built = getattr(pairs, "again", None), True
        if names := reversed_(self.pairs):
            say_plain(names, REVERSED, stacklevel=3)

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
        self._take_in(pairs_of_unseen(self))
        members = self._membership()
        if self._only_makes_state():
            self._init_group()
            return
        adamw_(
            self._engines, members, self.param_groups, self.state, _GRAD, self.options, Scaler.of(self), self.seed,
            self._told,
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
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        raw = {p: state_dict["state"].get(key, {}) for p, key in zip(params, saved)}
        owners = {t: pair for pair in self.pairs for t in (pair.A, pair.B)}
        for param, entries in raw.items():
            keys.check_shapes(entries, param, owners.get(param))
        Optimizer.load_state_dict(self, state_dict)
        experts = {t: pair.experts for t, pair in owners.items()}
        for param, entries in raw.items():
            if entries:
                storage = self.storage if param in experts else LIKE_TORCH
                adopt(self.state[param], entries, param, experts.get(param, 1), storage)

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "pairs", "scalar", "interval", "warmup_steps", "backend", "precision", "carry_grams", "check_grads",
            "storage", "stochastic_rounding", "_own",
        )  # fmt: skip
        return {**Optimizer.__getstate__(self), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._key = None
        self._told, self._seen, self._hooked, self._again, self._built = set(), set(), -1, None, True
        self._register()
        self._make_engines()


@functools.cache
def _like_torch() -> dict[str, Any]:
    """What torch's AdamW has in its groups: checkpoints are matched to them key by key."""
    return torch.optim.AdamW([torch.zeros(1, dtype=torch.float32, device="cpu")]).defaults
