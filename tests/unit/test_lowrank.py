"""The singular value decomposition of B A by way of r x r matrices, against the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reflora import lowrank

SIZES = [(1, 5, 7), (4, 63, 10), (12, 1000, 24), (8, 8, 8), (14, 12, 10), (6, 3, 40)]


def pair(r: int, n_in: int, n_out: int, condition: float = 10.0) -> tuple[Tensor, Tensor]:
    decay = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)
    return torch.randn(r, n_in, dtype=torch.float64) * decay[:, None], torch.randn(n_out, r, dtype=torch.float64)


@pytest.mark.parametrize("condition", [10.0, 1e6, 1e12])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_dense_svd(size: tuple[int, int, int], condition: float) -> None:
    A, B = pair(*size, condition)
    whole, k = B @ A, min(size)
    found = lowrank.svd(A, B)
    U, V = found.Q_B @ found.u, found.Q_A @ found.vh.mT
    s = torch.linalg.svdvals(whole)[:k]
    assert (found.s - s).norm() < 1e-12 * s[0] and (lowrank.singular_values(A, B) - s).norm() < 1e-12 * s[0]
    assert (U * found.s @ V.mT - whole).norm() < 1e-12 * s[0]
    for one in (U, V):
        assert (one.mT @ one - torch.eye(k, dtype=torch.float64)).norm() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cut_is_the_nearest_of_its_rank_and_balanced(dtype: torch.dtype) -> None:
    A, B = (factor.to(dtype) for factor in pair(12, 100, 63))
    whole = B.double() @ A.double()
    found = lowrank.svd(A, B)
    for rank in (1, 5, 12):
        new_A, new_B = found.cut(rank, torch.Generator())
        U, s, Vt = torch.linalg.svd(whole, full_matrices=False)
        best = (U[:, :rank] * s[:rank]) @ Vt[:rank]
        assert (new_B @ new_A - best).norm() < 1e-12 * s[0]
        assert (new_A @ new_A.mT - s[:rank].diag()).norm() < 1e-12 * s[0]
        assert (new_B.mT @ new_B - s[:rank].diag()).norm() < 1e-12 * s[0]
        error = lowrank.distance((A, B), (new_A, new_B), float(found.s.norm()))
        assert error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-9, abs=1e-7)


def test_a_raised_rank_keeps_b_a_and_can_be_trained() -> None:
    A, B = pair(3, 20, 15)
    found = lowrank.svd(A, B)
    new_A, new_B = found.cut(8, torch.Generator().manual_seed(0))
    assert new_A.shape == (8, 20) and new_B.shape == (15, 8)
    assert (new_B @ new_A - B @ A).norm() < 1e-12 * (B @ A).norm()
    assert torch.linalg.matrix_rank(new_A) == 8 and float(new_B[:, 3:].abs().max()) == 0
    assert 0.3 < float(new_A[3:].norm(dim=1).mean() / new_A[:3].norm(dim=1).mean()) < 3
    again, _ = found.cut(8, torch.Generator().manual_seed(0))
    assert torch.equal(new_A, again)


def test_b_zero_can_be_raised_and_cut() -> None:
    A, B = torch.randn(4, 20), torch.zeros(15, 4)
    for rank in (2, 6):
        new_A, new_B = lowrank.svd(A, B).cut(rank, torch.Generator())
        assert new_A.isfinite().all() and float(new_B.abs().max()) == 0
    assert lowrank.rank_for(lowrank.singular_values(A, B), 0.9) == 1


@pytest.mark.parametrize("scale", [1e-200, 1e-60, 1e60, 1e150])
def test_huge_and_tiny_factors(scale: float) -> None:
    A, B = pair(4, 12, 10)
    found, wanted = lowrank.svd(scale * A, B / scale), torch.linalg.svdvals(B @ A)[:4]
    assert (found.s - wanted).norm() < 1e-12 * wanted[0]
    new = found.cut(2, torch.Generator())
    error = lowrank.distance((scale * A, B / scale), new, float(found.s.norm()))
    assert error == pytest.approx(float(wanted[2:].norm() / wanted.norm()), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_singular_values(value: float) -> None:
    A, B = pair(3, 5, 4)
    A[1, 2] = value
    assert lowrank.singular_values(A, B).isnan().all() and len(lowrank.singular_values(A, B)) == 3


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.999, 3), (1.0, 3)], ids=lambda value: str(value)
)
def test_the_least_rank_that_keeps_the_energy(energy: float, rank: int) -> None:
    s = 1e-180 * torch.tensor([8.0, 4.8, 3.6, 0.0], dtype=torch.float64)  # shares 0.64, 0.2304, 0.1296
    assert lowrank.rank_for(s, energy) == rank


@pytest.mark.parametrize("size", [(40, 600), (600, 300), (500, 500)], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.3], ids=["falls", "hardly falls"])
def test_leading_singular_values_are_those_of_the_dense_svd(size: tuple[int, int], decay: float) -> None:
    """In energy, which is what an error is made of; single values are as good where the spectrum falls."""
    m, n = size
    U, V = (torch.linalg.qr(torch.randn(k, min(size), dtype=torch.float64)).Q for k in size)
    s = (1 + torch.arange(min(size), dtype=torch.float64)) ** -decay
    D = (U * s) @ V.mT
    for rank in (1, 16, 1000):
        found_U, found, found_V = lowrank.leading(D, rank)
        k = min(rank, m, n)
        assert (found_U.shape, found.shape, found_V.shape) == ((m, k), (k,), (k, n))
        lost = s[k:].square().sum()
        assert (found_U * found @ found_V - D).square().sum() - lost < 1e-3 * lost + 1e-12
        assert (found - s[:k]).abs().max() < 1e-2 * s[0]
