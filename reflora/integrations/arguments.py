"""Command line arguments of the published training scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PEFTArguments:
    """Which adapter to train and how; fields and defaults are the published package's, for HfArgumentParser."""

    lora_r: int | None = _option(8, "Rank of the adapters.")
    lora_alpha: int | None = _option(16, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float | None = _option(0.0, "Dropout on the input of the adapters.")
    target_modules: list[str] | str | None = _option(
        None,
        "Layers to adapt: name endings separated by commas, a regular expression, or 'all-linear'. "
        "PEFT knows the usual choice for many architectures when none is given.",
    )
    init_lora_weights: str | None = _option(
        True,
        "PEFT's initialisation: True (B = 0), False (both random, for debugging), 'gaussian', 'eva', 'olora', "
        "'pissa', 'pissa_niter_[n]', 'corda' or 'loftq'.",
    )
    refactor: bool | None = _option(False, "Train with RefLoRA.")
    use_scalar: bool | None = _option(False, "RefLoRA-S, the scalar variant.")
    reflora_warmup: int | None = _option(100, "Optimizer steps before the first refactoring.")
    reflora_interval: int | None = _option(1, "Optimizer steps from one refactoring to the next.")
