"""Several methods training one model in turns: their times, losses and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import harness, methods, probes, variants
from .models import Loaded

FAILURES = (torch.linalg.LinAlgError, torch.OutOfMemoryError)  # of a method, not of the benchmark


@dataclass
class Runner:
    """One method with its parameters, their places in its model, its optimizer and what was measured of it."""

    name: str
    places: variants.Trainables
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    timer: harness.StreamTimer
    iteration: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Footprint:
    """Bytes: peak of two training iterations, what the optimizer keeps after them, and the peak of one more step."""

    peak: int
    state: int
    temporaries: int


class Bench:
    """A model, its batches and the methods that take turns in it. `variants` share the frozen weights."""

    def __init__(
        self,
        loaded: Loaded,
        adapter: variants.Adapter,
        feed: list[dict[str, Tensor]],
        setting: methods.Setting,
        device: torch.device,
    ):
        self.loaded, self.adapter, self.feed, self.setting, self.device = loaded, adapter, feed, setting, device
        self._places: dict[str, variants.Trainables] = {}

    def places(self, variant: str) -> variants.Trainables:
        """The trainable places of a variant of the model, built when it is first asked for."""
        if variant not in self._places:
            model = variants.build(variant, self.loaded, self.adapter)
            self._places[variant] = variants.Trainables(model.train())
        return self._places[variant]

    def subject(self, name: str, setting: methods.Setting) -> tuple[variants.Trainables, methods.Subject]:
        """New parameters of a method, installed in its model, at the values that the method starts from."""
        method = methods.METHODS[name]
        places = self.places(method.variant)
        parameters = places.copies()
        places.install(parameters)
        subject = methods.Subject(parameters, places.pairs(parameters), setting, places.model)
        if method.start:
            method.start(subject)
        return places, subject

    def runner(self, name: str) -> Runner:
        places, subject = self.subject(name, self.setting)
        return Runner(
            name, places, list(subject.parameters), methods.build(name, subject), harness.StreamTimer(self.device)
        )

    def backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> Tensor:
        """Gradients of batch `index`, new ones; returns the loss."""
        optimizer.zero_grad(set_to_none=True)
        loss = model(**self.feed[index]).loss
        loss.backward()
        return loss.detach()

    def block(self, runner: Runner, first: int, size: int, timed: bool) -> None:
        """`size` training iterations from batch `first`; the device is drained only at both ends."""
        if runner.failure:
            return
        runner.places.install(runner.parameters)
        torch.manual_seed(first)
        try:
            with harness.Stopwatch(self.device) as watch:
                for index in range(first, first + size):
                    runner.losses.append(self.backward(runner.places.model, runner.optimizer, index))
                    runner.timer.start()
                    runner.optimizer.step()
                    runner.timer.stop()
        except FAILURES as error:
            runner.optimizer.zero_grad(set_to_none=True)
            runner.failure = f"step {len(runner.losses)}: {str(error).partition('(')[0][:60].strip()}"
            return
        steps = runner.timer.read()
        if timed:
            runner.iteration.append(watch.seconds / size)
            runner.step.append(sum(steps) / size)

    def memory(self, name: str) -> Footprint | None:
        """Of a method alone, refactoring from its first step on; None where it fails.

        Factors that start at zero are drawn, for there the published loops would compute nothing.
        """
        places, subject = self.subject(name, replace(self.setting, warmup_steps=0))
        with torch.no_grad():
            for factor in (factor for pair in subject.pairs for factor in pair if not factor.any()):
                factor.normal_(std=1e-2)
        made: list[torch.optim.Optimizer] = []

        def training() -> None:
            made.append(methods.build(name, subject))
            for index in range(2):
                self.backward(places.model, made[0], index)
                made[0].step()
            made[0].zero_grad(set_to_none=True)

        try:
            whole = probes.memory(training, self.device)
            step = probes.memory(
                lambda: made[0].step(), self.device, before=lambda: self.backward(places.model, made[0], 0)
            )
        except FAILURES:
            return None
        return Footprint(whole.peak, whole.kept, step.peak)

    def footprints(self, names: Sequence[str]) -> dict[str, Footprint | None]:
        """`memory` of every method, with a progress bar."""
        turns = harness.progress(range(len(names)), "memory")
        return {names[turn]: self.memory(names[turn]) for turn in turns}


def train(bench: Bench, names: Sequence[str], steps: int, untimed: int, block: int) -> list[Runner]:
    """Every method over `steps` batches in turns; those from `untimed` on are timed."""
    runners = {name: bench.runner(name) for name in names}

    def case(runner: Runner) -> Callable[[int], None]:
        return lambda turn: bench.block(runner, turn * block, block, turn * block >= untimed)

    harness.interleave({name: case(runner) for name, runner in runners.items()}, steps // block, "training")
    return list(runners.values())
