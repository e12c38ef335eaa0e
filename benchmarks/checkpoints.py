"""A training that was stopped goes on where it was: weights, optimizer, schedule and random numbers in one file."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Trained:
    """A model in training or after it, with the loss of every step and the seconds they took."""

    model: nn.Module
    tokenizer: Any
    kind: str
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    device: torch.device
    pairs: list[tuple[Tensor, Tensor]]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether every loss and every trainable weight is."""
        weights = (p for p in self.model.parameters() if p.requires_grad)
        return all(map(math.isfinite, self.losses)) and all(bool(p.isfinite().all()) for p in weights)


@dataclass(frozen=True)
class Checkpoint:
    """The file `path`, written whole or not at all, every `interval` steps and after the last one."""

    path: Path
    interval: int

    def due(self, step: int, steps: int) -> bool:
        return step % self.interval == 0 or step == steps

    def save(self, run: Trained) -> None:
        device = run.device
        content = {
            "weights": _trainable(run),
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "losses": run.losses,
            "seconds": run.seconds,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        with new.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def load(self, run: Trained) -> None:
        """Into a run as it is before its first step; nothing where there is no file.

        Raises ValueError for a file that is not of this run's weights.
        """
        if not self.path.exists():
            return
        try:
            content: dict[str, Any] = torch.load(self.path, map_location=run.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path}: expected a checkpoint, got a damaged file. Remove it.") from error
        own, stored = _trainable(run), content["weights"]
        if {name: w.shape for name, w in own.items()} != {name: w.shape for name, w in stored.items()}:
            raise ValueError(f"{self.path}: expected the trainable weights of this run, got others. Remove the file.")
        for name, weight in own.items():
            weight.copy_(stored[name])
        run.optimizer.load_state_dict(content["optimizer"])
        run.schedule.load_state_dict(content["schedule"])
        torch.set_rng_state(content["random"].cpu())
        if content["random_cuda"] is not None:
            torch.cuda.set_rng_state(content["random_cuda"].cpu(), run.device)
        run.losses[:], run.seconds = content["losses"], content["seconds"]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this program writes into it. Raises BlockingIOError, an OSError, where another one does."""
    try:
        import fcntl
    except ImportError:  # no POSIX system: on trust
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder}: another program makes this run. Wait, or choose another --out."
            ) from error
        yield


def _trainable(run: Trained) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
