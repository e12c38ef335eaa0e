"""One interface, three implementations: "triton" (CUDA), "cpp" (CPU), "torch" (any device).

A backend is a module with the functions of `Backend`. It is chosen once per device, by `resolve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from ..checks import check_backend, fail
from ..constants import BACKENDS
from ..plan import Plan


@dataclass(frozen=True)
class Step:
    """What every fused step does, besides what the plan's table points at.

    hypers: float64 `[groups, HYPERS]` on the CPU. lrs: by group, the tensor on the device behind LR_AT, or None.
    check: search the gradients for inf and nan and skip a row that has one. carry: keep the Grams of the updated
    factors for the next step. seed: of stochastic rounding to bfloat16 factors, None for rounding to nearest.
    grad_scale, found_inf: float32 scalars on the device, or None.
    """

    hypers: Tensor
    precision: str = "float64"
    check: bool = True
    carry: bool = False
    seed: int | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    lrs: tuple[Tensor | None, ...] = ()

    def on(self, backend: Backend, plan: Plan) -> Tensor:
        """Take the step of the plan's active rows; float64 `[rows, RESULTS]` on the device."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamWStep(Step):
    """RefLoRA's step: AdamW on gradients multiplied by S^-1 and S.

    Every row finds from its own counter n (COUNT) where its S comes from: I for n < warmup_steps, computed every
    `interval` steps from there on, the last one in between. start: 0 for the paper's S; else S comes without its scale
    c, of Grams shrunk with the weight reference.shrink_weight(n, start), and a step before which a factor is 0 counts
    as the first. scalar: RefLoRA-S, at the same steps. reg: 0, or RiemannianAdamW's, whose damped inverse Grams take
    the place of S and S^-1 in every step (reference.damped_inverses); the other four have their defaults then.
    """

    scalar: bool = False
    warmup_steps: int = 0
    start: int = 0
    interval: int = 1
    reg: float = 0.0

    @property
    def keep(self) -> bool:
        """Whether S is stored where the SAVED column points."""
        return self.interval > 1 and not self.scalar

    def on(self, backend: Backend, plan: Plan) -> Tensor:
        return backend.adamw(plan, self)


@dataclass(frozen=True)
class InvariantStep(Step):
    """The momentum whitened in the frame of a metric; the four as in reference.invariant_step. V points at Grams.

    Gradients are always searched, since their Grams show it: `check` is not asked.
    """

    metric: str = "reflora"
    moments: str = "gradients"
    damping: float = 1e-4
    late: bool = False

    def on(self, backend: Backend, plan: Plan) -> Tensor:
        return backend.invariant(plan, self)


class Backend(Protocol):
    """Table operations work in place on what the plan points at and return float64 `[rows, RESULTS]` on the device."""

    NAME: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot serve `device`, or None."""

    def refactor(self, plan: Plan, scalar: bool, precision: str) -> Tensor: ...

    # start: 0 for the paper's S; else S comes without its scale c, from Grams shrunk with the weight
    # reference.shrink_weight(n, start), where n is the COUNT of the row
    def precondition(self, plan: Plan, scalar: bool, precision: str, start: int = 0) -> Tensor: ...

    # the same S: S and S^-1 of every active row go to where SAVED points, `[2, r, r]` of float32 (float64 for float64
    # factors), I for both where the row is skipped; gradients are ignored
    def solve(self, plan: Plan, precision: str, start: int = 0) -> Tensor: ...

    def adamw(self, plan: Plan, step: AdamWStep) -> Tensor: ...

    def invariant(self, plan: Plan, step: InvariantStep) -> Tensor: ...

    # the same S from Grams summed elsewhere, float64 `[b, r, r]` of A and of B. n: the other sides of the factors
    # `[b]`. counts: steps `[b]` for an S that is phased in, or None. Returns S and S^-1, float64
    # `[b, 2, r, r]`, and `[b, RESULTS]`
    def means(
        self, grams: tuple[Tensor, Tensor], n: tuple[Tensor, Tensor], precision: str, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    # functions of matrices: contiguous `[batch, n, n]`, batch > 0, of float32 or float64 in and out; results are new or
    # written to `out`; values never raise

    def eigh(
        self, X: Tensor, precision: str, V0: Tensor | None = None, vectors: bool = True,
        out: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip

    def svd(self, X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]: ...

    def polar(self, X: Tensor, precision: str, out: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]: ...

    def geometric_mean(self, X: Tensor, Y: Tensor, precision: str, out: Tensor | None = None) -> Tensor: ...

    def sqrtm(self, X: Tensor, precision: str, inverse: bool, out: Tensor | None = None) -> Tensor: ...

    # unit: relative rounding that X is known to
    def inv_root(
        self, X: Tensor, p: float, eps: float, unit: float, precision: str, out: Tensor | None = None
    ) -> Tensor: ...


@cache
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
    for candidate, devices in BACKENDS.items():
        if device.type in devices and load(candidate).unavailable(device) is None:
            return load(candidate)
    return load("torch")
