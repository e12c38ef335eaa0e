"""Triton kernels on NVIDIA GPUs: two or three launches per rank class (r > 128 goes through torch)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from ..columns import RESULTS
from ..kernels.routes import LARGEST
from ..plan import Plan
from . import AdamWStep, InvariantStep, torch_backend

NAME = "triton"


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`. TRITON_INTERPRET=1 (Triton's interpreter) serves CPU tensors."""
    if not _installed():
        return "triton is not installed (pip install triton)"
    if _version() < (3, 6):
        return "the kernels need Triton 3.6 or later (torch 2.10 and later come with it)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device.type == "cpu" else f"under TRITON_INTERPRET=1 the kernels run on the CPU, not on {device}"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"the kernels need a CUDA device, and {device} is not one"
    if torch.version.hip is not None:
        return "the kernels have been tried on NVIDIA GPUs only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the kernels need compute capability 8.0, and {device} has less"
    return _without_launcher()


@cache
def _without_launcher() -> str | None:
    """Why Triton has no launcher, or None: it builds one in C when first asked for its driver."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:  # any error of the compiler, the linker or the loader
        return f"Triton has no launcher, which takes a C compiler and Python.h: {error}".splitlines()[0][:200]
    return None


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _version() -> tuple[int, ...]:
    """(major, minor); new enough for a build under another name, which does not say."""
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (3, 6)


def refactor(plan: Plan, scalar: bool, precision: str) -> Tensor:
    from ..kernels.step.refactor import refactor as launch

    return _serve(
        plan,
        lambda results: launch(plan, scalar, precision, results),
        lambda rows: torch_backend.refactor(plan, scalar, precision, rows),
        None if scalar else precision,
    )


def precondition(plan: Plan, scalar: bool, precision: str, start: int = 0) -> Tensor:
    from ..kernels.step.precondition import precondition as launch

    return _serve(
        plan,
        lambda results: launch(plan, scalar, precision, start, results),
        lambda rows: torch_backend.precondition(plan, scalar, precision, start, rows),
        None if scalar else precision,
    )


def solve(plan: Plan, precision: str, start: int = 0) -> Tensor:
    from ..kernels.step.precondition import solve as launch

    return _serve(
        plan,
        lambda results: launch(plan, precision, start, results),
        lambda rows: torch_backend.solve(plan, precision, start, rows),
        precision,
    )


def adamw(plan: Plan, step: AdamWStep) -> Tensor:
    if step.scalar:
        from ..kernels.step.adamw_scalar import adamw_scalar as launch
    else:
        from ..kernels.step.adamw import adamw as launch

    return _serve(
        plan,
        lambda results: launch(plan, step, results),
        lambda rows: torch_backend.adamw(plan, step, rows),
        None if step.scalar else step.precision,
    )


def invariant(plan: Plan, step: InvariantStep) -> Tensor:
    from ..kernels.step.invariant import invariant as launch

    return _serve(
        plan,
        lambda results: launch(plan, step, results),
        lambda rows: torch_backend.invariant(plan, step, rows),
        step.precision,
    )


# few and rare: only for factors that several processes hold
means = torch_backend.means


def polar(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """`[batch, n, n]` -> (Q, H)."""
    if X.shape[-1] > LARGEST or X.numel() == 0:
        return torch_backend.polar(X, precision, out)
    from ..kernels.linalg.polar import polar as launch

    with torch.cuda.device_of(X):
        return launch(X, precision, out)


def geometric_mean(X: Tensor, Y: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """`X # Y`; NaN where X or Y is not positive definite."""
    if X.shape[-1] > LARGEST or X.numel() == 0:
        return torch_backend.geometric_mean(X, Y, precision, out)
    from ..kernels.linalg.geometric_mean import geometric_mean as launch

    with torch.cuda.device_of(X):
        return launch(X, Y, precision, out)


def sqrtm(X: Tensor, precision: str, inverse: bool, out: Tensor | None = None) -> Tensor:
    """`X^(1/2)`, or `X^(-1/2)`; NaN where X is not positive definite."""
    if X.shape[-1] > LARGEST or X.numel() == 0:
        return torch_backend.sqrtm(X, precision, inverse, out)
    from ..kernels.linalg.sqrtm import sqrtm as launch

    with torch.cuda.device_of(X):
        return launch(X, precision, inverse, out)


def eigh(
    X: Tensor, precision: str, V0: Tensor | None = None, vectors: bool = True,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`(w [batch, n] ascending, V or None)` of the symmetric parts; V0: eigenvectors of a similar X to start from."""
    if X.shape[-1] > LARGEST or X.numel() == 0:
        return torch_backend.eigh(X, precision, V0, vectors, out)
    from ..kernels.linalg.eigh import eigh as launch

    with torch.cuda.device_of(X):
        return launch(X, precision, V0, vectors, out)


def svd(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(U, S [batch, n] descending, Vh)`."""
    if X.shape[-1] > LARGEST or X.numel() == 0:
        return torch_backend.svd(X, precision, out)
    from ..kernels.linalg.svd import svd as launch

    with torch.cuda.device_of(X):
        return launch(X, precision, out)


def inv_root(X: Tensor, p: float, eps: float, unit: float, precision: str, out: Tensor | None = None) -> Tensor:
    """`(X + eps I)^(-1/p)`; NaN where that is not positive definite."""
    if X.shape[-1] > LARGEST or X.numel() == 0:
        return torch_backend.inv_root(X, p, eps, unit, precision, out)
    from ..kernels.linalg.inv_root import inv_root as launch

    with torch.cuda.device_of(X):
        return launch(X, p, eps, unit, precision, out)


def _serve(
    plan: Plan,
    launch: Callable[[Tensor], None],
    through_torch: Callable[[list[int]], Tensor],
    precision: str | None,
) -> Tensor:
    """The result table: kernels write their rows; rows without a kernel come from the torch backend.

    precision: of Grams and solve; None if there are none, which has a kernel on every device.
    """
    from ..kernels.step.launch import prepare

    results = torch.empty(len(plan.rows), RESULTS, dtype=torch.float64, device=plan.device)
    prepared = prepare(plan)
    with torch.cuda.device_of(results):
        launch(results)
    left = [(prepared.oversized, prepared.oversized_index)]
    if precision is not None:
        left.append((prepared.rerouted[precision], prepared.rerouted_index[precision]))
    for rows, index in left:
        if rows:
            results.index_copy_(0, index, through_torch(rows))
    return results
