"""Ways to decompose a stack of symmetric matrices, and how exact an answer is; `eigh` says what they are timed for."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import harness

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LABELS = {
    "torch": "torch",
    "reflora": "reflora",
    "reflora-graph": "reflora, graph",
    "reflora-warm": "reflora, warm",
    "cupy": "CuPy",
    "torch-serial": "torch, 1 thread",
}
NEAR = 1e-3  # distance of X from the Y whose eigenvectors a warm start has, over its norm
CHECKED = 256
EXTENDED = 1 << 25  # multiply-adds of a product in 80 bits: 0.1 s
SAMPLE = 4e-3  # seconds of calls on end that make one time
MOST_CALLS = 1000
Call = Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Case:
    """So many matrices of one size and type."""

    dtype: str
    n: int
    batch: int

    def __str__(self) -> str:
        return f"{self.dtype} n={self.n} batch={self.batch}"

    @property
    def bytes(self) -> int:
        return self.batch * self.n**2 * DTYPES[self.dtype].itemsize


def draw(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """X and the Y near it, `[batch, n, n]`, of normal elements."""
    generator = torch.Generator(device).manual_seed(case.n)
    shape, like = (case.batch, case.n, case.n), {"dtype": DTYPES[case.dtype], "device": device}

    def symmetric() -> Tensor:
        G = torch.randn(shape, generator=generator, **like)
        return (G + G.mT).div_(2)

    Y = symmetric()
    return symmetric().mul_(NEAR).add_(Y), Y


# ---- methods: `build[name](X, Y, backend)` is the call to time


def _torch(X: Tensor, Y: Tensor, backend: str | None) -> Call:
    return lambda: torch.linalg.eigh(X)


def _serial(X: Tensor, Y: Tensor, backend: str | None) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return torch.linalg.eigh(X)
        finally:
            torch.set_num_threads(threads)

    return call


def _reflora(X: Tensor, Y: Tensor, backend: str | None, **more: Tensor) -> Call:
    from reflora import linalg

    options: dict[str, Any] = {**more, **({"backend": backend} if backend else {})}
    return lambda: linalg.eigh(X, **options)


def _warm(X: Tensor, Y: Tensor, backend: str | None) -> Call:
    return _reflora(X, Y, backend, V0=_reflora(Y, Y, backend)()[1])


def _graph(X: Tensor, Y: Tensor, backend: str | None) -> Call:
    call, graph = _reflora(X, Y, backend), torch.cuda.CUDAGraph()
    call()  # what is compiled or loaded on first use cannot be captured
    torch.cuda.synchronize(X.device)
    with torch.cuda.graph(graph):
        answer = call()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return answer

    return replay


def _cupy(X: Tensor, Y: Tensor, backend: str | None) -> Call:
    """On X's memory and torch's stream."""
    import cupy

    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(X.device).cuda_stream)
    x = cupy.from_dlpack(X)

    def call() -> tuple[Any, Any]:
        with stream:
            return cupy.linalg.eigh(x)

    return call


BUILD: dict[str, Callable[[Tensor, Tensor, str | None], Call]] = {
    "torch": _torch,
    "torch-serial": _serial,
    "reflora": _reflora,
    "reflora-graph": _graph,
    "reflora-warm": _warm,
    "cupy": _cupy,
}


def missing(name: str, device: torch.device) -> str | None:
    """Why a method cannot run here, or None."""
    if name in ("reflora-graph", "cupy") and device.type != "cuda":
        return "needs a GPU"
    return "not installed" if name == "cupy" and importlib.util.find_spec("cupy") is None else None


def library(device: torch.device) -> str:
    """What torch.linalg.eigh calls on this device, and CuPy's version where it runs."""
    if device.type == "cuda":
        # larger ones went matrix by matrix, through syevj or syevd (pytorch pull request 175403)
        sizes = "" if torch.__version__ >= (2, 12) else " up to n = 32"
        found = f"XsyevBatched{sizes} of cuSOLVER, CUDA {torch.version.cuda}"
        if missing("cupy", device) is None:
            import cupy

            found += f"; CuPy {cupy.__version__}"
        return found
    config = torch.__config__.show()
    version = re.search(r"Math Kernel Library Version (\S+?)-", config)
    info = re.search(r"LAPACK_INFO=(\w+)", config)
    name = info[1] if info else "unknown"
    return f"syevd of MKL {version[1]}" if name == "mkl" and version else f"syevd of LAPACK ({name})"


