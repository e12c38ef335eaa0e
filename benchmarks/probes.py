"""What a step asks of a device beside time: traffic, kernel launches, copies to the host, memory; and plain copies.

Launches and memory are known on CUDA alone; None elsewhere.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import harness

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOST_FILLING = 0.1  # seconds; methods that wait for the device by themselves would ask for any amount


# ---- copies


class Copies:
    """Device-to-device copies of one large tensor: they evict the caches, keep a stream busy, and show the bandwidth.

    mib: of the tensor; a copy reads and writes it once. times: seconds by round.
    """

    def __init__(self, device: torch.device, mib: int):
        self.device = device
        self.source = torch.ones(mib << 20, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        self.bytes = 2 * self.source.numel()
        self.times: dict[int, float] = {}
        self.seconds = min(self._time() for _ in range(3))

    def fill(self, seconds: float = 0.0) -> None:
        """Copies that last for `seconds` at least, and one at least. On CUDA this returns before they have run."""
        wanted = min(seconds, _MOST_FILLING) if self.device.type == "cuda" else 0.0
        for _ in range(1 + math.ceil(wanted / self.seconds)):
            self.target.copy_(self.source)

    def __call__(self, turn: int) -> None:
        self.fill()
        self.times[turn] = self._time()

    def _time(self) -> float:
        timer = harness.StreamTimer(self.device)
        timer.start()
        self.target.copy_(self.source)
        timer.stop()
        return timer.read()[0]


# ---- traffic


def step_bytes(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Bytes that AdamW has to move with these types: p, g and both moments read, p and both moments written.

    28 a parameter where all are float32. After a step: moments that the optimizer has none of count as the parameter's.
    """
    total = 0
    for parameter in parameters:
        moments = [optimizer.state.get(parameter, {}).get(name, parameter) for name in _MOMENTS]
        read_and_written = [parameter, *moments]
        total += _bytes(parameter.grad if parameter.grad is not None else parameter)
        total += 2 * sum(map(_bytes, read_and_written))
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- launches


@dataclass(frozen=True)
class Launches:
    """kernels, copies to the host, other copies and fills (to the device, within it) of one call."""

    kernels: int
    to_host: int
    others: int


def launches(work: Callable[[], object], device: torch.device) -> Launches | None:
    """Counted by torch.profiler; None where it sees nothing of the device (a CPU, a machine that forbids profiling)."""
    if device.type != "cuda":
        return None

    def drained() -> None:
        work()
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    kinds = torch.profiler.ProfilerActivity
    found = count(harness.trace(drained, kinds.CPU, kinds.CUDA))
    return found if found.kernels else None


def count(events: Sequence[harness.Event]) -> Launches:
    """Launches among the events of a trace: `cat` says what an entry is, a copy's name its direction."""
    kinds = [(event.get("cat"), event.get("name", "")) for event in events if event.get("ph") == "X"]
    kernels = sum(cat == "kernel" for cat, _ in kinds)
    to_host = sum(cat == "gpu_memcpy" and "DtoH" in name for cat, name in kinds)
    return Launches(kernels, to_host, sum(cat in ("gpu_memcpy", "gpu_memset") for cat, _ in kinds) - to_host)


# ---- memory


def allocated(device: torch.device) -> int | None:
    """Live bytes of torch's CUDA allocator."""
    if device.type != "cuda":
        return None
    gc.collect()
    return torch.cuda.memory_allocated(device)


def warm_libraries(device: torch.device) -> None:
    """Make cuBLAS and cuSOLVER take their workspaces now, so that no method's memory counts them."""
    if device.type == "cuda":
        for dtype in (torch.float32, torch.float64):
            square = torch.eye(16, dtype=dtype, device=device)
            torch.linalg.eigh(square @ square)
        torch.cuda.synchronize(device)
