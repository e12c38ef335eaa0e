"""What a step reports, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import columns as col
from .columns import DEGENERATE, PLAIN, REFACTORED, SKIPPED
from .pairs import LoRAPair
from .plan import Plan


class Diagnostics:
    """What a step did, layer by layer. Tensors stay on their devices: reading a property syncs.

    `names[i]` is the layer of entry i; an experts pair has one entry per expert. Measurements are of the factors before
    the step, as far as it needed them: all are NaN for a layer that was skipped or is inactive, and in a step that
    reused an earlier S; RefLoRA-S measures `scale` alone.
    """

    # entry i is row order[i] of the concatenated results, columns in reflora/columns.py

    def __init__(self, names: list[str], results: list[Tensor], order: list[int], reuses: bool = False):
        """reuses: S may come from an earlier step; a row without condition numbers was then not measured at all."""
        self.names = names
        self.tables, self.order, self.reuses = results, order, reuses

    def _column(self, column: int) -> Tensor:
        return self._rows()[:, column]

    def _rows(self) -> Tensor:
        """The result table on the CPU, with the same meaning from every backend."""
        if not self.tables:
            return torch.empty(0, col.REPORTED, dtype=torch.float64, device="cpu")
        rows = torch.cat([table[:, : col.REPORTED].cpu() for table in self.tables])[self.order]
        status, kappas = rows[:, col.STATUS], rows[:, col.KAPPA_A : col.KAPPA_B + 1]
        solved = ~kappas.isnan().any(1)
        # a zero factor has no condition, though its shrunk Gram may have one
        zero = rows[:, col.NORM_A : col.NORM_B + 1] == 0
        kappas.masked_fill_(zero & solved[:, None], torch.inf)
        # factors so far apart that their squares are out of range
        balance = rows[:, col.BALANCE]
        balance.masked_fill_(balance.isnan() & solved, torch.inf)
        unmeasured = (status == SKIPPED) | (status == PLAIN)
        if self.reuses:
            unmeasured |= ~solved
        rows[:, col.KAPPA_A :].masked_fill_(unmeasured[:, None], torch.nan)
        return rows

    def _count(self, status: int) -> int:
        return int((self._column(col.STATUS) == status).sum())

    @property
    def refactored(self) -> int:
        """Layers that used the S of Theorem 3, by default of shrunk Grams (or that of Theorem 5 for scalar=True)."""
        return self._count(REFACTORED)

    @property
    def degenerate(self) -> int:
        """Layers without such an S: they used c I, or I where a norm is zero, and by default."""
        return self._count(DEGENERATE)

    @property
    def skipped(self) -> int:
        """Layers left alone because a factor or a gradient was not finite."""
        return self._count(SKIPPED)

    @property
    def inactive(self) -> int:
        """Layers that took a plain step, or none: a gradient was missing, it was a warm-up step, or RefLoRA-S before
        the norms of A and B have met.
        """
        return self._count(PLAIN)

    @property
    def status(self) -> Tensor:
        """0 refactored, 1 degenerate, 2 skipped, 3 inactive; `[layers]`."""
        return self._column(col.STATUS).int()

    @property
    def imbalance(self) -> Tensor:
        """`||A A^T - B^T B||_F / ||A A^T||_F`, `[layers]`: 0 where the factors are balanced; inf where A is 0."""
        return self._column(col.BALANCE)

    @property
    def balance(self) -> Tensor:
        """`imbalance`, under its former name."""
        return self.imbalance

    @property
    def condition_A(self) -> Tensor:
        """`||L||_F ||L^-1||_F` of the Cholesky factor of `A A^T`, `[layers]`; inf if numerically singular or A = 0.

        By default `A A^T` is shrunk towards a multiple of I, less and less as the layer trains.
        """
        return self._column(col.KAPPA_A)

    @property
    def condition_B(self) -> Tensor:
        """The same of `B^T B`."""
        return self._column(col.KAPPA_B)

    @property
    def scale(self) -> Tensor:
        """`||B||_F / ||A||_F`, `[layers]`; 1 where that or its inverse is not a normal number.

        RefLoRA-S also has 1 where balanced factors could not be stored, and the nearest power of four for 16-bit ones.
        """
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
    """Diagnostics of a step that treated all layers alike and measured none: skipped, or not taken."""
    names = row_names(pairs)
    device = pairs[0].A.device if pairs else "cpu"
    results = torch.full((len(names), col.REPORTED), torch.nan, dtype=torch.float64, device=device)
    results[:, col.STATUS] = status
    return Diagnostics(names, [results], list(range(len(names))))


def diagnose(
    pairs: Sequence[LoRAPair], indices: list[list[int]], plans: list[Plan], results: list[Tensor], reuses: bool = False
) -> Diagnostics:
    """Results of several plans, whose pairs are `pairs[indices]`, as one Diagnostics in the order of `pairs`.

    reuses: as in Diagnostics.
    """
    keys = [(indices[k][row.pair], row.expert) for k, plan in enumerate(plans) for row in plan.rows]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    stepped = {index for index, _ in keys}
    return Diagnostics(row_names([pair for i, pair in enumerate(pairs) if i in stepped]), results, order, reuses)


def row_names(pairs: Sequence[LoRAPair]) -> list[str]:
    """The name of every layer."""
    return [name for pair in pairs for name in pair.row_names]


def _worst(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.max()) if len(values) else float("nan")
