"""A transformers Trainer that trains with a Refactorer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

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
