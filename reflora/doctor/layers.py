"""What the factors of a saved adapter are like, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter
from ..columns import DEGENERATE, REFACTORED, SKIPPED
from ..functional import refactor_
from ..lowrank import singular_values
from ..pairs import LoRAPair

STATUS = {REFACTORED: "", DEGENERATE: "degenerate", SKIPPED: "not finite"}
NAN = float("nan")


@dataclass(frozen=True)
class Layer:
    """A row of the table; an experts layer has one per expert.

    stable_rank: `||B A||_F^2 / ||B A||_2^2`; effective_rank: exp of the entropy of the singular values of B A over
    their sum; both 0 for B A = 0. balance: `||A A^T - B^T B||_F / ||A A^T||_F`. condition_A, condition_B: as in
    `Diagnostics`. scale: `||B||_F / ||A||_F`. status: "" for a layer that can be balanced. `rank` is 0 and the rest NaN
    where A and B could not be read as such; `status` says why.
    """

    name: str
    rank: int
    stable_rank: float
    effective_rank: float
    condition_A: float
    condition_B: float
    balance: float
    scale: float
    norm: float
    status: str


def layers_of(adapter: Adapter) -> list[Layer]:
    """Measured in float64."""
    copies = [copy_of(pair) for pair in adapter.pairs]
    spectra = [_spectrum(A, B) for pair in copies for A, B in pair.factors]
    report = refactor_(copies)  # on copies: it reports what they were like
    columns = (report.condition_A, report.condition_B, report.balance, report.scale, report.status)
    rows = zip(report.names, spectra, *(column.tolist() for column in columns))
    found = []
    for one in adapter.stored:
        if one.pair is None:
            found.append(Layer(one.name, 0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, one.reason))
            continue
        for _ in range(one.pair.experts):
            name, (stable, effective, norm), k_A, k_B, balance, scale, status = next(rows)
            state = STATUS[int(status)]
            found.append(Layer(name, one.pair.rank, stable, effective, k_A, k_B, balance, scale, norm, state))
    return found


def copy_of(pair: LoRAPair) -> LoRAPair:
    """In float64."""
    A, B = (t.to(torch.float64, copy=True) for t in (pair.A, pair.B))
    return LoRAPair(pair.name, A, B, pair.layout)


def _spectrum(A: Tensor, B: Tensor) -> tuple[float, float, float]:
    """Stable rank, effective rank and Frobenius norm of B A."""
    values = singular_values(A, B)
    if values.isnan().any():
        return NAN, NAN, NAN
    if float(values[0]) == 0:
        return 0.0, 0.0, 0.0
    share = values / values.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return float((values / values[0]).square().sum()), float(entropy.exp()), float(values.norm())
