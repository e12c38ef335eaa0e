"""transformers' Trainer: one that trains with a Refactorer, and a callback that logs what RefLoRA does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .. import columns as col
from ..checks import fail
from ..columns import SKIPPED
from ..diagnostics import Diagnostics
from .dropin import Refactorer


class RefTrainer(Trainer):
    """`transformers.Trainer` whose optimizer the `refactorer` is integrated into; None trains plain LoRA."""

    def __init__(self, *args: Any, refactorer: Refactorer | None = None, **kwargs: Any) -> None:
        self.refactorer = refactorer
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's own, of transformers 4 (no argument) and 5 (`model=None`)."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.refactorer is not None and not self.refactorer.integrated_into(optimizer):
            self.refactorer.integrate_into_optimizer(optimizer)
        return optimizer


class RefLoRACallback(TrainerCallback):
    """Adds to a Trainer's logs the worst balance and condition number, and how many layers are degenerate or skipped.

    `RefLoRACallback().install(trainer)` puts it in front of the reporters (TensorBoard, W&B), which then see the
    figures; `callbacks=[RefLoRACallback()]` puts it behind them, and the figures only in `state.log_history`.
    Keys: "reflora/balance", "reflora/condition", "reflora/degenerate" of the last step, "reflora/skipped" layers since
    the last log: all of them for a step that was skipped whole. Nothing is read from the device between logs. Values
    that are not finite, such as the condition number of B = 0, are left out: JSON has no word for them.

    Args:
        source: Anything with `diagnostics()`; by default the trainer's optimizer. `install` finds a RefTrainer's
            Refactorer; with `callbacks=`, pass it here.
    """

    def __init__(self, source: Any = None) -> None:
        self.source = source
        self._skipped: list[Tensor] = []
        self._seen: list[Tensor] = []

    def install(self, trainer: Trainer) -> RefLoRACallback:
        trainer.callback_handler.callbacks.insert(0, self)
        if self.source is None:
            self.source = getattr(trainer, "refactorer", None)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError where nothing with diagnostics() is found."""
        self._skipped = []
        self._report(kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tables = self._report(kwargs.get("optimizer")).tables
        for table in tables:
            if all(table is not old for old in self._seen):  # with an interval, steps in between keep the last
                self._skipped.append((table[:, col.STATUS] == SKIPPED).sum())
        self._seen = tables
        if len(self._skipped) > 64:
            self._skipped = [torch.stack([one.cpu() for one in self._skipped]).sum()]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.source is None and kwargs.get("optimizer") is None:
            return  # an evaluation before training
        report = self._report(kwargs.get("optimizer"))
        if not report.names:
            return
        found = {
            "reflora/balance": report.worst_balance,
            "reflora/condition": report.worst_condition,
            "reflora/degenerate": report.degenerate,
            "reflora/skipped": sum(map(int, self._skipped)),
        }
        found = {name: value for name, value in found.items() if math.isfinite(value)}
        self._skipped = []
        for place in (logs, state.log_history[-1] if state.log_history else None):
            if place is not None:
                place.update(found)

    def _report(self, optimizer: Any) -> Diagnostics:
        source = self.source
        while source is None and optimizer is not None:
            if hasattr(optimizer, "diagnostics"):
                source = optimizer
            optimizer = getattr(optimizer, "optimizer", None)  # accelerate's wrapper
        if source is None:
            remedy = "Pass optimizers=(reflora.create_reflora_optimizer(...), None), or RefLoRACallback(refactorer)."
            fail("RefLoRACallback", "an optimizer with diagnostics()", "none", remedy)
        return source.diagnostics()
