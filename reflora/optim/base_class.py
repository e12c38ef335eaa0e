"""Which optimizer classes can be wrapped, and which of their options share a name with ours."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..checks import fail
from .membership import check_single

# raises without a closure, whatever its signature says
_WANTS_CLOSURE = re.compile(r"if closure is None:\s*raise\b|assert closure\b")

# LOMO
_ABSTRACT = re.compile(r"^    raise NotImplementedError\b", re.MULTILINE)

# options with which a class uses up each gradient inside the backward pass: prodigyplus, optimi
IN_BACKWARD = ("fused_back_pass", "gradient_release")

# AdaHessian, SophiaH
_SECOND_ORDER = re.compile(r"hutchinson|autograd\.grad\(|\.get_trace\(")


def check_base(base: Any) -> None:
    """Raises TypeError unless it is an optimizer class that lacks RefLoRA and takes parameters.

    Raises ValueError if it requires a closure, differentiates gradients or has no step.
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        fail("optimizer_cls", "a subclass of torch.optim.Optimizer", repr(base), "Pass the class itself.", TypeError)
    check_single(base)
    if any(parent.__name__ == "PairedAdamW" for parent in base.__mro__):
        remedy = "Build it as it is; wrap(torch.optim.AdamW) gives an AdamW with the preconditioning in front."
        fail("optimizer_cls", "a class without RefLoRA", base.__name__, remedy, TypeError)
    if _takes_optimizer(base):
        remedy = f"Put RefLoRA inside: {base.__name__}(reflora.create_reflora_optimizer(model, lr=...), ...)."
        fail("optimizer_cls", "a class over parameters", f"{base.__name__}, which wraps optimizers", remedy, TypeError)
    if "optimizer_class" in inspect.signature(base).parameters:
        remedy = "Put reflora.GradientHooks on the model, in front of this class over a plain one."
        fail("optimizer_cls", "a class over parameters", f"{base.__name__}, which builds others", remedy, TypeError)
    if _ABSTRACT.search(textwrap.dedent(_source(base.step))):
        remedy = "It steps in the backward pass, if at all: use one that takes the gradients from .grad."
        fail("optimizer_cls", "a class that steps in step()", base.__name__, remedy)
    if _needs_closure(base):
        remedy = (
            "Use one that takes the gradients as they are, such as AdamW or SGD. SAM takes RefLoRA inside: "
            "SAM(params, reflora.RefLoRAAdamW, pairs=pairs)."
        )
        fail("optimizer_cls", "step(closure=None)", f"{base.__name__}, which requires a closure", remedy)
    if _SECOND_ORDER.search(_source(base.step)):
        remedy = "Use one that takes the gradients as they are, such as AdamW or SGD."
        fail("optimizer_cls", "a first-order optimizer", f"{base.__name__}, which differentiates gradients", remedy)


def _takes_optimizer(base: type[Optimizer]) -> bool:
    """Whether it is built from an optimizer instead of parameters: Lookahead, TRAC."""
    return _first_argument(base) in ("optimizer", "base_optimizer")


def _first_argument(base: type[Optimizer]) -> str:
    return next(iter(inspect.signature(base).parameters), "")


def trainable_for(base: type[Optimizer], model: nn.Module) -> Any:
    """What the constructor of `base` takes first: trainable parameters, with names if it asks for them, or the model.

    Adam-mini divides parameters by their names.
    """
    first = _first_argument(base)
    if first == "model":
        return model
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return named if first == "named_parameters" else [param for _, param in named]


def _needs_closure(base: type[Optimizer]) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for argument in list(inspect.signature(base.step).parameters.values())[1:]:
        if argument.default is inspect.Parameter.empty and argument.kind not in variadic:
            return True
    return _WANTS_CLOSURE.search(_source(base.step)) is not None


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # a compiled class, for example
        return ""


def takes_closure(base: type[Optimizer]) -> bool:
    return "closure" in inspect.signature(base.step).parameters


def separate(
    base: type[Optimizer], ours: Mapping[str, Any], base_options: Mapping[str, Any] | None, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The base class's options among the names that it shares with RefLoRA.

    ours: RefLoRA's options that are not at their defaults; kwargs: other keywords. Raises TypeError where a name could
    mean either, or is given twice.
    """
    if not isinstance(base_options, (Mapping, type(None))):
        fail("base_options", "a dictionary", type(base_options).__name__, "Name the options.", TypeError)
    named = dict(base_options or {})
    if twice := [name for name in named if name in kwargs]:
        fail("base_options", f"{twice[0]!r} once", "it as a keyword as well", "Leave out one of them.", TypeError)
    shared = [name for name in ours if name in inspect.signature(base).parameters and name not in named]
    if shared:
        name = shared[0]
        default = inspect.signature(base).parameters[name].default
        remedy = (
            f"Pass base_options={{{name!r}: ...}} for {base.__name__}'s (default {default}); {name}= is then RefLoRA's."
        )
        fail(name, "an option of one of the two", f"one that {base.__name__} has as well", remedy, TypeError)
    return named


def check_kept(optimizer: Optimizer, ours: Mapping[str, Any]) -> None:
    """Raises TypeError where the base class's constructor has overwritten an attribute of ours."""
    for name, value in ours.items():
        if getattr(optimizer, name) is not value:
            base = optimizer.base.__name__  # type: ignore[attr-defined]
            remedy = "Use reflora.GradientHooks in front of the class itself."
            fail("optimizer_cls", f"a class without an attribute {name!r}", base, remedy, TypeError)


def check_in_step(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError for groups with which a class steps in the backward pass: gradients would miss RefLoRA."""
    for name in IN_BACKWARD:
        if any(group.get(name) for group in groups):
            fail(name, "False", "True", "Gradients used up in the backward pass miss RefLoRA: step in step().")


def evaluated(loss: Any, unchanged: Callable[[], bool]) -> Callable[[], Any]:
    """A closure for the base class, already evaluated: it gives the loss, but no new gradients."""
    asked: list[bool] = []

    def closure() -> Any:
        if asked or not unchanged():
            remedy = "Its gradients would not be RefLoRA's: use an optimizer that evaluates the model once per step."
            fail("closure", "one evaluation per step", "another", remedy, RuntimeError)
        asked.append(True)
        return loss

    return closure
