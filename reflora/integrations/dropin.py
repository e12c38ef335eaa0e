"""The published package's Refactorer: its names, its hooks and its arithmetic, made safe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ambient import independent
from ..checks import check_count, check_flags, fail
from ..diagnostics import Diagnostics
from ..optim.membership import HALVED, Unserved, halved, listed, say_plain
from ..optim.operations import ops_of
from ..optim.paired import PairedAdamW
from ..optim.transport import Transport, check_movable
from ..optim.wrapped_pairs import FLATTENED
from ..optim.wrapper import Wrapped, scaler_found_inf
from ..overlap import extent
from ..pairs import HOOKED, LoRAPair, check_unhooked, check_unhooked_since
from .peft import Site, find_sites, found_in

SKIP_STEPS = "reflora_skip_steps"


class Refactorer:
    """RefLoRA through step hooks of any torch optimizer.

    Layers where S does not exist use `c I` (see reflora.precondition_); a layer without a gradient, or with a
    non-finite one, is left alone. `skip_steps` lives in the integrated optimizer's state_dict, so that a resumed run
    does not warm up again. Raises what `reflora.find_pairs` raises.

    Args:
        model: A PEFT model.
        warmup_steps: Steps before the first refactoring. From B = 0 the published scripts take 100 or 200; fewer are
            safe, but B A then stays near rank one for long.
        re_init: Draw random A and B and subtract the change from the base weights, which no other layer or adapter
            may share. Afterwards the model with its adapter disabled is a different one.
        interval: Refactor every `interval` steps; the steps in between are plain.
        use_scalar: RefLoRA-S, which refactors in `integrate_into_optimizer` and after each step, and moves the state.
    """

    def __init__(
        self,
        model: nn.Module,
        warmup_steps: int = 0,
        re_init: bool = False,
        interval: int = 1,
        use_scalar: bool = False,
    ) -> None:
        check_flags({"re_init": re_init, "use_scalar": use_scalar})
        check_count("warmup_steps", warmup_steps, 0)
        check_count("interval", interval, 1)
        self.warmup_steps, self.interval, self.use_scalar = warmup_steps, interval, use_scalar
        sites = find_sites(model)
        self.pairs: list[LoRAPair] = [site.pair for site in sites]
        self._unserved = Unserved(found_in(model, self.pairs), "the Refactorer was made without them. Make a new one")
        self._told: set[str] = set()
        self._hooked = HOOKED[0]
        self.lora_weights = [(pair.A, pair.B) for pair in self.pairs]
        check_unhooked(self.pairs)
        self._ops = ops_of(self.pairs)
        self._optimizer: Optimizer | None = None
        self._skip_steps = warmup_steps
        self._handles: list[Any] = []
        self._depth = 0
        self._closure: Callable[[], Any] | None = None
        self._written: list[tuple[int, int]] = []
        self._first: list[tuple[Tensor, Tensor, Tensor]] = []
        if re_init:
            weights = [_base_weight(site) for site in sites]
            _check_no_others(sites)
            _check_unshared(model, sites, weights)
            for site, weight in zip(sites, weights):
                _draw_anew(site, weight)

    @property
    def skip_steps(self) -> int:
        """Plain steps left before the next refactoring."""
        groups = self._optimizer.param_groups if self._optimizer is not None else [{}]
        return groups[0].get(SKIP_STEPS, self._skip_steps)

    @skip_steps.setter
    def skip_steps(self, value: int) -> None:
        self._skip_steps = value
        if self._optimizer is not None:
            self._optimizer.param_groups[0][SKIP_STEPS] = value

    @torch.no_grad()
    def dummy_step(self) -> None:
        """Precondition the gradients in place: the same step as with refactored factors, but these stay untouched."""
        if not self._due():
            return
        self._precondition()

    def _precondition(self) -> None:
        self._hooked = check_unhooked_since(self.pairs, self._hooked)
        active = [pair.A.grad is not None and pair.B.grad is not None for pair in self.pairs]
        self._ops.precondition(self._ops.with_finite_grads(active), scalar=self.use_scalar)

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """Refactor the factors themselves; RefLoRA-S (use_scalar) also moves the optimizer's state."""
        if not self._due():
            return
        everything = [True] * len(self.pairs)
        if not self.use_scalar:
            self._ops.refactor(everything, scalar=False)
            return
        move = Transport(optimizer, self.pairs)
        move.apply(self._ops.refactor(everything, scalar=True))

    def integrate_into_optimizer(self, optimizer: Optimizer) -> None:
        """Register the hooks that refactor around each `optimizer.step()`; once per optimizer.

        use_scalar without a warm-up refactors at once. A state_dict loaded before the first step undoes that, since it
        belongs to the factors as they were saved. Raises RuntimeError for an optimizer that steps none of the pairs,
        ValueError for one that refactors by itself. For accelerate's wrapper, the optimizer inside is used.
        """
        optimizer = _inside(optimizer)
        self._check_alone(optimizer)
        for handle in self._handles:
            handle.remove()
        self._optimizer = optimizer
        self._check_members(optimizer)
        if isinstance(optimizer, (PairedAdamW, Wrapped)):
            remedy = "It needs no Refactorer; a Refactorer needs a plain optimizer, such as torch.optim.AdamW."
            fail("optimizer", "one that does not refactor by itself", type(optimizer).__name__, remedy)
        if self.use_scalar:
            check_movable(type(optimizer))
        self.skip_steps = self.warmup_steps
        self._depth, self._written = 0, []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        if self.use_scalar:
            before = [factor.detach().cpu().clone() for factor in self._factors()] if not self.warmup_steps else []
            self.step(optimizer)
            self._first = [(p, old, p.detach().cpu().clone()) for p, old in zip(self._factors(), before)]

    def diagnostics(self) -> Diagnostics:
        """What the last refactoring did, layer by layer; reading its properties syncs."""
        return self._ops.diagnostics()

    def integrated_into(self, optimizer: Optimizer) -> bool:
        return self._optimizer is _inside(optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # torch runs the hooks again in a parent class's step: a nested run finds the gradients written
        if self._depth and (self._written == self._versions() if closure is None else closure is self._closure):
            self._depth += 1
            return None
        self._depth, self._closure = 1, closure
        self._check_members(optimizer)
        if self.use_scalar or scaler_found_inf(optimizer):
            return None
        if closure is not None and self._due():
            # the gradients to precondition are those that it makes
            self._closure = self._after(closure)
            if "closure" in kwargs:
                return args, {**kwargs, "closure": self._closure}
            return (args[0], self._closure, *args[2:]), kwargs
        if closure is None:
            self.dummy_step()
        self._written = self._versions()
        return None

    def _after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def preconditioned() -> Any:
            loss = closure()
            with torch.no_grad():
                self._precondition()
            return loss

        return preconditioned

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._first = []
        if self.use_scalar and not scaler_found_inf(optimizer):
            self.step(optimizer)

    @torch.no_grad()
    def _after_load(self, optimizer: Optimizer) -> None:
        self.skip_steps = self.skip_steps
        if not optimizer.state:  # nothing was loaded: accelerate loads an optimizer's own state when it prepares it
            return
        for param, before, after in self._first:
            if torch.equal(param.cpu(), after):
                param.copy_(before)
        self._first = []

    def _due(self) -> bool:
        self._unserved.look(stacklevel=6)
        waiting = self.skip_steps > 0
        self.skip_steps = self.skip_steps - 1 if waiting else self.interval - 1
        return not waiting

    def _check_alone(self, optimizer: Any) -> None:
        """No other Refactorer is on it: S would be applied twice."""
        for hook in optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Refactorer) and other is not self:
                remedy = "Make a new optimizer, or keep the first Refactorer."
                fail("optimizer", "one without a Refactorer", "one that has another", remedy)

    def _factors(self) -> list[Tensor]:
        return [factor for pair in self.pairs for factor in (pair.A, pair.B)]

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(p.grad), p.grad._version) for p in self._factors() if p.grad is not None]

    def _check_members(self, optimizer: Optimizer) -> None:
        owned = {param for group in optimizer.param_groups for param in group["params"]}
        halves = halved(self.pairs, owned)
        if halves and HALVED not in self._told:
            self._told.add(HALVED)
            say_plain(halves, HALVED, stacklevel=5)
        if owned.isdisjoint(self._factors()):
            fail("optimizer", "the model's LoRA factors among its parameters", "none of them", FLATTENED, RuntimeError)


