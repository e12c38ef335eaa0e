"""Tensor parallelism under FSDP2, and Megatron's splits; run as distributed_cases.py is, in two processes or four."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_stand_in as megatron
import torch
import torch.distributed as dist
from distributed_cases import refused, trained
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import reflora

TENSOR_PARALLEL = 2
# by name: the class and the options of the optimizer. Phased in gradually, S would not tell in five steps
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (None, {"warmup_steps": 0}), "NAdam": (torch.optim.NAdam, {"warmup_steps": 0}),
    "scalar": (None, {"scalar": True, "warmup_steps": 0}),
    "invariant": (reflora.InvariantAdamW, {}),
    "momentum": (reflora.InvariantAdamW, {"metric": "scaled", "moments": "momentum"}),
}  # fmt: skip
PLAN = {
    "up.base_layer": ColwiseParallel(), "up.lora_B.default": ColwiseParallel(),
    "down.base_layer": RowwiseParallel(), "down.lora_A.default": RowwiseParallel(),
}  # fmt: skip


class Net(nn.Module):
    """Two layers; tensor parallelism cuts the first one's outputs and the second one's inputs."""

    def __init__(self, up: nn.Module, down: nn.Module):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.up, self.down):
            x = layer(x)
            x = torch.tanh(x[0] if isinstance(x, tuple) else x)  # Megatron's give the bias apart
        return x


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """PEFT's LoRA on both layers, every weight random."""
    made = Net(nn.Linear(6, 8, bias=False), nn.Linear(8, 10, bias=False))
    model = inject_adapter_in_model(LoraConfig(r=3, target_modules=["up", "down"]), made).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / 2)
    return model


def train(model: nn.Module, optimizer: Any, part: int = 0, parts: int = 1, steps: int = 5) -> None:
    """On this part of every batch."""
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(step), dtype=dtype)
        x, y = x[:, :6].chunk(parts)[part], y.chunk(parts)[part]
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def alone(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    model, (cls, options) = net(dtype), WAYS[name]
    train(model, reflora.create_reflora_optimizer(model, cls, lr=1e-2, **options))
    return trained(model)


def _cut(rank: int, ways: int, placed: bool) -> tuple[nn.Module, int]:
    """The net, cut over `ways` processes by tensor parallelism and over the others by FSDP2; the share of a batch."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // ways, ways), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(net(), mesh["tp"], PLAN)
    options = {"shard_placement_fn": reflora.shard_placement(model, mesh.size(0))} if placed else {}
    return fully_shard(model, mesh=mesh["dp"], **options), rank // ways


def meshes(rank: int, folder: Path) -> dict[str, Any]:
    """By shape of the mesh and name: FSDP2 over its first dimension, tensor parallelism over its second."""
    world, found = dist.get_world_size(), {}
    for ways in range(1 + world // 4, 3):  # in four processes both dimensions cut
        for name, (cls, options) in WAYS.items():
            for placed in (False, True) if name in ("AdamW", "invariant") else (False,):
                model, part = _cut(rank, ways, placed)
                optimizer = reflora.create_reflora_optimizer(model, cls, lr=1e-2, **options)
                train(model, optimizer, part, world // ways)
                found[f"{world // ways} x {ways}, {'along n' if placed else 'along r'}, {name}"] = trained(model)
    return found


def one_dimension(rank: int, folder: Path) -> dict[str, list[Tensor]]:
    """A mesh whose second dimension alone cuts A. Every process has B, and a summand of its gradient."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // TENSOR_PARALLEL, TENSOR_PARALLEL))
    cut, copies, summands = [Replicate(), Shard(1)], [Replicate(), Replicate()], [Replicate(), Partial()]
    found = {}
    for name, (cls, options) in WAYS.items():
        layer: Any = net().down
        for factor, placed in ((layer.lora_A["default"], cut), (layer.lora_B["default"], copies)):
            factor.weight = nn.Parameter(distribute_tensor(factor.weight.detach(), mesh, placed))
        pair = reflora.find_pairs(layer)[0]
        optimizer = reflora.create_reflora_optimizer(layer, cls, lr=1e-2, **options)
        for step in range(3):
            gA, gB = gradients(step)
            pair.A.grad = distribute_tensor(gA, mesh, cut)
            share = torch.ones_like(gB) if rank % TENSOR_PARALLEL else gB - 1
            pair.B.grad = DTensor.from_local(share, mesh, summands, run_check=False)
            optimizer.step()
        found[name] = [pair.A.detach().full_tensor(), pair.B.detach().full_tensor()]  # type: ignore[attr-defined]
    return found


def gradients(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    gA, gB = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 8), (10, 3)))
    return gA, gB


def one_dimension_alone(name: str) -> list[Tensor]:
    """The same in one process."""
    layer, (cls, options) = net().down, WAYS[name]
    pair = reflora.find_pairs(layer)[0]
    optimizer = reflora.create_reflora_optimizer(layer, cls, lr=1e-2, **options)
    for step in range(3):
        pair.A.grad, pair.B.grad = gradients(step)
        optimizer.step()
    return [pair.A.detach(), pair.B.detach()]


