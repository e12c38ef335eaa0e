"""The C++ core (csrc/): one call a step, layers over torch's threads, Grams, solve and update fused per layer.

Grams and solve are always float64 here: precision="float32" only lowers the bound past which a layer is degenerate.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..contract import KAPPA_MAX
from ..plan import RESULTS, Plan
from . import AdamWStep

try:
    from .. import _C
except ImportError as error:
    _C, _missing = None, str(error)

NAME = "cpp"

_REFACTOR, _PRECONDITION, _ADAMW = range(3)
_POLAR, _GEOMETRIC_MEAN, _SQRTM, _INVSQRTM = range(4)


def unavailable(device: torch.device) -> str | None:
    """The C++ core serves CPU tensors, where it was built."""
    if _C is None:
        return f"the C++ core is not built ({_missing}); reinstall with a C++ compiler and without REFLORA_NO_CPP"
    if device.type != "cpu":
        return f"the C++ core works on CPU tensors, these are on {device}"
    return None


def refactor(plan: Plan, scalar: bool, precision: str) -> Tensor:
    return _run(plan, precision, kind=_REFACTOR, scalar=scalar)


def precondition(plan: Plan, scalar: bool, precision: str) -> Tensor:
    return _run(plan, precision, kind=_PRECONDITION, scalar=scalar)


def adamw(plan: Plan, step: AdamWStep) -> Tensor:
    return _run(
        plan, step.precision, kind=_ADAMW, scalar=step.scalar, warmup_steps=step.warmup_steps, interval=step.interval,
        hypers=step.hypers.data_ptr(), grad_scale=1.0 if step.grad_scale is None else float(step.grad_scale),
        check=step.check, found_inf=step.found_inf is not None and float(step.found_inf) != 0,
        seed=None if step.seed is None else step.seed % 2**64, kept=_kept(plan, step.carry and not step.scalar),
    )  # fmt: skip


def polar(X: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    Q, H = torch.empty_like(X), torch.empty_like(X)
    _matrices(_POLAR, X, None, Q, H)
    return Q, H


def geometric_mean(X: Tensor, Y: Tensor, precision: str) -> Tensor:
    out = torch.empty_like(X)
    _matrices(_GEOMETRIC_MEAN, X, Y, out, None)
    return out


def sqrtm(X: Tensor, precision: str, inverse: bool) -> Tensor:
    out = torch.empty_like(X)
    _matrices(_INVSQRTM if inverse else _SQRTM, X, None, out, None)
    return out


def _kept(plan: Plan, carry: bool) -> int:
    """Address of what a row keeps for the next step: a flag and both Grams, float64. A step without forgets them."""
    if not carry:
        plan.memory.pop(NAME, None)
        return 0
    if NAME not in plan.memory:
        size = _C.kept_doubles(table=plan.table.data_ptr(), rows=len(plan.rows))
        plan.memory[NAME] = torch.zeros(size, dtype=torch.float64)
    return cast(Tensor, plan.memory[NAME]).data_ptr()


def _run(plan: Plan, precision: str, **job: object) -> Tensor:
    results = torch.empty(len(plan.rows), RESULTS, dtype=torch.float64)
    _C.run(
        table=plan.table.data_ptr(), rows=len(plan.rows), results=results.data_ptr(),
        kappa_max=KAPPA_MAX[precision], threads=torch.get_num_threads(), **job,
    )  # fmt: skip
    return results


def _matrices(function: int, X: Tensor, Y: Tensor | None, out: Tensor, out2: Tensor | None) -> None:
    _C.matrices(
        function=function, float32=X.dtype == torch.float32, x=X.data_ptr(), y=0 if Y is None else Y.data_ptr(),
        out=out.data_ptr(), out2=0 if out2 is None else out2.data_ptr(), batch=X.shape[0], n=X.shape[1],
        threads=torch.get_num_threads(),
    )  # fmt: skip