def _inside(optimizer: Any) -> Any:
    """The optimizer whose hooks run in a step: accelerate's wrapper has none."""
    while (
        not {"_optimizer_step_pre_hooks", "_optimizer_load_state_dict_post_hooks"}
        <= getattr(optimizer, "__dict__", {}).keys()
    ):
        if not isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            remedy = "Pass the torch optimizer itself."
            fail("optimizer", "a torch.optim.Optimizer", type(optimizer).__name__, remedy, TypeError)
        optimizer = optimizer.optimizer
    return optimizer


def _base_weight(site: Site) -> Tensor:
    """The weight to which the layer adds B A. Raises ValueError where the change cannot be subtracted from it."""
    module: Any = site.module
    if hasattr(module, "get_param"):
        weight = module.get_param()
    else:
        base = module.get_base_layer()
        weight = getattr(base, "weight", None)
        weight = base.in_proj_weight if weight is None else weight
    if not weight.is_floating_point():
        remedy = "Pass re_init=False: it is not needed, since training can start from B = 0."
        fail(f"re_init of {site.pair.name}", "a floating point base weight", weight.dtype, remedy)
    if getattr(module, "merged_adapters", ()):
        remedy = "Call model.unmerge_adapter() first."
        fail(f"re_init of {listed([site.pair.name])}", "a layer without merged adapters", "a merged one", remedy)
    return weight


