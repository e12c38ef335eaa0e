"""Several methods training one model in turns: their times, losses and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import harness, methods, probes, variants
from .models import Loaded

FAILURES = (Exception,)  # of one method, whatever it raises: shown in its line, and the others go on


@dataclass
class Runner:
    """One method with its parameters, their places in its model, its optimizer and what was measured of it.

    Of one that could not be built all but the name and the failure is empty.
    """

    name: str
    timer: harness.StreamTimer
    places: variants.Trainables | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
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
        made = Runner(name, harness.StreamTimer(self.device))
        try:
            made.places, subject = self.subject(name, self.setting)
            made.parameters = list(subject.parameters)
            made.optimizer = methods.build(name, subject)
        except FAILURES as error:
            self._fail(made, f"start: {_first_words(error)}")
        return made

    def backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> Tensor:
        """Gradients of batch `index`, new ones; returns the loss."""
        optimizer.zero_grad(set_to_none=True)
        loss = variants.forward_of(model)(**self.feed[index]).loss
        loss.backward()
        return loss.detach()

    def block(self, runner: Runner, first: int, size: int, timed: bool) -> None:
        """`size` training iterations from batch `first`; the device is drained only at both ends."""
        if runner.failure:
            return
        assert runner.places is not None and runner.optimizer is not None
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
            self._fail(runner, f"step {len(runner.losses)}: {_first_words(error)}")
            return
        steps = runner.timer.read()
        runner.optimizer.zero_grad(set_to_none=True)  # the others need the room
        if timed:
            runner.iteration.append(watch.seconds / size)
            runner.step.append(sum(steps) / size)

    def _fail(self, runner: Runner, failure: str) -> None:
        """Out, with all that it holds."""
        runner.failure = failure
        for parameter in runner.parameters:
            parameter.grad = None
        runner.parameters, runner.optimizer, runner.places = [], None, None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self, name: str) -> Footprint | None:
        """Of a method alone, refactoring from its first step on; None where it fails.

        Factors that start at zero are drawn, for there the published loops would compute nothing.
        """
        try:
            places, subject = self.subject(name, replace(self.setting, warmup_steps=0))
        except FAILURES:
            return None
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
        if self.device.type == "cuda":
            probes.warm_libraries(self.device)
            self.memory(names[0])  # workspaces that stay would count for the first method alone
        turns = harness.progress(range(len(names)), "memory")
        return {names[turn]: self.memory(names[turn]) for turn in turns}


def train(bench: Bench, names: Sequence[str], steps: int, untimed: int, block: int) -> list[Runner]:
    """Every method over `steps` batches in turns; those from `untimed` on are timed."""
    runners = {name: bench.runner(name) for name in names}

    def case(runner: Runner) -> Callable[[int], None]:
        return lambda turn: bench.block(runner, turn * block, block, turn * block >= untimed)

    harness.interleave({name: case(runner) for name, runner in runners.items()}, steps // block, "training")
    for runner in runners.values():
        bad = [step for step, loss in enumerate(runner.losses, 1) if not loss.isfinite()]
        if bad and not runner.failure:
            runner.failure = f"step {bad[0]}: the loss is not finite"
    return list(runners.values())


def _first_words(error: BaseException) -> str:
    return str(error).partition("(")[0].partition("\n")[0][:60].strip()