def split() -> nn.Module:
    """`net(torch.float32)` of Megatron's layers with PEFT's LoRA.

    Three faults of PEFT 0.21 are worked around: its dispatcher and its initialisation ask for what is not there, and
    its forward pass takes the outputs of Megatron's layers, which come with their bias, for tensors.
    """
    config, lora = megatron.TransformerConfig(), LoraConfig(r=3, init_lora_weights=False)
    like = {"config": config, "init_method": nn.init.zeros_, "bias": False}
    up = megatron.ColumnParallelLinear(6, 8, **like)
    down = megatron.RowParallelLinear(8, 10, **like, input_is_parallel=True, skip_bias_add=True)
    backend = importlib.import_module("megatron.core.tensor_parallel")
    model = Net(
        *(
            LoraParallelLinear(layer.requires_grad_(False), "default", lora, backend, 3, 8, megatron_config=config)
            for layer in (up, down)
        )
    )
    for factor in (model.up.lora_B["default"], model.down.lora_A["default"]):  # type: ignore[index]
        factor.register_forward_hook(lambda module, given, made: made[0])
    group = megatron.parallel_state.get_tensor_model_parallel_group()
    whole = dict(net(torch.float32).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dim = getattr(parameter, "partition_dim", None)
            value = whole[name]
            parameter.copy_(value if dim is None else value.chunk(group.size(), dim)[group.rank()])
    return model


def joined(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights, whole."""
    group, found = megatron.parallel_state.get_tensor_model_parallel_group(), trained(model)
    for name, parameter in model.named_parameters():
        if name in found and hasattr(parameter, "partition_dim"):
            parts = [torch.empty_like(found[name]) for _ in range(group.size())]
            dist.all_gather(parts, found[name].contiguous(), group=group)
            found[name] = torch.cat(parts, parameter.partition_dim)
    return found


def megatron_splits(rank: int, folder: Path) -> dict[str, Any]:
    """Trainings with every way; the processes beyond two hold the same parts again."""
    megatron.install()
    megatron.parallel_state.initialize_model_parallel(TENSOR_PARALLEL)
    found: dict[str, Any] = {}
    for name, (cls, options) in WAYS.items():
        model = split()
        optimizer = reflora.create_reflora_optimizer(model, cls, lr=1e-2, **options)
        train(model, optimizer)
        found[name] = joined(model)
    found["cut"] = {p.name: (_marked(p.A), _marked(p.B), p.sharded) for p in reflora.find_pairs(model)}
    before = trained(model)
    nn.functional.mse_loss(model(torch.ones(8, 6)), torch.ones(8, 10)).backward()
    if rank == 1:
        reflora.find_pairs(model)[0].B.grad[0, 0] = torch.nan  # type: ignore[index]
    optimizer.step()
    found["skipped"] = optimizer.skipped_steps, all(torch.equal(before[n], t) for n, t in trained(model).items())
    model = split()
    refactorer = reflora.Refactorer(model, use_scalar=True)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    refactorer.integrate_into_optimizer(adamw)
    train(model, adamw)
    found["Refactorer"] = joined(model)
    found["refused"] = _refusals()
    found["asked"] = _unknown_groups()
    return found


def _marked(factor: Tensor) -> int | None:
    return getattr(factor, "partition_dim", None)


def _refusals() -> dict[str, str]:
    """What would take a part for the whole."""
    model = split()
    pairs = reflora.find_pairs(model)
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
    return {
        "RefLoRAAdamW": refused(lambda: reflora.RefLoRAAdamW(model.parameters(), pairs=pairs)),
        "InvariantAdamW": refused(lambda: reflora.InvariantAdamW(model.parameters(), pairs=pairs)),
        "RiemannianAdamW": refused(lambda: reflora.create_reflora_optimizer(model, reflora.RiemannianAdamW, lr=1e-2)),
        "refactor_": refused(lambda: reflora.refactor_(pairs)),
        "precondition_": refused(lambda: reflora.precondition_(pairs)),
        "GradientHooks": refused(lambda: reflora.GradientHooks(model)),
        "Refactorer": refused(lambda: reflora.Refactorer(model).step(torch.optim.SGD(model.parameters(), lr=1.0))),
    }


def _unknown_groups() -> dict[str, str]:
    """Splits over processes that are not known, or along r; and factors that have lost their marks."""
    model = split()
    make = lambda: reflora.create_reflora_optimizer(model, lr=1e-2)  # noqa: E731
    with mock.patch.dict(sys.modules, {"megatron.core.parallel_state": None}):
        found = {"no Megatron": refused(make)}
    with mock.patch.object(megatron.parallel_state, "group", None):
        found["not initialised"] = refused(make)
    pair = reflora.find_pairs(model)[0]
    pair.B.allreduce = False  # type: ignore[attr-defined]
    found["experts"] = refused(make)
    pair.B.allreduce, pair.B.partition_dim = True, 1  # type: ignore[attr-defined]
    found["along r"] = refused(make)
    factor: Any = model.up.lora_B["default"]  # type: ignore[index, union-attr]
    factor.weight = nn.Parameter(factor.weight.detach().clone())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reflora.find_pairs(model)
    found["without marks"] = str(caught[0].message)
    return found


def refactored_alone() -> dict[str, Tensor]:
    model = net(torch.float32)
    refactorer = reflora.Refactorer(model, use_scalar=True)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    refactorer.integrate_into_optimizer(adamw)
    train(model, adamw)
    return trained(model)