class Solver:
    """One method at its work; `times[kind][round]` in seconds a call, of which `calls` on end make one time."""

    def __init__(self, name: str, call: Call, device: torch.device):
        self.name, self.call, self.device = name, call, device
        self.times: dict[str, dict[int, float]] = {"gpu": {}, "wall": {}}
        self.once, self.calls = 0.0, 1
        self.failure: str | None = None

    def first(self) -> tuple[Tensor, Tensor]:
        """w and V. Nothing here counts as a time: what is compiled or loaded on first use is, and `calls` is set."""
        w, V = (torch.from_dlpack(part) for part in self.call())
        with harness.Stopwatch(self.device) as watch:
            self.call()
        self.once = watch.seconds
        self.calls = min(max(1, round(SAMPLE / max(self.once, 1e-9))), MOST_CALLS)
        return w, V

    def turn(self, kind: str, turn: int) -> None:
        if self.failure:
            return
        calls = 1 if kind == "wall" and self.device.type == "cuda" else self.calls
        try:
            self.times[kind][turn] = (self._wall if kind == "wall" else self._stream)(calls) / calls
        except Exception as error:  # as in `eigh.measure`
            self.failure = reason(error)

    def _wall(self, calls: int) -> float:
        with harness.Stopwatch(self.device) as watch:
            for _ in range(calls):
                self.call()
        return watch.seconds

    def _stream(self, calls: int) -> float:
        timer = harness.StreamTimer(self.device)
        timer.start()
        for _ in range(calls):
            self.call()
        timer.stop()
        return timer.read()[0]


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


# ---- errors


class Sample:
    """Up to CHECKED matrices of a stack, spread over it, with exact eigenvalues `high + low`, in float64 on the CPU."""

    def __init__(self, X: Tensor):
        count = min(len(X), CHECKED)
        self.index = torch.linspace(0, len(X) - 1, count, dtype=torch.float64).round().long()
        self.eps = torch.finfo(X.dtype).eps
        self.X = self._of(X)
        self.high, self.low = exact(self.X) if X.dtype == torch.float64 else (torch.linalg.eigvalsh(self.X), None)

    def _of(self, stack: Tensor) -> Tensor:
        return stack[self.index.to(stack.device)].cpu().double()

    def errors(self, w: Tensor, V: Tensor) -> dict[str, float]:
        """By kind, the largest of the sample, NaN if one is; float64 eigenvalues only where they can be known."""
        w, V, n = self._of(w), self._of(V), self.X.shape[-1]
        norm, eye = torch.linalg.matrix_norm, torch.eye(n, dtype=torch.float64)
        found = {
            "residual": norm(self.X @ V - V * w.unsqueeze(-2)) / norm(self.X) / n,
            "orthogonality": norm(V.mT @ V - eye) / n,
        }
        if self.high is not None:
            off = w[: len(self.high)] - self.high - (0.0 if self.low is None else self.low)
            found["eigenvalues"] = off.abs().amax(-1) / self.high.abs().amax(-1)
        return {kind: float(error.max()) / self.eps for kind, error in found.items()}


def exact(X: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Eigenvalues of the first few X, float64 `[batch, n, n]`, as a sum of two; None where numpy has no 80 bits.

    Rayleigh quotients of LAPACK's eigenvectors, once more orthogonalized: their error is of second order.
    """
    try:
        import numpy
    except ImportError:
        return None, None
    if numpy.finfo(numpy.longdouble).eps > 1e-18:
        return None, None
    X = X[: max(1, EXTENDED // X.shape[-1] ** 3)]
    x, V = (part.numpy().astype(numpy.longdouble) for part in (X, torch.linalg.eigh(X).eigenvectors))
    V = V @ (3 * numpy.eye(X.shape[-1], dtype=numpy.longdouble) - V.swapaxes(1, 2) @ V) / 2
    w = numpy.sort((V * (x @ V)).sum(1))
    high = w.astype(numpy.float64)
    return torch.from_numpy(high), torch.from_numpy((w - high).astype(numpy.float64))
