"""InvariantAdamW of a model sharded by FSDP2 in two processes; run as distributed_cases.py is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distributed_cases import batch, refused, sharded, train, trainable, trained
from torch import Tensor, nn
from two_processes import WORLD

import reflora


def loaded_and_lone(model: nn.Module, rank: int = 0, world: int = 1, **options: Any) -> dict[str, Tensor]:
    """InvariantAdamW after AdamW, with a step in which one factor of a pair has no gradient."""
    adamw = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, adamw, range(3), rank, world)
    optimizer = reflora.create_reflora_optimizer(model, reflora.InvariantAdamW, lr=1e-2, **options)
    optimizer.load_state_dict(adamw.state_dict())
    train(model, optimizer, range(3, 5), rank, world)
    tokens, labels = (part.chunk(world)[rank] for part in batch(5))
    nn.functional.cross_entropy(model(tokens), labels).backward()
    pairs = reflora.find_pairs(model)
    pairs[1].A.grad = pairs[2].B.grad = None
    optimizer.step()
    train(model, optimizer, range(6, 8), rank, world)
    return trained(model)


def fsdp2_invariant(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"along r": loaded_and_lone(sharded(False, False), rank, WORLD)}
    found["along n"] = loaded_and_lone(sharded(True, False), rank, WORLD)
    for how, along_n in (("along r", False), ("along n", True)):
        found[f"momentum, {how}"] = loaded_and_lone(sharded(along_n, False), rank, WORLD, moments="momentum")
    # a factor that is not finite: its layer is skipped, its state untouched
    model = sharded(False, False)
    ours = reflora.create_reflora_optimizer(model, reflora.InvariantAdamW, lr=1e-2)
    train(model, ours, range(2), rank, WORLD)
    pair = reflora.find_pairs(model)[1]
    local = pair.B.detach().to_local()  # type: ignore[attr-defined]
    local[0, 0] = torch.nan
    before = {t: {name: value.clone() for name, value in ours.state[t].items()} for t in (pair.A, pair.B)}
    for t in trainable(model):
        t.grad = torch.ones_like(t)
    ours.step()
    same = (value.equal(ours.state[t][name]) for t, own in before.items() for name, value in own.items())
    found["untouched"] = all(map(bool, same))
    refloras = reflora.create_reflora_optimizer(model, lr=1e-2)
    for t in trainable(model):
        t.grad = torch.ones_like(t)
    refloras.step()
    found["refloras state"] = refused(lambda: ours.load_state_dict(refloras.state_dict()))
    found["its own"] = refused(lambda: refloras.load_state_dict(ours.state_dict()))
    by_mean = reflora.create_reflora_optimizer(model, reflora.InvariantAdamW, lr=1e-2, moments="momentum")
    for t in trainable(model):
        t.grad = torch.ones_like(t)
    by_mean.step()
    found["momentum's"] = refused(lambda: ours.load_state_dict(by_mean.state_dict()))
    ours.param_groups[0]["amsgrad"] = True
    found["written amsgrad"] = refused(ours.step)
    options = {"optimizer_cls": reflora.InvariantAdamW, "amsgrad": True}
    found["amsgrad"] = refused(lambda: reflora.create_reflora_optimizer(model, lr=1e-2, **options))
    return found
