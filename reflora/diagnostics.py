"""What a step reports, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import plan as col
from .contract import DEGENERATE, PLAIN, REFACTORED, SKIPPED, LoRAPair
from .plan import Plan


class Diagnostics:
    """What a step did, layer by layer. Tensors stay on their devices: reading a property synchronises.

    `names[i]` is the layer of entry i; an experts pair has one entry an expert. Inactive layers have status 3, and NaN
    for what was not measured.
    """

    # entry i is row order[i] of the concatenated results, columns in reflora/plan.py

    def __init__(self, names: list[str], results: list[Tensor], order: list[int]):
        self.names = names
        self.tables, self.order = results, order

    def _column(self, column: int) -> Tensor:
        if not self.tables:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        return torch.cat([r[:, column].cpu() for r in self.tables])[self.order]

    def _count(self, status: int) -> int:
        return int((self._column(col.STATUS) == status).sum())

    @property
    def refactored(self) -> int:
        """Layers that used the S of Theorem 3, by default of shrunk Grams (or that of Theorem 5 for scalar=True)."""
        return self._count(REFACTORED)

    @property
    def degenerate(self) -> int:
        """Layers without such an S, which used c I, or I where a norm is zero, and by default."""
        return self._count(DEGENERATE)

    @property
    def skipped(self) -> int:
        """Layers left alone because a factor or a gradient was not finite."""
        return self._count(SKIPPED)

    @property
    def inactive(self) -> int:
        """Layers that took a plain step, or none: no gradient for both factors, a warm-up step, or RefLoRA-S before
        the norms of A and B have met.
        """
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
        """`||L||_F ||L^-1||_F` of the Cholesky factor of `A A^T`, `[layers]`; inf where numerically singular.

        By default `A A^T` is shrunk towards a multiple of I, the less the longer the layer has trained.
        """
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


def uniform(pairs: Sequence[LoRAPair], status: int) -> Diagnostics:
    """Of a step that did the same with every layer and measured none: it was skipped, or not taken."""
    names = row_names(pairs)
    device = pairs[0].A.device if pairs else "cpu"
    results = torch.full((len(names), col.REPORTED), torch.nan, dtype=torch.float64, device=device)
    results[:, col.STATUS] = status
    return Diagnostics(names, [results], list(range(len(names))))


def diagnose(
    pairs: Sequence[LoRAPair], indices: list[list[int]], plans: list[Plan], results: list[Tensor]
) -> Diagnostics:
    """Results of several plans, whose pairs are `pairs[indices]`, as one Diagnostics in the order of `pairs`."""
    keys = [(indices[k][row.pair], row.expert) for k, plan in enumerate(plans) for row in plan.rows]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    stepped = {index for index, _ in keys}
    return Diagnostics(row_names([pair for i, pair in enumerate(pairs) if i in stepped]), results, order)


def row_names(pairs: Sequence[LoRAPair]) -> list[str]:
    """The name of every layer, an experts pair's with the number of the expert."""
    names: list[str] = []
    for pair in pairs:
        several = pair.layout.startswith("experts")
        names += [f"{pair.name}[{expert}]" if several else pair.name for expert in range(pair.experts)]
    return names


def _worst(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.max()) if len(values) else float("nan")
