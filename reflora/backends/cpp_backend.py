"""The C++ core (csrc/): one call per step, layers over torch's threads, Grams, solve and update fused per layer.

Grams and solve are always float64 here: precision="float32" only lowers the bound past which a layer is degenerate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..columns import NUMBERS, RESULTS
from ..constants import KAPPA_MAX, KAPPA_OF_RANK, METRICS
from ..plan import Plan
from . import AdamWStep, InvariantStep, Step, torch_backend

try:
    from .. import _C
except ImportError as error:
    _C, _missing = (
        None,
        f"the C++ core is not built ({error}); reinstall with a C++ compiler and without REFLORA_NO_CPP",
    )
    if Path(__file__).parents[2].joinpath("CMakeLists.txt").exists():
        _missing = f"the source tree's C++ core is not built ({error}): leave its folder, or pip install -e . in it"

if _C is not None and _C.NUMBERS != NUMBERS:
    _C, _missing = None, "the C++ core was built on another table of columns; run pip install -e . again"

NAME = "cpp"

_REFACTOR, _PRECONDITION, _SOLVE, _ADAMW, _INVARIANT = range(5)
_POLAR, _GEOMETRIC_MEAN, _SQRTM, _INVSQRTM, _SVD, _INV_ROOT = range(6)
# matrices past this order go through torch
_MOST = 128


def unavailable(device: torch.device) -> str | None:
    """The C++ core serves CPU tensors, where it was built."""
    if _C is None:
        return _missing
    if device.type != "cpu":
        return f"the C++ core works on CPU tensors, these are on {device}"
    return None


def refactor(plan: Plan, scalar: bool, precision: str) -> Tensor:
    return _run(plan, precision, kind=_REFACTOR, scalar=scalar)


def precondition(plan: Plan, scalar: bool, precision: str, start: int = 0) -> Tensor:
    return _run(plan, precision, kind=_PRECONDITION, scalar=scalar, start=start)


def solve(plan: Plan, precision: str, start: int = 0) -> Tensor:
    return _run(plan, precision, kind=_SOLVE, scalar=False, start=start)


def adamw(plan: Plan, step: AdamWStep) -> Tensor:
    return _run(
        plan, step.precision, kind=_ADAMW, scalar=step.scalar, warmup_steps=step.warmup_steps, start=step.start,
        interval=step.interval, reg=step.reg, kept=_kept(plan, step.carry and not step.scalar), **_of_step(step),
    )  # fmt: skip


def invariant(plan: Plan, step: InvariantStep) -> Tensor:
    return _run(
        plan, step.precision, kind=_INVARIANT, scalar=False, metric=METRICS.index(step.metric),
        momentum=step.moments == "momentum", late=step.late, damping=step.damping, kept=_kept(plan, step.carry),
        **_of_step(step),
    )  # fmt: skip


def _of_step(step: Step) -> dict[str, Any]:
    return {
        "hypers": step.hypers.data_ptr(), "grad_scale": 1.0 if step.grad_scale is None else float(step.grad_scale),
        "check": step.check, "found_inf": step.found_inf is not None and float(step.found_inf) != 0,
        "seed": None if step.seed is None else step.seed % 2**64,
    }  # fmt: skip


# few and rare: only for factors that several processes hold
means = torch_backend.means


def eigh(
    X: Tensor, precision: str, V0: Tensor | None = None, vectors: bool = True,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Tridiagonal QL, in the dtype `precision`; V0 is ignored. n > 128 goes through torch."""
    if X.shape[-1] > _MOST:
        return torch_backend.eigh(X, precision, V0, vectors, out)
    w, V = out or (X.new_empty(X.shape[:2]), torch.empty_like(X) if vectors else None)
    compute = getattr(torch, precision)
    if X.dtype != compute:
        values, columns = eigh(X.to(compute), precision, None, vectors)
        return w.copy_(values), None if V is None or columns is None else V.copy_(columns)
    _C.eigh(
        float32=compute == torch.float32, x=X.data_ptr(), w=w.data_ptr(), v=0 if V is None else V.data_ptr(),
        batch=X.shape[0], n=X.shape[1], threads=torch.get_num_threads(),
    )  # fmt: skip
    return w, V


def svd(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One-sided Jacobi. n > 128 goes through torch."""
    if X.shape[-1] > _MOST:
        return torch_backend.svd(X, "float64", out)
    U, S, Vh = out or (torch.empty_like(X), X.new_empty(X.shape[:2]), torch.empty_like(X))
    _matrices(_SVD, X, None, U, S, Vh)
    return U, S, Vh


def polar(X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    Q, H = out or (torch.empty_like(X), torch.empty_like(X))
    _matrices(_POLAR, X, None, Q, H)
    return Q, H


def geometric_mean(X: Tensor, Y: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    return _matrices(_GEOMETRIC_MEAN, X, Y, torch.empty_like(X) if out is None else out)


def sqrtm(X: Tensor, precision: str, inverse: bool, out: Tensor | None = None) -> Tensor:
    return _matrices(_INVSQRTM if inverse else _SQRTM, X, None, torch.empty_like(X) if out is None else out)


def inv_root(X: Tensor, p: float, eps: float, unit: float, precision: str, out: Tensor | None = None) -> Tensor:
    """By `eigh` in float64. n > 128 goes through torch."""
    if X.shape[-1] > _MOST:
        return torch_backend.inv_root(X, p, eps, unit, "float64", out)
    return _matrices(_INV_ROOT, X, None, torch.empty_like(X) if out is None else out, root=p, shift=eps, unit=unit)


def _kept(plan: Plan, carry: bool) -> int:
    """Address of what a row keeps for the next step: a flag and both Grams, float64. Without carry they are lost."""
    if not carry:
        plan.forget(_Kept)
        return 0
    return plan.kept(_Kept).room.data_ptr()


class _Kept:
    def __init__(self, plan: Plan):
        size = _C.kept_doubles(table=plan.table.data_ptr(), rows=len(plan.rows))
        self.room = torch.zeros(size, dtype=torch.float64, device="cpu")


def _run(plan: Plan, precision: str, **job: object) -> Tensor:
    results = torch.empty(len(plan.rows), RESULTS, dtype=torch.float64, device="cpu")
    _C.run(
        table=plan.table.data_ptr(), rows=len(plan.rows), results=results.data_ptr(),
        kappa_max=KAPPA_MAX[precision], kappa_of_rank=KAPPA_OF_RANK[precision], threads=torch.get_num_threads(), **job,
    )  # fmt: skip
    return results


def _matrices(
    function: int, X: Tensor, Y: Tensor | None, *out: Tensor, root: float = 1.0, shift: float = 0.0, unit: float = 0.0
) -> Tensor:
    addresses = [result.data_ptr() for result in out]
    _C.matrices(
        function=function, float32=X.dtype == torch.float32, x=X.data_ptr(), y=0 if Y is None else Y.data_ptr(),
        out=addresses + [0] * (3 - len(out)), batch=X.shape[0], n=X.shape[1], root=root, shift=shift, unit=unit,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return out[0]
