"""The tables that benchmark programs write, read back, and a GPU for their timing where there is none."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def medians(path: Path, *columns: str) -> dict[tuple[str, ...], float]:
    """By what stands in these columns."""
    return {tuple(row[column] for column in columns): float(row["p50"]) for row in rows_of(path)}


class PretendedEvent:
    """A CUDA event on a machine without CUDA: two seconds pass between any two."""

    clock = itertools.count(step=2000)

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = next(self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: PretendedEvent) -> float:
        return float(later.time - self.time)


class PretendedGpu(TorchFunctionMode):
    """Whatever is made on the GPU is made on the CPU; of `torch.cuda` there is what every program asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        generator = torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda *_: generator())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
        monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        here = ["cpu" if isinstance(a, torch.device) else a for a in args]
        return func(*here, **{k: "cpu" if k == "device" else v for k, v in (kwargs or {}).items()})
