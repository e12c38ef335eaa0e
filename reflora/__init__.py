"""RefLoRA: the optimally refactored LoRA step for the price of an AdamW step.

Names are loaded on first use: `import reflora` imports none of torch, triton, peft and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LoRAPair": "pairs",
    "Diagnostics": "diagnostics",
    "precondition_": "functional",
    "refactor_": "functional",
    "RefLoRAAdamW": "optim.adamw",
    "InvariantAdamW": "optim.invariant",
    "RiemannianAdamW": "optim.riemannian",
    "create_reflora_optimizer": "integrations.optimizer",
    "OptimizerFactory": "integrations.optimizer",
    "wrap": "integrations.optimizer",
    "find_pairs": "integrations.peft",
    "shard_placement": "integrations.fsdp",
    "GradientHooks": "integrations.hooks",
    "Refactorer": "integrations.dropin",
    "PEFTArguments": "integrations.arguments",
    "RefTrainer": "integrations.trainer",
    "RefLoRACallback": "integrations.trainer",
}
_MODULES = ("linalg", "reference")

__all__ = ["__version__", *_HOMES, *_MODULES]

if TYPE_CHECKING:
    from . import linalg as linalg
    from . import reference as reference
    from .diagnostics import Diagnostics as Diagnostics
    from .functional import precondition_ as precondition_
    from .functional import refactor_ as refactor_
    from .integrations.arguments import PEFTArguments as PEFTArguments
    from .integrations.dropin import Refactorer as Refactorer
    from .integrations.fsdp import shard_placement as shard_placement
    from .integrations.hooks import GradientHooks as GradientHooks
    from .integrations.optimizer import OptimizerFactory as OptimizerFactory
    from .integrations.optimizer import create_reflora_optimizer as create_reflora_optimizer
    from .integrations.optimizer import wrap as wrap
    from .integrations.peft import find_pairs as find_pairs
    from .integrations.trainer import RefLoRACallback as RefLoRACallback
    from .integrations.trainer import RefTrainer as RefTrainer
    from .optim.adamw import RefLoRAAdamW as RefLoRAAdamW
    from .optim.invariant import InvariantAdamW as InvariantAdamW
    from .optim.riemannian import RiemannianAdamW as RiemannianAdamW
    from .pairs import LoRAPair as LoRAPair


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
