"""PEFT's Riemannian optimizer (`peft.optimizers.create_riemannian_optimizer`) on bare pairs, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def optimizer(parameters: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], **options: Any) -> Optimizer:
    """torch's fused AdamW behind PEFT's preconditioner of `pairs`; the rest of `parameters` gets AdamW alone.

    Raises ImportError where peft is missing or older than its Riemannian optimizer.
    """
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(_tree(parameters, pairs), AdamW, fused=True, **options)


def _tree(parameters: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """Modules around the very tensors, named as in a PEFT model: it finds pairs by `.lora_A.` and `.lora_B.`."""
    root, layers = nn.Module(), nn.ModuleList()
    for A, B in pairs:
        layer = nn.Module()
        layer.lora_A, layer.lora_B = (nn.ModuleDict({"default": _holder({"weight": t})}) for t in (A, B))
        layers.append(layer)
    paired = {id(factor) for pair in pairs for factor in pair}
    root.layers = layers
    root.rest = _holder({str(i): p for i, p in enumerate(parameters) if id(p) not in paired})
    return root


def _holder(tensors: dict[str, Tensor]) -> nn.Module:
    module = nn.Module()
    # not register_parameter, which takes no leaf but nn.Parameter
    module._parameters.update(tensors)  # type: ignore[arg-type]
    return module
