"""Hyperparameters of parameter groups: their checks, and the table that the backends read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_flags, check_hypers, check_number, fail
from ..columns import HYPERS, LR, LR_AT, LR_DTYPE
from ..pairs import LoRAPair, PairLike

LR_DTYPES = (torch.float32, torch.float64)


def hyper_table(groups: Sequence[dict[str, Any]], device: torch.device) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(float64 `[groups, HYPERS]` on the CPU, by group the learning rate where it is a tensor on `device`, or None).

    The step itself reads such a tensor: without a sync, and a replayed graph follows a scheduler.
    """
    table = torch.tensor([_row(group) for group in groups], dtype=torch.float64, device="cpu")
    lrs = tuple(_on_device(group["lr"], device) for group in groups)
    for row, lr in zip(table, lrs):
        if lr is not None:
            row[LR_AT], row[LR_DTYPE] = lr.data_ptr(), LR_DTYPES.index(lr.dtype)
    return table, lrs


def _on_device(lr: Any, device: torch.device) -> Tensor | None:
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return None
    if lr.dtype not in LR_DTYPES or lr.numel() != 1:
        fail("lr", "a number, or a float32 or float64 tensor of one element", f"{lr.dtype}, {tuple(lr.shape)}", "")
    return lr.to(device)


def check_group(group: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for an unusable hyperparameter."""
    _row(group)


def check_amsgrad(group: dict[str, Any], params: Iterable[Any], pairs: Iterable[LoRAPair]) -> None:
    """Raises ValueError for a group with factors whose second moments are matrices, which have no maximum."""
    factors = {factor for pair in pairs for factor in (pair.A, pair.B)}
    if group.get("amsgrad") and any(isinstance(p, Tensor) and p in factors for p in params):
        check_no_amsgrad([group])


def check_no_amsgrad(groups: Iterable[dict[str, Any]]) -> None:
    if any(group.get("amsgrad") for group in groups):
        remedy = (
            "Second moments that are matrices have no maximum: set it to False in the group, or in the loaded state."
        )
        fail("amsgrad", "False in a group with LoRA factors", "True", remedy)


def _row(group: dict[str, Any]) -> list[float]:
    eps, decay, betas = group["eps"], group["weight_decay"], group["betas"]
    lr = lr_on_host(group["lr"])
    check_hypers(lr, betas, eps, decay)
    check_flags({name: group[name] for name in ("amsgrad", "maximize")})
    row = [0.0] * HYPERS
    row[: LR_AT - LR] = [lr, *map(float, betas), eps, decay, float(group["amsgrad"]), float(group["maximize"])]
    return row


def lr_on_host(lr: Any) -> float:
    """The learning rate; 0 for one on a device, which only a sync could read."""
    check_number("lr", lr)
    return 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def flatten(params: Iterable[Any], pairs: Iterable[PairLike] | None) -> tuple[Any, Iterable[PairLike]]:
    """Split a bare list of pairs into parameters and pairs; torch alone would read a tuple as (name, parameter)."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params, pairs or []  # torch raises an error of its own
    params = list(params)
    bare = [isinstance(p, LoRAPair) or (isinstance(p, tuple) and all(isinstance(t, Tensor) for t in p)) for p in params]
    if any(bare):
        if not all(bare) or pairs is not None:
            remedy = "Pass parameters as params and pairs as pairs=."
            fail("params", "either parameters or pairs", "both", remedy, TypeError)
        return [t for p in params for t in ((p.A, p.B) if isinstance(p, LoRAPair) else p)], params
    if pairs is None:
        remedy = "Pass pairs=reflora.find_pairs(model), or use reflora.create_reflora_optimizer(model, lr=...)."
        fail("pairs", "the LoRA pairs among the parameters", "None", remedy)
    return params, pairs
