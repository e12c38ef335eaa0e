"""`create_reflora_optimizer`, in the convention of `peft.optimizers.create_riemannian_optimizer`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..checks import fail
from ..optim.adamw import RefLoRAAdamW
from ..optim.base_class import trainable_for
from ..optim.invariant import InvariantAdamW
from ..optim.paired import PairedAdamW
from ..optim.riemannian import RiemannianAdamW
from ..optim.wrapped_pairs import DEFAULTS
from ..optim.wrapper import Wrapped, reflora_class
from .peft import find_pairs

OWN_OPTIONS = ("carry_grams", "check_grads", "state_dtype", "master_weights", "stochastic_rounding")


def create_reflora_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] | None = None,
    *,
    lr: float,
    params: Iterable[Any] | None = None,
    scalar: bool = False,
    interval: int = 1,
    warmup_steps: int | None = None,
    backend: str | None = None,
    precision: str = "float64",
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over the trainable parameters of `model` that steps its LoRA pairs with RefLoRA.

    Parameters in no pair take plain steps. A model sharded by FSDP2 or tensor parallelism (DTensors, Megatron's splits)
    gets a subclass of torch.optim.AdamW that preconditions inside `step`: one all-reduce of the pairs' Grams per step
    gives every process the same S.

    Args:
        model: A PEFT model, or any with PEFT's LoRA layers in it.
        optimizer_cls: None and torch.optim.AdamW both give RefLoRAAdamW, which is AdamW with the preconditioning fused
            in (torch's `foreach` changes nothing, `fused=False` only makes a GradScaler unscale before the step).
            reflora.InvariantAdamW and reflora.RiemannianAdamW are taken as they are, without scalar, interval and
            warmup_steps; for a sharded model only the first, whose four Grams a pair take one all-reduce, without its
            options for 16-bit factors. Any other class gives a subclass of it that preconditions inside `step`, with
            one sync per step on a GPU, or two while a pair of RefLoRA-S waits for its norms.
        lr: Learning rate.
        params: Parameters or groups of them, as for any torch optimizer, such as LoRA+'s two learning rates. None
            steps all trainable parameters of `model` in one group.
        scalar: RefLoRA-S, as in RefLoRAAdamW.
        interval: Recompute S every `interval` steps.
        warmup_steps: None phases S in gradually; a number takes that many first steps with S = I, as published.
        backend: None, "triton", "cpp" or "torch".
        precision: "float64" or "float32".
        **kwargs: For the optimizer, such as betas, weight_decay or momentum. Options of another class that share a
            name with RefLoRA's (schedule-free's warmup_steps) go into `base_options`, a dictionary.

    Raises:
        ValueError: No LoRA pair is found; a factor that Megatron has split along r, or over processes that it does not
            tell; a class that requires a closure or, with scalar=True, whose state cannot be
            moved.
        TypeError: Not an optimizer class, or one of PEFT's that preconditions by itself; options of the fused step for
            a sharded model; an option that both classes have.
    """
    pairs = find_pairs(model)
    whitens, damps = (
        isinstance(optimizer_cls, type) and issubclass(optimizer_cls, cls) for cls in (InvariantAdamW, RiemannianAdamW)
    )
    if any(pair.sharded for pair in pairs) or _will_be_sharded():
        optimizer_cls = optimizer_cls or torch.optim.AdamW
        if damps:
            remedy = "RefLoRAAdamW and InvariantAdamW step sharded models."
            fail("RiemannianAdamW", "a model that is not sharded", "one that is, or will be", remedy, TypeError)
        if whitens:
            from ..optim.sharded_invariant import ShardedInvariantAdamW  # torch.distributed.tensor is slow to import

            optimizer_cls = ShardedInvariantAdamW
        own = sorted(set(OWN_OPTIONS) & kwargs.keys())
        if own:
            remedy = "torch's AdamW steps sharded factors, with the preconditioning in front: leave these options out."
            fail("a sharded model", "none of the fused step's own options", ", ".join(own), remedy, TypeError)
    elif optimizer_cls is None or optimizer_cls is torch.optim.AdamW:
        optimizer_cls = RefLoRAAdamW
    is_ours = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, (PairedAdamW, Wrapped))
    cls: Any = optimizer_cls if is_ours else reflora_class(optimizer_cls)
    if issubclass(cls, PairedAdamW) and "base_options" in kwargs:
        remedy = f"{cls.__name__} shares no option name with its base class: pass them as keywords."
        fail("base_options", "another optimizer_cls", cls.__name__, remedy, TypeError)
    if "pairs" in kwargs:
        remedy = "To choose them, call the class itself, or reflora.wrap of another, with pairs=."
        fail("pairs", "none: they are found in the model", "pairs", remedy, TypeError)
    if params is None:
        params = trainable_for(cls.base if issubclass(cls, Wrapped) else cls, model)
    of_S: dict[str, Any] = {"scalar": scalar, "interval": interval, "warmup_steps": warmup_steps}
    if whitens or damps:
        if given := [name for name, value in of_S.items() if value != DEFAULTS[name]]:
            remedy = "It has no S that is phased in, kept or scalar: leave it out."
            fail(given[0], f"its default with {cls.__name__}", of_S[given[0]], remedy, TypeError)
        of_S = {}
    return cls(params, pairs=pairs, lr=lr, backend=backend, precision=precision, **of_S, **kwargs)


