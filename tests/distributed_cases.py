"""Trainings in two processes on gloo, and what they must be equal to: the same ones in one process."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from two_processes import WORLD

import reflora

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {}, "scalar": {"scalar": True}, "interval": {"interval": 3}, "warmup": {"warmup_steps": 2},
    "invariant": {"optimizer_cls": reflora.InvariantAdamW},
    "momentum": {"optimizer_cls": reflora.InvariantAdamW, "metric": "scaled", "moments": "momentum"},
}  # fmt: skip
Training = tuple[nn.Module, torch.optim.Optimizer]
# exactly, not up to rounding
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


class Net(nn.Module):
    """Sizes that two processes cannot share out evenly, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 10)
        self.first, self.second, self.head = nn.Linear(10, 12), nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.embedding(tokens))))).mean(1))


def build(start: bool | str = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = Net().to(dtype)
    targets = ["embedding", "first", "second"]
    config = LoraConfig(r=3, target_modules=targets, modules_to_save=["head"], init_lora_weights=start)
    return get_peft_model(net, config, autocast_adapter_dtype=False)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (8, 5), generator=generator), torch.randint(3, (8,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1) -> None:
    """On this process's share of every batch; the mean of the shares is the whole's."""
    for step in steps:
        tokens, labels = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()


def train_hooked(model: nn.Module, cls: Callable[..., Any], rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """By an optimizer of this class behind GradientHooks."""
    hooks = reflora.GradientHooks(model, warmup_steps=0)
    optimizer = cls(trainable(model), lr=1e-2)
    for step in range(6):
        train(model, optimizer, range(step, step + 1), rank, world)
        hooks.refresh()
    return trained(model)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Trainable weights by name, whole and without the names that wrappers add."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.removeprefix("module.")] = whole.clone()
    return found


def refused(call: Callable[[], Any]) -> str:
    """What is said; nothing if it is served."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return ""


def alone(variant: str, steps: int = 6, start: bool | str = True) -> dict[str, Tensor]:
    model = build(start)
    train(model, reflora.create_reflora_optimizer(model, lr=1e-2, **VARIANTS[variant]), range(steps))
    return trained(model)


def ddp(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    found = {}
    for variant, options in VARIANTS.items():
        model = nn.parallel.DistributedDataParallel(build())
        optimizer = reflora.create_reflora_optimizer(model, lr=1e-2, **options)
        train(model, optimizer, range(6), rank, WORLD)
        found[variant] = trained(model)
    return found


def sharded(placed: bool, start: bool | str = True) -> nn.Module:
    model = build(start)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (WORLD,))}
    if placed:
        options["shard_placement_fn"] = reflora.shard_placement(model, WORLD)
    for name in ("first", "second"):
        fully_shard(model.get_submodule(f"base_model.model.{name}"), **options)
    return fully_shard(model, **options)


def fsdp2(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant, options in VARIANTS.items():
        for placed in (False, True):
            model = sharded(placed)
            optimizer = reflora.create_reflora_optimizer(model, lr=1e-2, **options)
            train(model, optimizer, range(6), rank, WORLD)
            found[f"{variant}, {'along n' if placed else 'along r'}"] = trained(model)
    report = optimizer.diagnostics()  # type: ignore[attr-defined]
    found["report"] = (report.names, report.refactored, report.worst_condition)
    placements = {name: p.placements for name, p in model.named_parameters() if p.requires_grad}
    found["placements"] = {name: [p.dim for p in some] for name, some in placements.items()}
    return found


def stacked_experts() -> list[reflora.LoRAPair]:
    mesh = init_device_mesh("cpu", (WORLD,))
    A, B = (distribute_tensor(torch.randn(shape), mesh, [Shard(1)]) for shape in ((3, 2, 8), (8, 2, 3)))
    return [reflora.LoRAPair("stack", A, B, "experts(3)")]


def fsdp2_refusals(rank: int, folder: Path) -> dict[str, str]:
    model = sharded(False)
    pairs = reflora.find_pairs(model)
    over = reflora.wrap(torch.optim.AdamW)
    experts = [reflora.LoRAPair("experts", pairs[1].A, pairs[1].B, "experts(3)")]
    own = {"optimizer_cls": reflora.InvariantAdamW, "carry_grams": True}
    found = {
        "RefLoRAAdamW": refused(lambda: reflora.RefLoRAAdamW(model.parameters(), pairs=pairs)),
        "InvariantAdamW": refused(lambda: reflora.InvariantAdamW(model.parameters(), pairs=pairs)),
        "refactor_": refused(lambda: reflora.refactor_(pairs)),
        "options": refused(lambda: reflora.create_reflora_optimizer(model, lr=1e-2, carry_grams=True)),
        "options of InvariantAdamW": refused(lambda: reflora.create_reflora_optimizer(model, lr=1e-2, **own)),
        "RiemannianAdamW": refused(lambda: reflora.create_reflora_optimizer(model, reflora.RiemannianAdamW, lr=1e-2)),
        "experts": refused(lambda: over(model.parameters(), pairs=experts)),
        "stacked experts": refused(lambda: over(model.parameters(), pairs=stacked_experts())),
    }
    # a gradient that is not finite in one process is so in all
    optimizer = reflora.create_reflora_optimizer(model, lr=1e-2)
    before = trained(model)
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    if rank == 0:
        pairs[0].B.grad.to_local()[0] = torch.nan  # type: ignore[union-attr]
    optimizer.step()
    found["skipped"] = str(optimizer.skipped_steps)  # type: ignore[attr-defined]
    found["unchanged"] = str(all(torch.equal(a, b) for a, b in zip(before.values(), trained(model).values())))
    return found


def fsdp2_refactorer(rank: int, folder: Path) -> dict[str, list[bool]]:
    """Which layers' gradients the drop-in Refactorer changes where one of them is not finite in one process."""
    model = sharded(True, start="gaussian")
    pairs = reflora.find_pairs(model)
    for pair in pairs:
        pair.B.detach().to_local().normal_()  # type: ignore[attr-defined]
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    if rank == 0:
        pairs[0].A.grad.to_local()[0, 0] = torch.nan  # type: ignore[union-attr]
    before = [pair.B.grad.full_tensor().clone() for pair in pairs]  # type: ignore[union-attr]
    reflora.Refactorer(model).dummy_step()
    after = [pair.B.grad.full_tensor() for pair in pairs]  # type: ignore[union-attr]
    return {"changed": [not torch.equal(a, b) for a, b in zip(before, after)]}


def fsdp1(rank: int, folder: Path) -> dict[str, str]:
    model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=True)
    return {
        "optimizer": refused(lambda: reflora.create_reflora_optimizer(model, lr=1e-2)),
        "Refactorer": refused(lambda: reflora.Refactorer(model)),
        "GradientHooks": refused(lambda: reflora.GradientHooks(model)),
    }


def through_a_checkpoint(
    steps: Callable[..., None], place: Path, first: Training, second: Training
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after six steps of the first, and of the second, which takes over what was saved in the middle."""
    steps(*first, range(3))
    weights, state = get_state_dict(*first)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(place))
    weights, state = get_state_dict(*second)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=str(place))
    set_state_dict(*second, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    steps(*first, range(3, 6))
    steps(*second, range(3, 6))
    return trained(first[0]), trained(second[0])


def fsdp2_checkpoint(rank: int, folder: Path) -> dict[str, Any]:
    found, steps = {}, functools.partial(train, rank=rank, world=WORLD)
    for variant, options in VARIANTS.items():
        models = sharded(True), sharded(True, start="gaussian")
        made = [(model, reflora.create_reflora_optimizer(model, lr=1e-2, **options)) for model in models]
        found[variant] = through_a_checkpoint(steps, folder / variant, *made)
    return found


def fsdp2_after_the_optimizer(rank: int, folder: Path) -> dict[str, Tensor]:
    """What accelerate does: shard the model of an optimizer that exists, and swap its parameters."""
    model = build()
    optimizer = reflora.create_reflora_optimizer(model, reflora.wrap(torch.optim.AdamW), lr=1e-2)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = trainable(model)
    train(model, optimizer, range(6), rank, WORLD)
    return trained(model)


def accelerated(rank: int, folder: Path) -> dict[str, Tensor]:
    """accelerate's DDP, with gradients accumulated over two batches and clipped."""
    environment(rank, 29511)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build()
    model, optimizer = accelerator.prepare(model, reflora.create_reflora_optimizer(model, lr=1e-2))
    for step in range(6):
        with accelerator.accumulate(model):
            tokens, labels = (part.chunk(WORLD)[rank] for part in batch(step))
            accelerator.backward(nn.functional.cross_entropy(model(tokens), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return trained(model)


def example(rank: int, folder: Path) -> dict[str, Any]:
    """examples/fsdp2.py as torchrun starts it: what it prints and what it leaves. It ends the process group."""
    environment(rank, 29514)
    from accelerate.state import AcceleratorState

    path, printed = str(Path(__file__).parents[1] / "examples" / "fsdp2.py"), io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", [path, "15", str(folder)]):
        runpy.run_path(path, run_name="__main__")
    return {"printed": printed.getvalue(), "files": {path.name: path.read_bytes() for path in folder.iterdir()}}


def accumulated_alone(clip: float | None, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    """The same in one process and plain torch."""
    model = build(dtype=dtype)
    optimizer = reflora.create_reflora_optimizer(model, lr=1e-2, **options)
    for step in range(6):
        tokens, labels = batch(step)
        (nn.functional.cross_entropy(model(tokens), labels) / 2).backward()
        if step % 2:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return trained(model)


def deepspeed(rank: int, folder: Path) -> dict[str, Any]:
    """ZeRO-1 and 2 with hooks in front, over two batches a step; and what is refused."""
    environment(rank, 29512)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled; without it goes over gloo

    def engine_of(stage: int, wanted: Any = torch.optim.AdamW, **more: Any) -> Any:
        model = build(dtype=torch.float32)
        optimizer = wanted(trainable(model), lr=1e-2, **more)
        config = {
            "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def steps(engine: Any, count: int, hooks: Any = None) -> None:
        for step in range(count):
            tokens, labels = (part.chunk(WORLD)[rank] for part in batch(step))
            engine.backward(nn.functional.cross_entropy(engine(tokens), labels))
            engine.step()
            if hooks:
                hooks.refresh()

    found: dict[str, Any] = {}
    for stage in (1, 2):
        engine = engine_of(stage, eps=1e-30)
        steps(engine, 6, reflora.GradientHooks(engine.module, follow=False))
        found[f"stage {stage}"] = trained(engine.module)
    found["ZeRO-3"] = refused(lambda: reflora.GradientHooks(engine_of(3).module))
    found["RefLoRAAdamW"] = refused(lambda: steps(engine_of(2, _reflora_over), 2))
    return found


def _reflora_over(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    factors = [p for p in params if p.dim() == 2 and 3 in p.shape][:2]
    return reflora.RefLoRAAdamW(params, pairs=[(factors[0], factors[1])], lr=lr)


def environment(rank: int, port: int) -> None:
    names = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, ACCELERATE_USE_CPU="true")


def fsdp2_hard_shapes(rank: int, folder: Path) -> dict[str, Any]:
    """Ranks and outputs of one: a process holds nothing of them. A bad gradient there; states that cannot be moved."""

    def model_of() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 1, 1), nn.Linear(6, 6)).double()
        peft = get_peft_model(net, LoraConfig(r=1, target_modules=["0", "1", "2"]), autocast_adapter_dtype=False)
        return fully_shard(peft, mesh=init_device_mesh("cpu", (WORLD,)))

    def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()

    found: dict[str, Any] = {}
    for name, options in {"full": {}, "scalar": {"scalar": True}}.items():
        model = model_of()
        optimizer = reflora.create_reflora_optimizer(model, lr=1e-2, **options)
        train_on(model, optimizer, range(3))
        found[name] = all(value.isfinite().all() for value in trained(model).values())
    for pair in reflora.find_pairs(model):
        pair.B.grad.to_local().fill_(torch.nan)  # type: ignore[union-attr]
    optimizer.step()
    found["skipped"] = optimizer.skipped_steps  # type: ignore[attr-defined]

    models = model_of(), model_of()
    made = [(model, reflora.create_reflora_optimizer(model, torch.optim.RMSprop, lr=1e-2)) for model in models]
    whole, resumed = through_a_checkpoint(train_on, folder / "unit", *made)
    found["resumed"] = all(map(torch.equal, whole.values(), resumed.values()))
    return found
