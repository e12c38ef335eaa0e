"""PEFT's own optimizers: Riemannian, LoRA+, LoRA-FA, and AdaLoRA's schedule of ranks behind AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Pairs = Sequence[tuple[Tensor, Tensor]]
LORAPLUS_RATIO = 16.0  # of B's learning rate to A's: the authors' (arXiv 2402.12354)


def riemannian(parameters: Sequence[Tensor], pairs: Pairs, **options: Any) -> Optimizer:
    """torch's fused AdamW behind PEFT's preconditioner of `pairs`; the rest of `parameters` gets AdamW alone.

    Raises ImportError where peft is missing or older than its Riemannian optimizer.
    """
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(_tree(parameters, pairs), AdamW, fused=True, **options)


def loraplus(parameters: Sequence[Tensor], pairs: Pairs, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    """Fused AdamW with LORAPLUS_RATIO times the learning rate for B; PEFT gives vectors of the rest that rate too.

    Everything decays, biases too, as under the other methods here.
    """
    from peft.optimizers import create_loraplus_optimizer

    decay = {"loraplus_weight_decay": weight_decay}
    ratio = {"loraplus_lr_ratio": LORAPLUS_RATIO}
    return create_loraplus_optimizer(_tree(parameters, pairs), AdamW, fused=True, **ratio, **decay, **options)


def lorafa(model: nn.Module, **options: Any) -> Optimizer:
    """A frozen from here on, B by the gradient that comes closest to the full one (arXiv 2308.03303)."""
    from peft.optimizers import create_lorafa_optimizer

    config: Any = model.peft_config["default"]
    return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, **options)


def forget_ranks(model: Any) -> None:
    """What AdaLoRA's allocator keeps in the model, which may have served another optimizer before."""
    model.base_model.rankallocator.reset_ipt()
    model.peft_config["default"].rank_pattern = None


def adalora(model: Any, parameters: Sequence[Tensor], **options: Any) -> Optimizer:
    """Fused AdamW, and after each step AdaLoRA's budget of ranks (arXiv 2303.10512), which reads the gradients."""
    optimizer = AdamW(parameters, fused=True, **options)
    count = 0

    def allocate(*_: object) -> None:
        nonlocal count
        model.base_model.update_and_allocate(count)
        count += 1

    optimizer.register_step_post_hook(allocate)
    return optimizer


def _tree(parameters: Sequence[Tensor], pairs: Pairs) -> nn.Module:
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
    module._parameters.update(tensors)
    return module
