"""A step under torch.compile: one opaque, mutating operator, `torch.ops.reflora.adamw_`.

It is the functional step over the tensors that it is given, which may be copies. A string describes what does not
change from step to step. Engines are kept between calls, keyed by the table of results, as long as that lives.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .._ops import add_op_namespace_prefix, ops
from ..ambient import independent
from ..backends import resolve
from ..checks import check_backend, check_flags, check_storage, fail
from ..columns import PLAIN, REPORTED
from ..diagnostics import uniform
from ..engine import Engines
from ..operators import OP_TAGS
from ..pairs import LoRAPair
from .adamw_engine import AdamWEngine
from .grams import init_gram, part, rejoin
from .groups import check_group
from .scaler import Scaler
from .state import LIKE_TORCH, Storage, check_fits, check_pair, fit, init_pair, init_param
from .step import (
    AdamWOptions,
    InvariantOptions,
    Members,
    Options,
    RiemannianOptions,
    adamw_,
    engines_of,
    refuse_amsgrad,
)

SEED = "reflora_seed"
RULES = {rule.__name__: rule for rule in (AdamWOptions, RiemannianOptions, InvariantOptions)}
# per group, as floats; lr is 0 where it is a tensor
GROUP_HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize")


@dataclass
class Compiled:
    """What compiled steps keep: engines over the tensors of the last call, and their addresses.

    captured: as in AdamWEngine, shared with the optimizer's own engines.
    """

    captured: set[str] = field(default_factory=set)
    described: str = ""
    addresses: list[int] = field(default_factory=list)
    engines: Engines[AdamWEngine] | None = None
    params: list[Tensor] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    state: dict[Tensor, Any] = field(default_factory=dict)
    members: Members = field(default_factory=lambda: Members([], []))
    told: set[str] = field(default_factory=set)

    def over(self, described: str, params: list[Tensor], state: list[Tensor]) -> dict[str, Any]:
        """Make new engines where these are not the tensors of the last call. Returns the description."""
        wanted, addresses = _read(described), [t.data_ptr() for t in (*params, *state)]
        if (self.described, self.addresses) == (described, addresses):
            return wanted
        self.described, self.params = "", [p.detach() for p in params]
        own, entries = iter(self.params), iter(state)
        self.groups = [{"params": [next(own) for _ in range(size)]} for size in wanted["sizes"]]
        group_of = {p: number for number, group in enumerate(self.groups) for p in group["params"]}
        self.state = defaultdict(dict)
        for param, names in zip(self.params, wanted["names"]):
            self.state[param] = {name: next(entries) for name in names}
        pairs = [LoRAPair(name, self.params[a], self.params[b], layout) for name, a, b, layout in wanted["pairs"]]
        paired = {t for pair in pairs for t in (pair.A, pair.B)}
        slots = [(group_of[pair.A], group_of[pair.B]) for pair in pairs]
        plain = [[p for p in group["params"] if p not in paired] for group in self.groups]
        self.members = Members(list(slots), plain)
        self.engines = engines_of(pairs, wanted["backend"], wanted["options"].storage, self.captured)
        self.described, self.addresses = described, addresses  # last: what raises above is tried again
        return wanted


_KEPT: Any = WeakTensorKeyDictionary()


@functools.lru_cache(maxsize=16)
def _read(described: str) -> dict[str, Any]:
    wanted: dict[str, Any] = json.loads(described)
    options = wanted["options"]
    rule = RULES[wanted["rule"]]
    wanted["options"] = rule(**{**options, "storage": Storage(**options["storage"])})
    return wanted


def parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def empty_results(pairs: list[LoRAPair]) -> Tensor:
    """Float64 `[rows of all pairs, REPORTED]` of a step not yet taken, on the device of the first pair."""
    return uniform(pairs, PLAIN).tables[0]


class CompiledStep(Optimizer):
    """The part of an optimizer over pairs for torch.compile."""

    # names of the attributes that are options of the whole optimizer
    OWN: ClassVar[tuple[str, ...]]

    pairs: list[LoRAPair]
    storage: Storage
    stochastic_rounding: bool
    backend: str | None
    captured: set[str]
    _membership: Callable[[], Members]
    _compiled: Compiled
    _described: str
    _state_names: list[tuple[str, ...]]
    _traced_options: dict[str, Any]
    # results of the last compiled step, and their version at the last eager step
    _traced_results: Tensor | None
    _seen_version: int

    @property
    def options(self) -> Options:
        """How a step is taken, whatever the parameters."""
        raise NotImplementedError

    @property
    def seed(self) -> int | None:
        """The seed of stochastic rounding."""
        self._check_rounding()
        return self.param_groups[0][SEED] if self.stochastic_rounding else None

    def _step_traced(self) -> None:
        """The whole step as one operator in the traced graph.

        It works on detached tensors: a graph would stay in `no_grad` where the operator fails.
        """
        self._init_group()
        for name, value in self._traced_options.items():
            assert getattr(self, name) == value  # a guard: once another is written, the step is traced anew
        params = [p for group in self.param_groups for p in group["params"]]
        graded = [index for index, p in enumerate(params) if p.grad is not None]
        hypers: list[float] = []
        lrs, lr_groups = [], []
        for number, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lrs.append(lr)
                lr_groups.append(number)
                lr = 0.0
            hypers += [lr, group["betas"][0], group["betas"][1], group["eps"], group["weight_decay"]]
            hypers += [float(group["amsgrad"]), float(group["maximize"])]
        state = [self.state[p][name] for p, own in zip(params, self._state_names) for name in own]
        ops.adamw_(
            [p.detach() for p in params], [params[index].grad.detach() for index in graded], graded, state,
            self._traced_results, hypers, lrs,
            lr_groups, getattr(self, "grad_scale", None), getattr(self, "found_inf", None), self._described,
        )  # fmt: skip

    def _init_group(self) -> None:
        """Make all state, so that a trace finds it. Dynamo runs this while tracing, on the real parameters."""
        options = self._check_written()
        amsgrad = any(group["amsgrad"] for group in self.param_groups)
        pairs, keeps_S = self.stepped_pairs(), options.keeps_S
        owners = {t: pair for pair in pairs for t in (pair.A, pair.B)}
        for known in pairs:
            check_pair(self.state, known)
        for p in parameters(self):
            if p not in owners:
                check_fits(self.state.get(p, {}), p, 1)
        self._state_names = []
        for p in parameters(self):
            pair = owners.get(p)
            # a frozen factor's state goes with its partner's
            if not any(t.requires_grad for t in ((pair.A, pair.B) if pair else (p,))):
                self._state_names.append(())
                continue
            experts, storage = (pair.experts, self.storage) if pair else (1, LIKE_TORCH)
            init_param(self.state[p], p, amsgrad, experts, storage)
            fit(self.state[p], p, experts, storage)
            if pair is not None and storage.grams:
                self._init_gram(pair, p)
            elif pair is not None and p is pair.A:
                init_pair(self.state[p], pair, keeps_S)
            self._state_names.append(tuple(self.state[p]))
        if self._traced_results is None:
            self._traced_results = empty_results(pairs)
            self._see_version()
            _KEPT[self._traced_results] = self._compiled
        self._described = self._describe(pairs)
        self._traced_options = {name: getattr(self, name) for name in ("backend", "stochastic_rounding", *self.OWN)}

    def _check_written(self) -> Options:
        """The options. Raises TypeError or ValueError for what has been written to groups and attributes."""
        self._check_backend()
        for group in self.param_groups:
            check_group(group)
        refuse_amsgrad(self._membership(), self.param_groups, self.storage)
        self._check_rounding()
        return self.options

    def _check_rounding(self) -> None:
        check_flags({"stochastic_rounding": self.stochastic_rounding})
        check_storage(None, self.storage.master, self.stochastic_rounding)
        if self.stochastic_rounding and SEED not in self.param_groups[0]:
            remedy = "Build another, and load this state."
            fail("stochastic_rounding", "what the optimizer was built with", True, remedy)

    def _check_backend(self) -> None:
        check_backend(self.backend)
        for device in {pair.A.device for pair in self.pairs}:
            resolve(self.backend, device)

    def _init_gram(self, pair: LoRAPair, factor: Tensor) -> None:
        """The operator adds no entry, so those of a factor whose partner has no gradient are made here."""
        state = self.state[factor]
        init_gram(state, pair, factor, self.storage.grams)
        if (pair.A.grad is None) != (pair.B.grad is None):
            part(state, pair, factor, self.storage, self.param_groups)
        elif pair.A.grad is not None:
            rejoin(state, pair, factor, self.storage.grams)

    def _describe(self, pairs: list[LoRAPair]) -> str:
        place = {p: index for index, p in enumerate(parameters(self))}
        return json.dumps({
            "sizes": [len(group["params"]) for group in self.param_groups],
            "pairs": [(pair.name, place[pair.A], place[pair.B], pair.layout) for pair in pairs],
            "names": self._state_names, "backend": self.backend, "seed": self.seed,
            "rule": type(self.options).__name__, "options": asdict(self.options),
        })  # fmt: skip

    def stepped_pairs(self) -> list[LoRAPair]:
        """The pairs whose factors are among the parameters."""
        return [pair for pair, slot in zip(self.pairs, self._membership().slots) if slot]

    def _see_version(self) -> None:
        if self._traced_results is not None:
            self._seen_version = self._traced_results._version

    @property
    def last_was_traced(self) -> bool:
        return self._traced_results is not None and self._traced_results._version != self._seen_version

    def _register(self) -> None:
        """Called when an optimizer is made, copied or loaded."""
        self.captured = set()
        self._compiled = Compiled(self.captured)
        self._traced_results, self._state_names, self._described, self._seen_version = None, [], "", 0
        self._traced_options = {}


@torch.library.custom_op(add_op_namespace_prefix("adamw_"), mutates_args=("params", "state", "results"), tags=OP_TAGS)
def adamw_op(
    params: list[Tensor], grads: list[Tensor], graded: list[int], state: list[Tensor], results: Tensor,
    hypers: list[float], lrs: list[Tensor], lr_groups: list[int], grad_scale: Tensor | None,
    found_inf: Tensor | None, described: str,
) -> None:  # fmt: skip
    """One step. params: all, in group order; graded: which have the gradients; state: entries of each param in turn.

    results: see empty_results. hypers: GROUP_HYPERS of each group; lrs: rates that are tensors, of groups lr_groups.
    """
    kept = _KEPT.get(results)
    if kept is None:
        kept = _KEPT[results] = Compiled()
    wanted = kept.over(described, params, state)
    for group, own in zip(kept.groups, zip(*[iter(hypers)] * len(GROUP_HYPERS))):
        lr, beta1, beta2, eps, decay, amsgrad, maximize = own
        group.update(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
        group.update(amsgrad=bool(amsgrad), maximize=bool(maximize))
    for number, lr_tensor in zip(lr_groups, lrs):
        kept.groups[number]["lr"] = lr_tensor
    given = {kept.params[index]: grad for index, grad in zip(graded, grads)}
    with torch.no_grad(), independent():
        adamw_(
            kept.engines, kept.members, kept.groups, kept.state, given.get, wanted["options"],
            Scaler(grad_scale, found_inf), wanted["seed"], kept.told,
        )  # fmt: skip
    _report(kept.engines, results)


def _report(engines: Engines[AdamWEngine], results: Tensor) -> None:
    """Results of all engines, in the order of the pairs."""
    if len(engines.made) == 1 and engines.made[0].results is not None:
        results.copy_(engines.made[0].results[:, :REPORTED])
        return
    reports, first = engines.reports(), 0
    for index, pair in enumerate(engines.pairs):
        results[first : first + pair.experts].copy_(reports[index][:, :REPORTED])
        first += pair.experts


@adamw_op.register_fake
def _(params, grads, graded, state, results, hypers, lrs, lr_groups, grad_scale, found_inf, described) -> None:  # type: ignore[no-untyped-def]
    return None
