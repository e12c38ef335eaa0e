"""Tensor parallelism and ZeroRedundancyOptimizer in two processes; run as distributed_cases.py is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import build, environment, refused, train, train_hooked, trainable, trained
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, distribute_tensor
from two_processes import WORLD

import reflora
from reflora.pairs import is_sharded

TOKENS = torch.arange(24).view(2, 12)
# by name: the class and the options of the optimizer
TENSOR_PARALLEL: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (None, {"warmup_steps": 0}), "NAdam": (torch.optim.NAdam, {"warmup_steps": 0}),
    "scalar": (None, {"scalar": True, "warmup_steps": 0}),
    "invariant": (reflora.InvariantAdamW, {}),
}  # fmt: skip


def causal(folder: Path | None = None, **loading: Any) -> nn.Module:
    """PEFT's LoRA on a LLaMA of two small layers, both factors random."""
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**size, vocab_size=64, num_key_value_heads=2)
    base = transformers.LlamaForCausalLM(config)
    if folder is not None:
        if dist.get_rank() == 0:
            base.save_pretrained(str(folder))
        dist.barrier()
        base = transformers.LlamaForCausalLM.from_pretrained(str(folder), **loading)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]))
    for name, module in model.named_modules():
        if ".lora_A." in name:
            # in row-parallel layers PEFT 0.21 leaves the width of a part, from which transformers 5.23 cuts the input
            module.in_features = module.weight.shape[1]  # type: ignore[assignment, index, union-attr]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                value = torch.randn(parameter.shape, generator=generator) / 10
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)
    return model


def train_causal(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> dict[str, Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return trained(model)


def tensor_parallel(rank: int, folder: Path) -> dict[str, Any]:
    """transformers' own, `tp_plan="auto"`."""
    environment(rank, 29513)
    found: dict[str, Any] = {}
    for name, (cls, options) in TENSOR_PARALLEL.items():
        model = causal(folder, tp_plan="auto")
        found["cut"] = {pair.name: [is_sharded(pair.A), is_sharded(pair.B)] for pair in reflora.find_pairs(model)}
        found[name] = train_causal(model, reflora.create_reflora_optimizer(model, cls, lr=1e-2, **options))
    model = causal(folder, tp_plan="auto")
    found["refused"] = {
        "GradientHooks": refused(lambda: reflora.GradientHooks(model)),
        "RefLoRAAdamW": refused(lambda: reflora.RefLoRAAdamW(model.parameters(), pairs=reflora.find_pairs(model))),
    }
    optimizer = reflora.create_reflora_optimizer(model, lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    before, pair = trained(model), next(p for p in reflora.find_pairs(model) if "q_proj" in p.name)
    if rank == 1:
        pair.B.grad.to_local()[0, 0] = torch.nan  # type: ignore[union-attr]
    optimizer.step()
    found["skipped"] = optimizer.skipped_steps, all(torch.equal(before[n], t) for n, t in trained(model).items())  # type: ignore[attr-defined]
    return found


def zero_redundancy(rank: int, folder: Path) -> dict[str, Any]:
    """torch's ZeroRedundancyOptimizer: GradientHooks serve it; around a RefLoRA optimizer it parts the pairs."""
    over_adamw = functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    model = nn.parallel.DistributedDataParallel(build("gaussian"))
    found: dict[str, Any] = {"hooks": train_hooked(model, over_adamw, rank, WORLD)}
    for name, cls in (("wrap", reflora.wrap(torch.optim.AdamW)), ("RefLoRAAdamW", reflora.RefLoRAAdamW)):
        model = nn.parallel.DistributedDataParallel(build("gaussian"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zero = ZeroRedundancyOptimizer(trainable(model), cls, lr=1e-2, pairs=reflora.find_pairs(model))
            error = refused(lambda zero=zero, model=model: train(model, zero, range(1), rank, WORLD))  # type: ignore[misc]
        found[name] = [error, *(str(one.message) for one in caught if "LoRA" in str(one.message))]
    return found


class Stage(nn.Module):
    """Half of a network whose linear layers have LoRA, both factors random."""

    def __init__(self, rank: int):
        super().__init__()
        torch.manual_seed(rank)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()).double()
        inject_adapter_in_model(LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights="gaussian"), self.layers)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def rows(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


# by name, what steps a stage: the hooks' refresh is its last part
PIPELINES: dict[str, Callable[[nn.Module], list[Callable[[], Any]]]] = {
    "RefLoRAAdamW": lambda model: [reflora.create_reflora_optimizer(model, lr=1e-2).step],
    "wrap(NAdam)": lambda model: [reflora.create_reflora_optimizer(model, torch.optim.NAdam, lr=1e-2).step],
    "GradientHooks": lambda model: [
        torch.optim.AdamW(trainable(model), lr=1e-2).step, reflora.GradientHooks(model, warmup_steps=0).refresh,
    ],
}  # fmt: skip


def stepped(model: nn.Module, parts: list[Callable[[], Any]]) -> None:
    for part in parts:
        part()
    model.zero_grad()


def pipeline(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Two stages with an optimizer each, and four microbatches a step."""
    found = {}
    for name, make in PIPELINES.items():
        stage = Stage(rank)
        parts = make(stage)
        schedule = ScheduleGPipe(PipelineStage(stage, rank, WORLD, torch.device("cpu")), 4, loss_fn=squares)
        for step in range(4):
            schedule.step(*([rows(step)] if rank == 0 else []), **({"target": rows(step + 9)} if rank else {}))
            stepped(stage, parts)
        found[name] = trained(stage)
    return found


def pipeline_alone(name: str) -> list[dict[str, Tensor]]:
    """Both stages in one process, with one optimizer, and the microbatches one after another."""
    model = nn.ModuleList(Stage(rank) for rank in range(WORLD))
    parts = PIPELINES[name](model)
    for step in range(4):
        for x, y in zip(rows(step).chunk(4), rows(step + 9).chunk(4)):
            (squares(model[1](model[0](x)), y) / 4).backward()
        stepped(model, parts)
    return [trained(stage) for stage in model]
