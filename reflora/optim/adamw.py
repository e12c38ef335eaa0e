"""RefLoRAAdamW: AdamW whose LoRA pairs take the step of the optimally refactored pair, in one fused call a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..backends import FRESH, IDENTITY, SAVED, AdamWStep, resolve
from ..contract import LoRAPair, PairLike, as_pairs, check_backend, check_count, check_precision, fail
from ..functional import Diagnostics, diagnose
from ..plan import by_device
from . import state as keys
from .binding import Binding, Slot
from .state import adopt, fit, init_param

COUNTER = "reflora_steps"
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class RefLoRAAdamW(Optimizer):
    """AdamW (decoupled weight decay) with RefLoRA preconditioning of LoRA pairs (arXiv 2505.18877).

    params: what torch optimizers take (parameters, groups, named parameters), or a bare list of pairs.
    pairs: the LoRA pairs among them, as LoRAPair or (A, B), such as `reflora.find_pairs(model)`. A and B may sit in
        different groups. Parameters in no pair, and pairs where only one factor has a gradient, get plain AdamW.
    scalar: RefLoRA-S, the scalar refactoring after every step (Theorem 5), in place of S (Theorem 3).
    interval: recompute S every that many steps and reuse it in between.
    warmup_steps: first steps with S = I. Not needed for safety: degenerate layers (B = 0 at PEFT's start) are found on
        the device, layer by layer, and use S = c I. `10**9` gives AdamW itself.
    backend: None (the fastest that can serve the device), "triton", "cpp" or "torch". precision: of Grams and solve.
    foreach, fused: taken for torch's sake and ignored, the step is always fused.

    A layer with a non-finite gradient or factor is skipped, its state untouched, and counted in `diagnostics()`.
    State per parameter is torch.optim.AdamW's; what else steers a resumed run is in the state_dict too.
    Raises ValueError or TypeError for pairs or options that cannot be served, RuntimeError for an unavailable backend.
    """

    _step_supports_amp_scaling = True

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
        warmup_steps: int = 0,
        backend: str | None = None,
        precision: str = "float64",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ):
        _check_hypers(float(lr), betas, eps, weight_decay)
        unserved = {"capturable": capturable, "differentiable": differentiable}
        _check_options(interval, warmup_steps, backend, precision, unserved)
        params, pairs = _flatten(params, pairs)
        self.pairs = as_pairs(pairs)
        self.scalar, self.interval, self.warmup_steps = scalar, interval, warmup_steps
        self.backend, self.precision = backend, precision
        self._bindings: list[Binding] = []
        self._key: list[tuple[int, ...]] | None = None
        self._slots: list[Slot | None] = []
        self._plain: list[list[Tensor]] = []
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize, COUNTER: 0,
        }  # fmt: skip
        super().__init__(params, defaults)
        for pair in self.pairs:
            resolve(backend, pair.A.device)

    @property
    def backends(self) -> dict[str, str]:
        """The backend that serves each device."""
        return {str(p.A.device): resolve(self.backend, p.A.device).NAME for p in self.pairs}

    def diagnostics(self) -> Diagnostics:
        """What the last step did, layer by layer; reading its properties synchronises with the device."""
        done = [(b, b.results) for b in self._bindings if b.results is not None]
        return diagnose(self.pairs, [b.chosen for b, _ in done], [b.plan for b, _ in done], [r for _, r in done])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. Returns the closure's value, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and (not found_inf.is_cuda or self._host_counts()) and float(found_inf):
            return loss
        count = self.param_groups[0][COUNTER]
        hypers = self._checked()
        strays = self._bind_pairs()
        self._step_pairs(count, hypers)
        self._step_plain(strays)
        for group in self.param_groups:
            group[COUNTER] = count + 1
        return loss

    def _host_counts(self) -> bool:
        """Whether a step skipped by the gradient scaler must not advance a counter on the host."""
        return self.interval > 1 or self.param_groups[0][COUNTER] <= self.warmup_steps

    def _schedule(self, count: int) -> dict[str, Any]:
        """Where step number `count` (from 0) takes its S from; the published schedule, with S kept between."""
        due = count >= self.warmup_steps and (count - self.warmup_steps) % self.interval == 0
        after = count + 1 >= self.warmup_steps and (count + 1 - self.warmup_steps) % self.interval == 0
        source = IDENTITY if count < self.warmup_steps else FRESH if due else SAVED
        return {
            "source": IDENTITY if self.scalar else source,
            "keep": self.interval > 1 and not self.scalar,
            "scalar_before": self.scalar and count == 0 and self.warmup_steps == 0,
            "scalar_after": self.scalar and after,
        }

    def _checked(self) -> Tensor:
        """The hyperparameter table. What a step refuses is refused here, before anything has changed."""
        self._membership()
        for grad in (p.grad for params in self._plain for p in params):
            if grad is not None and grad.layout is not torch.strided:
                fail("a gradient", "a dense tensor", grad.layout, "Use sparse=False.", RuntimeError)
        return torch.tensor([_hypers(group) for group in self.param_groups], dtype=torch.float64)

    def _bind_pairs(self) -> dict[int, list[Tensor]]:
        """Point every device's plan at this step's gradients.

        Returns, by group, parameters of pairs that cannot be preconditioned because their partner has no gradient.
        """
        amsgrad = any(group["amsgrad"] for group in self.param_groups)
        keep_S = self.interval > 1 and not self.scalar
        slots = self._membership()
        strays: dict[int, list[Tensor]] = {}
        for binding in self._ready_bindings():
            binding.bind_state(self.state, [slots[i] for i in binding.chosen], amsgrad, keep_S)
            for factor, group in binding.bind_grads(self.state):
                strays.setdefault(group, []).append(factor)
        return strays

    def _step_pairs(self, count: int, hypers: Tensor) -> None:
        schedule = self._schedule(count)
        for binding in self._bindings:
            scale, found_inf = (self._amp(name, binding.plan.device) for name in ("grad_scale", "found_inf"))
            binding.run(AdamWStep(hypers, precision=self.precision, grad_scale=scale, found_inf=found_inf, **schedule))

    def _amp(self, name: str, device: torch.device) -> Tensor | None:
        value = getattr(self, name, None)
        return None if value is None else value.to(device=device, dtype=torch.float32)

    def _ready_bindings(self) -> list[Binding]:
        """One a device; made anew when a factor has changed its device."""
        if any(pair.A.device != b.plan.device for b in self._bindings for pair in b.pairs):
            self._bindings = []
        if not self._bindings:
            self._bindings = [
                Binding([self.pairs[i] for i in chosen], chosen, resolve(self.backend, device))
                for device, chosen in by_device(self.pairs).items()
            ]
        return self._bindings

    def _membership(self) -> list[Slot | None]:
        """The groups of each pair's A and B (None if either is in no group); kept until the groups change."""
        key = [tuple(map(id, group["params"])) for group in self.param_groups]
        if key != self._key:
            group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
            self._slots = [
                (group_of[p.A], group_of[p.B]) if p.A in group_of and p.B in group_of else None for p in self.pairs
            ]
            paired = {t for pair, slot in zip(self.pairs, self._slots) if slot for t in (pair.A, pair.B)}
            self._plain = [[p for p in group["params"] if p not in paired] for group in self.param_groups]
            self._key = key
        return self._slots

    def _step_plain(self, strays: dict[int, list[Tensor]]) -> None:
        """Parameters in no active pair, by torch's own fused AdamW."""
        for number, group in enumerate(self.param_groups):
            params = [p for p in (*self._plain[number], *strays.get(number, ())) if p.grad is not None]
            for device in {p.device for p in params}:
                chosen = [p for p in params if p.device == device]
                for p in chosen:
                    init_param(self.state[p], p, group["amsgrad"], 1)
                    fit(self.state[p], p, 1)
                columns = [[self.state[p].get(name) for p in chosen] for name in keys.MOMENTS]
                fused = device.type in FUSED_DEVICES and not any(p.is_complex() for p in chosen)
                adamw(
                    chosen, [p.grad for p in chosen], columns[0], columns[1],
                    columns[2] if group["amsgrad"] else [], [self.state[p]["step"] for p in chosen],
                    fused=fused, foreach=not fused, grad_scale=self._amp("grad_scale", device),
                    found_inf=self._amp("found_inf", device), amsgrad=group["amsgrad"], maximize=group["maximize"],
                    beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                    weight_decay=group["weight_decay"], eps=group["eps"],
                )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() gave, or the state of a torch.optim.AdamW over the same parameters.

        Group options that the loaded state lacks keep the constructor's values. Raises ValueError, before anything is
        changed, where a loaded moment has not its parameter's shape.
        """
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        raw = {p: state_dict["state"].get(key, {}) for p, key in zip(params, saved)}
        for param, entries in raw.items():
            for name in keys.MOMENTS:
                if name in entries and entries[name].shape != param.shape:
                    remedy = "The state belongs to another model or rank."
                    fail(f"loaded state {name!r}", tuple(param.shape), tuple(entries[name].shape), remedy)
        super().load_state_dict(state_dict)
        experts = {t: pair.experts for pair in self.pairs for t in (pair.A, pair.B)}
        for param, entries in raw.items():
            if entries:
                adopt(self.state[param], entries, param, experts.get(param, 1))
        self._bindings = []

    def __getstate__(self) -> dict[str, Any]:
        kept = ("pairs", "scalar", "interval", "warmup_steps", "backend", "precision")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._bindings, self._key = [], None


def _flatten(params: Iterable[Any], pairs: Iterable[PairLike] | None) -> tuple[Any, Iterable[PairLike]]:
    """A bare list of pairs as parameters and pairs; torch alone would read a tuple as (name, parameter)."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params, pairs or []  # torch words this error itself
    params = list(params)
    bare = [isinstance(p, LoRAPair) or (isinstance(p, tuple) and all(isinstance(t, Tensor) for t in p)) for p in params]
    if any(bare):
        if not all(bare) or pairs is not None:
            fail(
                "params",
                "either parameters or pairs",
                "both",
                "Pass parameters as params and pairs as pairs=.",
                TypeError,
            )
        return [t for p in params for t in ((p.A, p.B) if isinstance(p, LoRAPair) else p)], params
    if pairs is None:
        remedy = "Pass pairs=reflora.find_pairs(model), or use reflora.create_reflora_optimizer(model, lr=...)."
        raise ValueError(f"pairs: expected the LoRA pairs among the parameters, got None. {remedy}")
    return params, pairs


def _hypers(group: dict[str, Any]) -> list[float]:
    lr, eps, decay, betas = float(group["lr"]), group["eps"], group["weight_decay"], group["betas"]
    _check_hypers(lr, betas, eps, decay)
    return [lr, *map(float, betas), eps, decay, float(group["amsgrad"]), float(group["maximize"]), 0.0]


def _check_hypers(lr: float, betas: Any, eps: float, weight_decay: float) -> None:
    """Here and before every step, since schedulers write param_groups; nan fails too."""
    if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
        fail("lr, eps, weight_decay", "numbers >= 0", (lr, eps, weight_decay), "Use maximize=True for ascent.")
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        fail("betas", "two numbers in [0, 1)", betas, "The defaults are (0.9, 0.999).")


def _check_options(interval: int, warmup_steps: int, backend: str | None, precision: str, unserved: dict) -> None:
    check_count("interval", interval, 1)
    check_count("warmup_steps", warmup_steps, 0)
    check_backend(backend)
    check_precision(precision)
    for name, value in unserved.items():
        if value:
            fail(name, "False", value, "The fused step is not differentiable and not captured in graphs yet.")
