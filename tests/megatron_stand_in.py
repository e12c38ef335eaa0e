"""A stand-in for megatron-core 0.20.0, which needs CUDA: what PEFT's LoraParallelLinear and reflora use of it.

The layers mark, cut and communicate as megatron/core/tensor_parallel/layers.py does, without its fusions, sequence
parallelism and random-number trackers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class TransformerConfig:
    num_layers: int = 1
    params_dtype: torch.dtype = torch.float32


class ParallelState(ModuleType):
    """`megatron.core.parallel_state`, of which one group is known."""

    group: dist.ProcessGroup | None = None

    def initialize_model_parallel(self, tensor_model_parallel_size: int) -> None:
        """Groups of neighbours, as Megatron's."""
        size = tensor_model_parallel_size
        for first in range(0, dist.get_world_size(), size):
            made = dist.new_group(list(range(first, first + size)))
            if first <= dist.get_rank() < first + size:
                self.group = made

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        assert self.group is not None, "tensor model parallel group is not initialized"
        return self.group


parallel_state = ParallelState("megatron.core.parallel_state")


class _Copied(torch.autograd.Function):
    """The input in every process; its gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        return grad


class _Reduced(torch.autograd.Function):
    """The sum over the processes; each has its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _marked(shape: tuple[int, int], dim: int, init_method: Callable[[Tensor], Any], dtype: torch.dtype) -> nn.Parameter:
    """This process's part of a weight that is drawn whole."""
    group = parallel_state.get_tensor_model_parallel_group()
    whole = torch.empty(shape)
    init_method(whole)
    weight: Any = nn.Parameter(whole.chunk(group.size(), dim)[group.rank()].to(dtype).clone())
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1
    weight.allreduce = True
    return weight


class ColumnParallelLinear(nn.Module):
    """Weight `[output_size / processes, input_size]`; returns the output and a bias to be added, here None."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable[[Tensor], Any],
        bias: bool = True, gather_output: bool = False,
    ):  # fmt: skip
        super().__init__()
        assert not bias and not gather_output
        self.input_size, self.output_size, self.gather_output = input_size, output_size, gather_output
        self.weight = _marked((output_size, input_size), 0, init_method, config.params_dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(_Copied.apply(x), self.weight), None


class RowParallelLinear(nn.Module):
    """Weight `[output_size, input_size / processes]`; its input is cut already."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable[[Tensor], Any],
        bias: bool, input_is_parallel: bool, skip_bias_add: bool,
    ):  # fmt: skip
        super().__init__()
        assert not bias and input_is_parallel
        self.input_size, self.output_size, self.input_is_parallel = input_size, output_size, input_is_parallel
        self.weight = _marked((output_size, input_size), 1, init_method, config.params_dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _Reduced.apply(nn.functional.linear(x, self.weight)), None


def installed() -> dict[str, ModuleType]:
    """Entries for sys.modules."""
    names = ("tensor_parallel", "transformer", "transformer.transformer_config")
    found: dict[str, Any] = {name: ModuleType(name) for name in ("megatron", "megatron.core")}
    found.update({f"megatron.core.{name}": ModuleType(f"megatron.core.{name}") for name in names})
    found["megatron.core.parallel_state"] = parallel_state
    for name, module in found.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(found[above], last, module)
    found["megatron.core.tensor_parallel"].ColumnParallelLinear = ColumnParallelLinear
    found["megatron.core.tensor_parallel"].RowParallelLinear = RowParallelLinear
    found["megatron.core.transformer.transformer_config"].TransformerConfig = TransformerConfig
    return found


def install() -> None:
    sys.modules.update(installed())
