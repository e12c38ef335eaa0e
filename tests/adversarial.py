"""LoRA pairs that break solvers, by kind: spectra, scales, shapes and special matrices, drawn from a generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DOUBLE = torch.float64
Draw = Callable[[int, torch.Generator], Tensor]


def _spaced(decades: float) -> Draw:
    return lambda r, _: torch.logspace(0, -decades, r, dtype=DOUBLE)


def _one_tiny(value: float) -> Draw:
    return lambda r, _: torch.cat([torch.ones(r - 1, dtype=DOUBLE), torch.full((1,), value, dtype=DOUBLE)])


def _one_huge(r: int, _: torch.Generator) -> Tensor:
    return torch.cat([torch.full((1,), 1e8, dtype=DOUBLE), torch.ones(r - 1, dtype=DOUBLE)])


def _clustered(r: int, generator: torch.Generator) -> Tensor:
    return 1 + 1e-7 * torch.rand(r, generator=generator, dtype=DOUBLE)


def _repeated(r: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, 3, (r,), generator=generator).double()


def _two_clusters(r: int, _: torch.Generator) -> Tensor:
    return torch.where(torch.arange(r) < r // 2, 1.0, 1e-5).double()


def _rank_one(r: int, _: torch.Generator) -> Tensor:
    return (torch.arange(r) == 0).double()


def _half_rank(r: int, _: torch.Generator) -> Tensor:
    return (torch.arange(r) < (r + 1) // 2).double()


def _random(r: int, generator: torch.Generator) -> Tensor:
    return 10 ** (-8 * torch.rand(r, generator=generator, dtype=DOUBLE))


# singular values of a factor
SPECTRA: dict[str, Draw] = {
    "equal": lambda r, _: torch.ones(r, dtype=DOUBLE), "k=1e2": _spaced(2), "k=1e4": _spaced(4), "k=1e5": _spaced(5),
    "k=1e6": _spaced(6), "k=1e8": _spaced(8), "k=1e12": _spaced(12), "k=1e16": _spaced(16),
    "one tiny": _one_tiny(1e-7), "one denormal": _one_tiny(1e-300), "one huge": _one_huge, "clustered": _clustered,
    "repeated": _repeated, "two clusters": _two_clusters, "rank one": _rank_one, "half rank": _half_rank,
    "random": _random, "zero": lambda r, _: torch.zeros(r, dtype=DOUBLE),
}  # fmt: skip
# a factor as a whole, in float32 and in float64
SCALES = {"1": 1.0, "1e-30": 1e-30, "1e30": 1e30, "denormal": 1e-41, "largest": 3e38}
SCALES_FLOAT64 = {"1": 1.0, "1e-200": 1e-200, "1e200": 1e200, "denormal": 1e-310, "largest": 1e308}


def rotated(spectrum: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`[r, n]` with these singular values, of which n < r keeps the first n, between random singular vectors."""
    r = len(spectrum)
    k = min(r, n)
    U = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=DOUBLE)).Q[:, :k]
    V = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE)).Q[:, :k]
    return (U * spectrum[:k]) @ V.mT


def _permuted(r: int, n: int, generator: torch.Generator) -> Tensor:
    """One entry per row, of sizes far apart: exact zeros everywhere else."""
    X = torch.zeros(r, n, dtype=DOUBLE)
    columns = torch.randperm(max(r, n), generator=generator)[:r] % n
    X[torch.arange(r), columns] = torch.logspace(0, -4, r, dtype=DOUBLE)
    return X


def _kahan(r: int, n: int, _: torch.Generator) -> Tensor:
    """Kahan's matrix: triangular, and nearly singular without a small entry."""
    c, s = math.cos(1.2), math.sin(1.2)
    X = torch.zeros(r, n, dtype=DOUBLE)
    size = min(r, n)
    square = torch.eye(size, dtype=DOUBLE) - c * torch.triu(torch.ones(size, size, dtype=DOUBLE), 1)
    X[:size, :size] = s ** torch.arange(size, dtype=DOUBLE)[:, None] * square
    return X


def _hilbert(r: int, n: int, _: torch.Generator) -> Tensor:
    return 1 / (torch.arange(r, dtype=DOUBLE)[:, None] + torch.arange(n, dtype=DOUBLE) + 1)


def _same_rows(r: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, n, generator=generator, dtype=DOUBLE).expand(r, n).clone()


def _one_zero_row(r: int, n: int, generator: torch.Generator) -> Tensor:
    X = torch.randn(r, n, generator=generator, dtype=DOUBLE)
    X[r // 2] = 0
    return X


def _graded_rows(r: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.logspace(0, -30, r, dtype=DOUBLE)[:, None] * torch.randn(r, n, generator=generator, dtype=DOUBLE)


MATRICES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "permuted diagonal": _permuted, "Kahan": _kahan, "Hilbert": _hilbert, "same rows": _same_rows,
    "one zero row": _one_zero_row, "graded rows": _graded_rows,
}  # fmt: skip


def factor(kind: str, r: int, n: int, generator: torch.Generator) -> Tensor:
    """`[r, n]` of a kind of SPECTRA or MATRICES."""
    if kind in MATRICES:
        return MATRICES[kind](r, n, generator)
    return rotated(SPECTRA[kind](r, generator), n, generator)


KINDS = (*SPECTRA, *MATRICES)
MILD = ("equal", "k=1e2", "k=1e4", "k=1e5", "one huge", "clustered", "repeated", "two clusters")


def pairs(
    count: int, ranks: range, generator: torch.Generator, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """`(what it is, A, B)`: kinds, ranks, scales and shapes in all combinations that `count` draws hit.

    Half of the second factors are of MILD kinds, so that a pair is often one that can be refactored.
    """

    def pick(some: Sequence[Any]) -> Any:
        return some[int(torch.randint(len(some), (1,), generator=generator))]

    scales = SCALES_FLOAT64 if dtype == DOUBLE else SCALES
    for number in range(count):
        r, mild = pick(ranks), pick((False, True))
        kind_A = pick(MILD) if mild and number % 2 else KINDS[number % len(KINDS)]
        kind_B = pick(MILD if mild else KINDS)
        # one factor in eight is shorter than r
        n_in, n_out = (1 + pick(range(r)) if pick(range(8)) == 0 else r + pick(range(9)) for _ in range(2))
        by_A, by_B = (pick(list(scales)) if pick(range(3)) == 0 else "1" for _ in range(2))
        A = factor(kind_A, r, n_in, generator) * scales[by_A]
        B = factor(kind_B, r, n_out, generator).mT * scales[by_B]
        top = torch.finfo(dtype).max
        name = f"r={r}, A {kind_A} [{r}, {n_in}] x {by_A}, B {kind_B} [{n_out}, {r}] x {by_B}"
        yield name, A.clamp(-top, top).to(dtype).contiguous(), B.clamp(-top, top).to(dtype).contiguous()