class OptimizerFactory:
    """`create_reflora_optimizer` for `transformers.Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {"lr": ...}))`.

    Trainer (transformers 5.3 and later) makes a factory without arguments and calls it with the model, so that the
    optimizer is built once the model is where it trains. axolotl's trainers add their training arguments.
    """

    def __init__(self, *given: object, **kwargs: object):
        if given or kwargs:
            remedy = (
                "Pass optimizers=(reflora.create_reflora_optimizer(...), None), or where a trainer makes groups "
                '(reflora.RefLoRAAdamW, {"lr": ..., "pairs": reflora.find_pairs(model)}).'
            )
            fail("OptimizerFactory", "no arguments", f"{len(given) + len(kwargs)}", remedy, TypeError)

    def __call__(self, model: nn.Module, training_args: Any = None, **kwargs: Any) -> Optimizer:
        """kwargs: of create_reflora_optimizer. AdamW's options that they lack are taken from `training_args`.

        `params` may be a function that is given the model, which alone knows its parameters, and returns them.
        """
        if callable(params := kwargs.get("params")):
            kwargs["params"] = params(model)
        return create_reflora_optimizer(
            model, **({**adamw_options(training_args), **kwargs} if training_args else kwargs)
        )


def adamw_options(training_args: Any) -> dict[str, Any]:
    """AdamW's options among transformers' TrainingArguments."""
    return {
        "lr": training_args.learning_rate,
        "betas": (training_args.adam_beta1, training_args.adam_beta2),
        "eps": training_args.adam_epsilon,
        "weight_decay": training_args.weight_decay,
    }


def wrap(optimizer_cls: type[Optimizer]) -> type[Optimizer]:
    """The subclass of an optimizer class that preconditions LoRA pairs in front of its own step.

    `create_reflora_optimizer(model, SomeOptimizer, ...)` makes one by itself. For torch.optim.AdamW it makes
    RefLoRAAdamW, which cannot follow parameters that are replaced after it was built (FSDP2 by hand): use
    `wrap(torch.optim.AdamW)` there.
    Its constructor takes `pairs=` and RefLoRAAdamW's scalar, interval, warmup_steps, backend and precision on top of
    the class's own arguments. Where the class has an option of one of these names, as schedule-free has warmup_steps,
    `base_options={"warmup_steps": 100}` is for the class, and `warmup_steps=` for RefLoRA.

    Raises:
        TypeError: Not an optimizer class, or one of PEFT's that preconditions by itself.
        ValueError: A class that needs a closure.
    """
    return reflora_class(optimizer_cls)


def _will_be_sharded() -> bool:
    """accelerate shards a model after its optimizer is built, and says so in the environment or in its state."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true", "yes"):
        return False
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    plugin = getattr(state, "_shared_state", {}).get("fsdp_plugin")
    return os.environ.get("FSDP_VERSION") == "2" or getattr(plugin, "fsdp_version", None) == 2
