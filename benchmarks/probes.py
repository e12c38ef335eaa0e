"""What a step asks of a device beside time: traffic, kernel launches, copies to the host, memory; and plain copies.

Launches and memory are known on CUDA alone; None elsewhere.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import harness

CPU_MEMORY = "peak of live bytes in torch's CPU allocator (torch.profiler), buffers of C++ code outside it not counted"
CUDA_MEMORY = "torch.cuda.max_memory_allocated"
_MARK = "reflora benchmark: measured"
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


def free_bytes(device: torch.device) -> float:
    """Memory that is to be had now, as the driver or Linux says; infinite where neither does."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable"):
            return 1024.0 * int(line.split()[1])
    return float("inf")


@dataclass(frozen=True)
class Memory:
    """Bytes beyond what was live at the start: the most at one time, and what is still live at the end."""

    peak: int
    kept: int


def memory(work: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> Memory:
    """What `work` takes (see CPU_MEMORY and CUDA_MEMORY).

    `before` runs first and is not measured. On a CPU let `work` free only what was allocated in `before` or in `work`:
    of older blocks the profiler knows some and not others.
    """
    before = before or (lambda: None)
    gc.collect()  # a discarded optimizer that is freed while work runs would hide as much of the peak
    if device.type == "cuda":
        before()
        harness.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        live = torch.cuda.memory_allocated(device)
        work()
        harness.synchronize(device)
        return Memory(torch.cuda.max_memory_allocated(device) - live, torch.cuda.memory_allocated(device) - live)

    def marked() -> None:
        before()
        with torch.profiler.record_function(_MARK):
            work()

    return _memory(harness.trace(marked, torch.profiler.ProfilerActivity.CPU, profile_memory=True))


def _memory(events: Sequence[harness.Event]) -> Memory:
    """From the allocations and frees after the mark's start: their largest sum, and the last."""
    start = next(e["ts"] for e in events if e.get("name") == _MARK and "dur" in e)
    live = peak = 0
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    for _, change in sorted((entry for entry in changes if entry[0] >= start), key=lambda entry: entry[0]):
        live += change
        peak = max(peak, live)
    return Memory(peak, live)


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
