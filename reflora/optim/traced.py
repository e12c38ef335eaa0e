"""RefLoRAAdamW.step() under torch.compile: one opaque, mutating operator, `torch.ops.reflora.adamw_`.

The operator works on the tensors that it is given, which may be copies, and takes nothing but options from the
optimizer that `handle` names: it steps a twin of that optimizer over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import copy
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..ambient import independent
from ..checks import fail
from ..constants import PLAIN
from ..diagnostics import uniform
from ..operators import OP_TAGS
from ..pairs import LoRAPair
from ..plan import REPORTED
from .binding import Binding
from .state import LIKE_TORCH, Storage, fit, init_pair, init_param

# of a group, as floats; lr is 0 where it is a tensor
HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize")

_LIVE: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count(1)


def register(optimizer: Any) -> int:
    """A handle of the optimizer, for as long as it lives."""
    number = next(_numbers)
    _LIVE[number] = optimizer
    return number


def parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def empty_results(pairs: list[LoRAPair]) -> Tensor:
    """Float64 `[rows of all pairs, REPORTED]` of a step that has not been taken, on the device of the first."""
    return uniform(pairs, PLAIN).tables[0]


class TracedStep:
    """What RefLoRAAdamW has for torch.compile."""

    param_groups: list[dict[str, Any]]
    state: Any
    pairs: list[LoRAPair]
    storage: Storage
    scalar: bool
    interval: int
    captured: set[str]
    _membership: Callable[[], list[Any]]
    _step_eagerly: Callable[[], None]
    _bindings: list[Binding]
    _traced_results: Tensor | None
    traced_names: list[tuple[str, ...]]
    traced_twin: tuple[list[int], Any]
    # no traced code reads it: a step in the other way than the last must not recompile anything
    last_was_traced: bool

    def _step_traced(self) -> None:
        """The whole step as one operator in the traced graph.

        It works on detached tensors: a graph would not leave `no_grad` where the operator fails.
        """
        self._init_group()
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
        state = [self.state[p][name] for p, own in zip(params, self.traced_names) for name in own]
        ops.adamw_(
            [p.detach() for p in params], [params[index].grad.detach() for index in graded], graded, state,
            self._traced_results, hypers, lrs,
            lr_groups, getattr(self, "grad_scale", None), getattr(self, "found_inf", None), self._handle,
        )  # fmt: skip

    def _init_group(self) -> None:
        """Make all state, so that a trace finds it. Dynamo runs this as it traces, on the real parameters."""
        amsgrad = any(group["amsgrad"] for group in self.param_groups)
        in_pairs = {
            t: (pair, t is pair.A)
            for pair, slot in zip(self.pairs, self._membership())
            if slot
            for t in (pair.A, pair.B)
        }
        self.traced_names = []
        for p in parameters(self):
            if not p.requires_grad:
                self.traced_names.append(())
                continue
            pair, is_A = in_pairs.get(p, (None, False))
            experts, storage = (pair.experts, self.storage) if pair else (1, LIKE_TORCH)
            init_param(self.state[p], p, amsgrad, experts, storage)
            fit(self.state[p], p, experts, storage)
            if pair is not None and is_A:
                init_pair(self.state[p], pair, self.interval > 1 and not self.scalar)
            self.traced_names.append(tuple(self.state[p]))
        if self._traced_results is None:
            self._traced_results = empty_results(self.traced_pairs())

    def traced_pairs(self) -> list[LoRAPair]:
        """The pairs whose factors are among the parameters."""
        return [pair for pair, slot in zip(self.pairs, self._membership()) if slot]

    def twin(self, params: list[Tensor]) -> Any:
        """An optimizer like this one over other tensors, without state; what reflora::adamw_ steps."""
        replaced = dict(zip(parameters(self), params))
        groups = [{**group, "params": [replaced[p] for p in group["params"]]} for group in self.param_groups]
        pairs = [
            LoRAPair(pair.name, replaced[pair.A], replaced[pair.B], pair.layout) for pair in self.traced_pairs()
        ]  # fmt: skip
        twin: Any = copy(self)
        twin.__setstate__({**twin.__getstate__(), "param_groups": groups, "state": defaultdict(dict), "pairs": pairs})
        twin.captured = self.captured
        return twin

    def step_now(self) -> Tensor:
        """A step, without a closure. Returns float64 `[rows of all pairs, REPORTED]` in the order of the pairs."""
        with torch.no_grad(), independent():
            self._step_eagerly()
        if len(self._bindings) == 1 and self._bindings[0].results is not None:
            return self._bindings[0].results[:, :REPORTED]
        report = empty_results(self.pairs)
        for binding in self._bindings:
            first = 0
            for index, pair in enumerate(self.pairs):
                if binding.results is not None and index in binding.chosen:
                    own = sum(p.experts for p in binding.pairs[: binding.chosen.index(index)])
                    report[first : first + pair.experts].copy_(binding.results[own : own + pair.experts, :REPORTED])
                first += pair.experts
        return report

    def _register(self) -> None:
        """Anew for a copy; a loaded state changes nothing here."""
        if _LIVE.get(getattr(self, "_handle", 0)) is self:
            return
        self.captured = set()
        self._handle = register(self)
        self._traced_results, self.traced_names, self.traced_twin = None, [], ([], None)
        self.last_was_traced = False


@torch.library.custom_op(add_op_namespace_prefix("adamw_"), mutates_args=("params", "state", "results"), tags=OP_TAGS)
def adamw_(
    params: list[Tensor], grads: list[Tensor], graded: list[int], state: list[Tensor], results: Tensor,
    hypers: list[float], lrs: list[Tensor], lr_groups: list[int], grad_scale: Tensor | None,
    found_inf: Tensor | None, handle: int,
) -> None:  # fmt: skip
    """One step. params: all, in group order; graded: which have the gradients; state: `traced_names` of each in turns.

    hypers: HYPERS of each group; lrs: learning rates that are tensors, of groups lr_groups.
    """
    original = _LIVE.get(handle)
    if original is None:
        remedy = "Keep the optimizer alive as long as what was compiled from its step."
        fail("reflora::adamw_", "an optimizer", "one that is gone", remedy, RuntimeError)
    twin = _twin(original, params, state)
    for param in parameters(twin):
        param.grad = None
    aliases = parameters(twin)
    for index, grad in zip(graded, grads):
        aliases[index].grad = grad
    for number, group in enumerate(twin.param_groups):
        lr, beta1, beta2, eps, decay, amsgrad, maximize = hypers[number * len(HYPERS) : (number + 1) * len(HYPERS)]
        group.update(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
        group.update(amsgrad=bool(amsgrad), maximize=bool(maximize))
    for number, lr_tensor in zip(lr_groups, lrs):
        twin.param_groups[number]["lr"] = lr_tensor
    twin.grad_scale, twin.found_inf = grad_scale, found_inf
    results.copy_(twin.step_now())
    original.last_was_traced = True
    for param in aliases:
        param.grad = None


@adamw_.register_fake
def _(params, grads, graded, state, results, hypers, lrs, lr_groups, grad_scale, found_inf, handle) -> None:  # type: ignore[no-untyped-def]
    return None


def _twin(original: Any, params: list[Tensor], state: list[Tensor]) -> Any:
    """The twin of the last call, or a new one where these are other tensors."""
    pointers = [t.data_ptr() for t in (*params, *state)]
    seen, twin = original.traced_twin
    if seen != pointers:
        twin = original.twin([p.detach() for p in params])
        tensors = iter(state)
        for alias, names in zip(parameters(twin), original.traced_names):
            twin.state[alias] = {name: next(tensors) for name in names}
        original.traced_twin = (pointers, twin)
    return twin
