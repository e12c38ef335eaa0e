"""axolotl's plugin: `plugins: [reflora.integrations.axolotl.RefLoRAPlugin]` in a YAML file trains with RefLoRA."""

from __future__ import annotations

import ast
import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from ..checks import fail
from .optimizer import OptimizerFactory, adamw_options

LOG = logging.getLogger(__name__)
# options for which axolotl makes parameter groups
GROUPED = ("loraplus_lr_ratio", "lr_groups", "embedding_lr", "embedding_lr_scale")
# words of YAML and their Python spelling
YAML = {"true": "True", "false": "False", "none": "None", "null": "None", "~": "None"}
SERVED = ("adamw_torch", "adamw_torch_fused")


class RefLoRAPlugin(BasePlugin):
    """Gives axolotl's trainer RefLoRAAdamW with the YAML file's learning rate, betas, eps and weight decay.

    `optim_args` there are further arguments of `reflora.create_reflora_optimizer`, such as `scalar: true`. With
    loraplus_lr_ratio, embedding_lr, embedding_lr_scale or lr_groups the parameter groups are axolotl's own.

    Raises:
        ValueError: An `optimizer:` other than adamw_torch and adamw_torch_fused.
    """

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called by axolotl before the trainer builds its optimizer."""
        named = cfg.get("optimizer") or SERVED[0]
        if getattr(named, "value", named) not in SERVED:
            fail("optimizer", " or ".join(SERVED), str(named), "RefLoRAAdamW takes its place: name one of these.")
        options = {**adamw_options(trainer.args), **parsed(cfg.get("optim_args"))}
        LOG.info("reflora: trains with %s", options)
        if any(cfg.get(name) is not None for name in GROUPED):
            options["params"] = lambda model: groups_of(trainer, model, options["lr"])
        trainer.optimizer_cls_and_kwargs = (OptimizerFactory, options)


def groups_of(trainer: Any, model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The groups that axolotl's trainer would give to torch's AdamW; with LoRA+ it ignores the other options."""
    if trainer.args.loraplus_lr_ratio is None:
        return trainer.create_optimizer_grouped_parameters(model, {"lr": lr})
    ratios = {name: getattr(trainer.args, name) for name in ("loraplus_lr_ratio", "loraplus_lr_embedding")}
    return create_loraplus_optimizer(model, _given, lr=lr, **ratios)


def _given(groups: list[dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
    """In place of an optimizer class: PEFT's function makes the groups and calls it with them."""
    return groups


def parsed(optim_args: Any) -> dict[str, Any]:
    """A mapping as it is; "scalar=True,interval=2" with its values as Python literals, other words as text."""
    if not isinstance(optim_args, str):
        return dict(optim_args or {})
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in optim_args.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            fail("optim_args", "name=value, separated by commas", repr(item), "Write scalar=True, for example.")
        try:
            found[name] = ast.literal_eval(YAML.get(value, value))
        except (ValueError, SyntaxError):
            found[name] = value
    return found
