"""Several methods training one model in turns: their times, losses and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import harness, methods, models


@dataclass
class Runner:
    """One method with its parameters, its optimizer and what was measured of it."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    timer: harness.StreamTimer
    iteration: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    failure: str | None = None


class Bench:
    """A model, its batches and the methods that take turns in it."""

    def __init__(
        self, loaded: models.Loaded, feed: list[dict[str, Tensor]], setting: methods.Setting, device: torch.device
    ):
        self.model, self.feed, self.setting, self.device = loaded.model, feed, setting, device
        self.places = methods.Trainables(loaded.model, models.lora_pairs(loaded.model))
        self.model.train()

    def runner(
        self, name: str, start: Sequence[Tensor] | None = None, setting: methods.Setting | None = None
    ) -> Runner:
        """A method that begins at `start`, or at the values that the model came with."""
        parameters = [nn.Parameter(p.detach().clone()) for p in start] if start else self.places.copies()
        pairs = self.places.pairs(parameters)
        optimizer = methods.build(name, parameters, pairs, setting or self.setting)
        return Runner(name, parameters, optimizer, harness.StreamTimer(self.device))

    def backward(self, runner: Runner, index: int) -> None:
        """Loss and gradients of batch `index`."""
        runner.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**self.feed[index]).loss
        loss.backward()
        runner.losses.append(loss.detach())

    def block(self, runner: Runner, first: int, size: int, timed: bool) -> None:
        """`size` training iterations from batch `first`; the device is drained only at both ends."""
        if runner.failure:
            return
        self.places.install(runner.parameters)
        torch.manual_seed(first)
        try:
            with harness.Stopwatch(self.device) as watch:
                for index in range(first, first + size):
                    self.backward(runner, index)
                    runner.timer.start()
                    runner.optimizer.step()
                    runner.timer.stop()
        except torch.linalg.LinAlgError as error:
            runner.failure = f"step {len(runner.losses)}: {str(error).partition('(')[0]}"
            return
        steps = runner.timer.read()
        if timed:
            runner.iteration.append(watch.seconds / size)
            runner.step.append(sum(steps) / size)

    def memory(self, name: str, start: Sequence[Tensor]) -> tuple[int, int] | None:
        """Peak bytes of two iterations and of one further optimizer step, alone, refactoring from the first step on."""
        setting = methods.Setting(self.setting.lr, 0, self.setting.weight_decay, self.setting.backend)
        runner = self.runner(name, start, setting)
        self.places.install(runner.parameters)

        def iterations() -> None:
            for index in range(2):
                self.backward(runner, index)
                runner.optimizer.step()

        try:
            whole = harness.peak_bytes(iterations, self.device)
            step = harness.peak_bytes(runner.optimizer.step, self.device, before=lambda: self.backward(runner, 0))
        except torch.linalg.LinAlgError:
            return None
        return whole, step


def train(bench: Bench, names: Sequence[str], steps: int, untimed: int, block: int) -> list[Runner]:
    """Every method over `steps` batches in turns; those from `untimed` on are timed."""
    runners = {name: bench.runner(name) for name in names}

    def case(runner: Runner) -> Callable[[int], None]:
        return lambda turn: bench.block(runner, turn * block, block, turn * block >= untimed)

    harness.interleave({name: case(runner) for name, runner in runners.items()}, steps // block, "training")
    return list(runners.values())
