"""One interface, three ways to serve it: "triton" (CUDA), "cpp" (CPU), "torch" (any device).

A backend is a module with the functions of `Backend`. It is chosen once a device, by `resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from ..contract import check_backend, fail
from ..plan import Plan

# where the S of an AdamW step comes from
IDENTITY, FRESH, SAVED = range(3)


@dataclass(frozen=True)
class AdamWStep:
    """What one fused step does, beside what the plan's table points at.

    hypers: float64 `[groups, HYPERS]` on the CPU. source: IDENTITY (warm-up), FRESH (compute S) or SAVED (reuse).
    keep: store S and S^-1 where the SAVED column points. scalar_before, scalar_after: refactor by the balance scalar
    (RefLoRA-S) before and after the update. grad_scale, found_inf: float32 scalars on the device, or None.
    """

    hypers: Tensor
    source: int
    keep: bool
    scalar_before: bool
    scalar_after: bool
    precision: str
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Backend(Protocol):
    """Table operations work in place on what the plan points at and return float64 `[rows, RESULTS]` on the device."""

    NAME: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot serve `device`, or None."""

    def refactor(self, plan: Plan, scalar: bool, precision: str) -> Tensor: ...

    def precondition(self, plan: Plan, scalar: bool, precision: str) -> Tensor: ...

    def adamw(self, plan: Plan, step: AdamWStep) -> Tensor: ...

    def polar(self, X: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        """`[batch, n, n]` in float32 or float64, contiguous; so below."""

    def geometric_mean(self, X: Tensor, Y: Tensor, precision: str) -> Tensor: ...

    def sqrtm(self, X: Tensor, precision: str, inverse: bool) -> Tensor: ...


def load(name: str) -> Backend:
    return cast(Backend, import_module(f".{name}_backend", __name__))


def resolve(name: str | None, device: torch.device) -> Backend:
    """The backend called `name`, or for None the fastest that can serve `device`.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that cannot serve.
    """
    check_backend(name)
    if name is not None:
        backend = load(name)
        reason = backend.unavailable(device)
        if reason:
            fail(
                f"backend {name!r}",
                f"one that can serve {device}",
                reason,
                "Pass backend=None to choose.",
                RuntimeError,
            )
        return backend
    for candidate in ("triton",) if device.type == "cuda" else ("cpp",):
        backend = load(candidate)
        if backend.unavailable(device) is None:
            return backend
    return load("torch")
