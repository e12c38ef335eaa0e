"""Timing the steps of several methods on the same pairs; `step` says in which ways, and what becomes of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import harness, methods, probes, shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
FAST = ("lora", "lora+", "reflora", "reflora-carried", "reflora-s")
# the others decompose matrices by torch: seconds a step on the llama shapes, on a CPU minutes a round
SLOW = tuple(name for name in methods.BARE if name not in FAST)
COPY = "copy"


class Stepper:
    """One method on pairs of its own; `times[kind][round]` in seconds, of the counted rounds, by kind of timing."""

    def __init__(
        self, name: str, pairs: Sequence[tuple[Tensor, Tensor]], setting: methods.Setting, device: torch.device
    ):
        self.name, self.device = name, device
        own = [(_own(A), _own(B)) for A, B in pairs]
        self.parameters = [factor for pair in own for factor in pair]
        self.times: dict[str, dict[int, float]] = {"gpu": {}, "wall": {}, "host": {}}
        self.stride = 1
        self.overtaken = 0
        self.failure: str | None = None
        self.kept: int | None = None
        self.last = 0.0
        self._host = 5e-3
        live = probes.allocated(self.device)
        self.optimizer = methods.build(name, methods.Subject(self.parameters, own, setting))
        self._built = _difference(probes.allocated(self.device), live)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

    def first(self) -> None:
        """The step that makes the state, untimed: `kept` becomes the bytes it leaves behind."""
        live = probes.allocated(self.device)
        self.optimizer.step()
        made = _difference(probes.allocated(self.device), live)
        self.kept = None if made is None or self._built is None else made + self._built

    def wall(self, turn: int) -> None:
        with harness.Stopwatch(self.device) as watch:
            self.optimizer.step()
        self.last, self._host = watch.seconds, watch.host
        self.times["wall"][turn] = watch.seconds
        if self.device.type == "cuda":
            self.times["host"][turn] = watch.host

    def gpu(self, turn: int, copies: probes.Copies) -> None:
        timer = harness.StreamTimer(self.device)
        copies.fill(1.5 * self._host)
        timer.start()
        self.optimizer.step()
        timer.stop()
        self.overtaken += timer.overtaken()
        self.times["gpu"][turn] = timer.read()[0]

    def begin(self, rounds: int, seconds: float) -> None:
        """Drop the times of the warm-up, and sit out as many of the `rounds` to come as `seconds` are too few for."""
        each = sum(min(self.times[kind].values(), default=0.0) for kind in ("wall", "gpu"))
        self.stride = _stride(rounds, seconds / max(each, 1e-9))
        for times in self.times.values():
            times.clear()
        self.overtaken = 0


def _own(factor: Tensor) -> Tensor:
    return nn.Parameter(factor.detach().clone())


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


# ---- measuring


@dataclass
class Run:
    """What one case gave: its methods, the copies of its rounds, and how the CSV calls it."""

    case: str
    steppers: list[Stepper]
    copies: probes.Copies | None
    draw: list[Tensor]

    @property
    def failures(self) -> list[str]:
        return [f"{methods.LABELS[s.name]}, {self.case}: failed: {s.failure}" for s in self.steppers if s.failure]

    @property
    def sound(self) -> bool:
        """Whether none failed but those of which it is known (the published loop) or that is not ours to mend."""
        return not any(stepper.failure and stepper.name not in SLOW for stepper in self.steppers)


def measure(
    options: argparse.Namespace,
    case: str,
    layers: Sequence[tuple[int, int]],
    rank: int,
    names: Sequence[str],
    caches: str = "cold",
) -> Run:
    """All methods on pairs of `layers` at `rank`; a method that fails is out, and says why."""
    device, cold = options.device, caches == "cold"
    pairs = shapes.random_pairs(layers, rank, DTYPES[options.dtype], device)
    generator = torch.Generator(device).manual_seed(0)
    factors = [factor for pair in pairs for factor in pair]
    draws = [[gradient(factor, generator) for factor in factors] for _ in range(2)]
    copies = probes.Copies(device, options.copy_mib) if cold else None
    setting = methods.Setting(lr=1e-4, warmup_steps=0, backend=options.backend)
    probes.warm_libraries(device)
    steppers = [Stepper(name, pairs, setting, device) for name in names]

    def call(stepper: Stepper, kind: str, warming: bool) -> Callable[[int], None]:
        def turn_of(turn: int) -> None:
            slow = warming and turn > 1 and stepper.last > 0.02 * options.seconds
            if stepper.failure or slow or turn % stepper.stride:
                return
            try:
                stepper.set_gradients(draws[turn % len(draws)])
                if stepper.kept is None and warming and turn == 0 and kind == "wall":
                    stepper.first()
                    stepper.set_gradients(draws[0])
                if copies:
                    copies.fill()
                if kind == "wall":
                    stepper.wall(turn)
                elif copies:
                    stepper.gpu(turn, copies)
            except Exception as error:  # one method's failure is a result, and shown; the others go on
                stepper.failure = f"round {turn}: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"

        return turn_of

    kinds = ("wall", "gpu") if cold and device.type == "cuda" else ("wall",)
    for warming, rounds in ((True, options.warm), (False, options.rounds)):
        by_kind = {kind: {f"{s.name} {kind}": call(s, kind, warming) for s in steppers} for kind in kinds}
        calls = {name: one for group in by_kind.values() for name, one in group.items()}
        if copies and not warming:
            calls[COPY] = copies
        label = case + ", warm-up" * warming
        groups = [calls] if cold else [{name: one} for name, one in calls.items()]
        for group in groups:
            harness.interleave(group, rounds, label, float("inf") if warming else options.seconds / len(groups))
        if warming:
            for stepper in steppers:
                stepper.begin(options.rounds, options.seconds / len(steppers) / 2)
    return Run(case, steppers, copies, draws[0])


def gradient(parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
    return (1e-3 * noise).to(parameter.dtype)


def _stride(rounds: int, fit: float) -> int:
    """Every how many rounds a method takes part, so that `fit` of its steps are not exceeded, but three are made."""
    return max(1, rounds // max(3, int(fit)))