def _check_no_others(sites: list[Site]) -> None:
    """These layers have no other adapter, under which the base weights would change."""
    drawn = {(id(site.module), site.adapter) for site in sites}
    for site in sites:
        names = (*getattr(site.module, "lora_A", ()), *getattr(site.module, "lora_embedding_A", ()))
        if others := sorted({name for name in names if (id(site.module), name) not in drawn}):
            remedy = "Its outputs would change with the base weights: pass re_init=False, or delete it first."
            fail(f"re_init of {listed([site.pair.name])}", "no other adapter on the layer", listed(others), remedy)


def _check_unshared(model: nn.Module, sites: list[Site], weights: list[Tensor]) -> None:
    """Nothing else reads a base weight: it would see it changed, without the adapter that makes up for it."""
    spans = []
    for path, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.numel() and not tensor.is_meta:
                spans.append((str(tensor.device), *extent(tensor), f"{path}.{name}"))
    spans.sort()
    shared: dict[tuple[str, int], list[str]] = {}
    for left, right in zip(spans, spans[1:]):
        if left[0] == right[0] and right[1] < left[2]:
            for device, first, _, _ in (left, right):
                shared[device, first] = [left[3], right[3]]
    for site, weight in zip(sites, weights):
        found = shared.get((str(weight.device), extent(weight)[0]))
        if found:
            remedy = "Pass re_init=False: it is not needed, since training can start from B = 0."
            fail(f"re_init of {listed([site.pair.name])}", "a base weight of its own", listed(found), remedy)


@torch.no_grad()
@independent()
def _draw_anew(site: Site, weight: Tensor) -> None:
    """Draw random A and B, and subtract the change of their product from the base weight."""
    module: Any = site.module
    before = module.get_delta_weight(site.adapter).float()
    for factor in (site.pair.A, site.pair.B):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    after = module.get_delta_weight(site.adapter).float()
    weight.copy_((weight.float() + before - after).to(weight.dtype))
