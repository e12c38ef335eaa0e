"""Refactoring and preconditioning over lists of pairs, in place and without autograd, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from . import plan as col
from .backends import resolve
from .contract import (
    DEGENERATE,
    PLAIN,
    REFACTORED,
    SKIPPED,
    LoRAPair,
    PairLike,
    as_pairs,
    check_backend,
    check_precision,
    fail,
)  # fmt: skip
from .plan import Plan, by_device

Grads = Sequence[tuple[Tensor | None, Tensor | None]]


class Diagnostics:
    """What a step did, layer by layer. Tensors stay on their devices: reading a property synchronises.

    `names[i]` is the layer of entry i; an experts pair has one entry an expert. Inactive layers (no gradient) have
    status PLAIN (3) and NaN elsewhere.
    """

    def __init__(self, names: list[str], results: list[Tensor], order: list[int]):
        self.names = names
        self._results, self._order = results, order

    def _column(self, column: int) -> Tensor:
        return torch.cat([r[:, column].cpu() for r in self._results])[self._order] if self._results else torch.empty(0)

    def _count(self, status: int) -> int:
        return int((self._column(col.STATUS) == status).sum())

    @property
    def refactored(self) -> int:
        """Layers that used the S of Theorem 3 (or Theorem 5 for scalar=True)."""
        return self._count(REFACTORED)

    @property
    def degenerate(self) -> int:
        """Layers that used S = c I, or I where a norm is zero."""
        return self._count(DEGENERATE)

    @property
    def skipped(self) -> int:
        """Layers left alone because a factor or a gradient was not finite."""
        return self._count(SKIPPED)

    @property
    def inactive(self) -> int:
        """Layers that took a plain step, or none: no gradient for both factors, or a warm-up step."""
        return self._count(PLAIN)

    @property
    def status(self) -> Tensor:
        """0 refactored, 1 degenerate, 2 skipped, 3 inactive; `[layers]`."""
        return self._column(col.STATUS).int()

    @property
    def balance(self) -> Tensor:
        """`||A A^T - B^T B||_F / ||A A^T||_F` before the step, `[layers]`."""
        return self._column(col.BALANCE)

    @property
    def condition_A(self) -> Tensor:
        """`||L||_F ||L^-1||_F` of the Cholesky factor of `A A^T`, `[layers]`; inf where numerically singular."""
        return self._column(col.KAPPA_A)

    @property
    def condition_B(self) -> Tensor:
        """The same of `B^T B`."""
        return self._column(col.KAPPA_B)

    @property
    def scale(self) -> Tensor:
        """`||B||_F / ||A||_F`, `[layers]`."""
        return self._column(col.SCALE)

    @property
    def worst_balance(self) -> float:
        return _worst(self.balance)

    @property
    def worst_condition(self) -> float:
        return _worst(torch.maximum(self.condition_A, self.condition_B))

    def __repr__(self) -> str:
        return (
            f"Diagnostics(refactored={self.refactored}, degenerate={self.degenerate}, skipped={self.skipped}, "
            f"inactive={self.inactive}, worst_balance={self.worst_balance:.2e}, "
            f"worst_condition={self.worst_condition:.2e})"
        )


def refactor_(
    pairs: Iterable[PairLike], scalar: bool = False, backend: str | None = None, precision: str = "float64"
) -> Diagnostics:
    """Refactor every pair: `A <- P^T A`, `B <- B P^-T`, then `A A^T = B^T B` and `B A` is as before.

    scalar=True: `A <- sqrt(s) A`, `B <- B / sqrt(s)` with `s = ||B||_F / ||A||_F` (RefLoRA-S). Degenerate pairs get the
    scalar refactoring, pairs with a zero or non-finite factor are left alone. Optimizer state is not moved: inside
    training use RefLoRAAdamW. Raises as `reflora.contract.as_pairs` and `reflora.backends.resolve`. Paper, section 3.
    """
    check_backend(backend)
    check_precision(precision)
    checked = as_pairs(pairs)

    def run(plan: Plan) -> Tensor:
        results = resolve(backend, plan.device).refactor(plan, scalar, precision)
        mark_written([t for pair in plan.pairs for t in (pair.A, pair.B)])
        return results

    return over_devices(checked, run)


def precondition_(
    pairs: Iterable[PairLike],
    grads: Grads | None = None,
    scalar: bool = False,
    backend: str | None = None,
    precision: str = "float64",
) -> Diagnostics:
    """Precondition every pair's gradients in place: `gA <- S^-1 gA`, `gB <- gB S`, `S = (A A^T)^-1 # (B^T B)`.

    grads: one `(gA, gB)` a pair, laid out like the factors; default their `.grad`. Pairs where either is None are left
    alone, as are pairs with a non-finite factor or gradient; degenerate pairs use `S = c I`, `c = ||B||_F / ||A||_F`
    (S = I where a norm is zero). Products past the storage range saturate. scalar=True uses `s I` throughout.
    Raises as `refactor_`, and ValueError for gradients that do not match. Paper, section 3.3.
    """
    check_backend(backend)
    check_precision(precision)
    checked = as_pairs(pairs)
    given = [(pair.A.grad, pair.B.grad) for pair in checked] if grads is None else list(grads)
    check_grads(checked, given)
    by_id = {id(pair): pair_grads for pair, pair_grads in zip(checked, given)}

    def run(plan: Plan) -> Tensor:
        plan.bind_grads([by_id[id(pair)] for pair in plan.pairs])
        results = resolve(backend, plan.device).precondition(plan, scalar, precision)
        mark_written([g for pair in plan.pairs for g in by_id[id(pair)] if g is not None])
        return results

    return over_devices(checked, run)


def check_grads(pairs: Sequence[LoRAPair], grads: Grads) -> None:
    """Gradients match their factors in number, shape, dtype and device."""
    if len(grads) != len(pairs):
        fail("grads", f"one (gA, gB) for each of {len(pairs)} pairs", len(grads), "Use None for a missing gradient.")
    for pair, sides in zip(pairs, grads):
        for factor, grad, side in zip((pair.A, pair.B), sides, "AB"):
            if grad is None:
                continue
            want, got = (factor.shape, factor.dtype, factor.device), (grad.shape, grad.dtype, grad.device)
            if want != got or grad.layout != torch.strided:
                fail(
                    f"{pair.name}, gradient of {side}", str(want), str(got), "Gradients are shaped like their factors."
                )


def over_devices(pairs: list[LoRAPair], run: Callable[[Plan], Tensor]) -> Diagnostics:
    """`run(plan)` once a device; the results in the order of `pairs`."""
    groups = by_device(pairs)
    plans = [Plan([pairs[i] for i in indices]) for indices in groups.values()]
    return diagnose(pairs, list(groups.values()), plans, [run(plan) for plan in plans])


def diagnose(
    pairs: Sequence[LoRAPair], indices: list[list[int]], plans: list[Plan], results: list[Tensor]
) -> Diagnostics:
    """Results of several plans, whose pairs are `pairs[indices]`, as one Diagnostics in the order of `pairs`."""
    keys = [(indices[k][row.pair], row.expert) for k, plan in enumerate(plans) for row in plan.rows]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    names = []
    for position in order:
        index, expert = keys[position]
        pair = pairs[index]
        names.append(f"{pair.name}[{expert}]" if pair.layout.startswith("experts") else pair.name)
    return Diagnostics(names, results, order)


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Writes through raw pointers bypass autograd's version counters."""
    torch.autograd.graph.increment_version(tensors)


def _worst(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.max()) if len(values) else float("nan")
