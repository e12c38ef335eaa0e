"""The kernels over batches of matrices against the float64 reference."""

import pytest
import torch
from kernel_cases import DEVICE, DOUBLE, MARKS

from reflora import reference
from reflora.backends import triton_backend

pytestmark = MARKS
TYPES = ((torch.float32, 1e-6), (DOUBLE, 1e-11))


def spd(batch, n, k, dtype, scale=1.0):
    V = torch.linalg.qr(torch.randn(batch, n, n, dtype=DOUBLE)).Q
    w = scale * torch.logspace(0, -torch.log10(torch.tensor(float(k))).item(), n, dtype=DOUBLE)
    return ((V * w) @ V.mT).to(DEVICE, dtype)


def close(got, want, rtol):
    assert got.isfinite().all()
    error = (got.double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert float(error.max()) < rtol, error


LARGE = pytest.param(DOUBLE, 1e-11, 33, marks=pytest.mark.thorough)


@pytest.mark.parametrize("dtype, rtol, n", [*((*t, n) for t in TYPES for n in (1, 2, 5, 12)), LARGE])
def test_against_the_reference(dtype, rtol, n):
    batch = 2 if n < 20 else 1
    X, Y, G = spd(batch, n, 100, dtype), spd(batch, n, 30, dtype, 7.0), torch.randn(batch, n, n).to(DEVICE, dtype)
    Q, H = triton_backend.polar(G, "float64")
    wantQ, wantH = reference.polar(G)
    condition = float(torch.linalg.cond(G.double()).max())
    close(Q, wantQ, rtol * max(1.0, condition * 1e-3))
    close(H, wantH, rtol)
    close(triton_backend.geometric_mean(X, Y, "float64"), reference.geometric_mean(X, Y), rtol)
    close(triton_backend.sqrtm(X, "float64", False), reference.sqrtm(X), rtol)
    close(triton_backend.sqrtm(X, "float64", True), torch.linalg.inv(reference.sqrtm(X)), 1e2 * rtol)


def test_float32_arithmetic():
    X, Y = spd(2, 9, 10, torch.float32, 1e30), spd(2, 9, 10, torch.float32, 1e-30)
    close(triton_backend.geometric_mean(X, Y, "float32"), reference.geometric_mean(X, Y), 1e-4)
    close(triton_backend.sqrtm(X, "float32", False), reference.sqrtm(X), 1e-4)
    Q, H = triton_backend.polar(X, "float32")
    close(Q @ H / 1e30, X.double() / 1e30, 1e-4)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (DOUBLE, 1e-12)])
@pytest.mark.parametrize("n, rank", [(1, 0), (6, 0), (6, 1), (6, 5), (20, 13)])
def test_polar_of_singular_matrices(n, rank, dtype, rtol):
    """Q is not unique, but it is orthogonal, H is positive semidefinite and Q H is X."""
    X = (torch.randn(2, n, rank, dtype=DOUBLE) @ torch.randn(2, rank, n, dtype=DOUBLE)).to(DEVICE, dtype)
    Q, H = (M.double() for M in triton_backend.polar(X, "float64"))
    eye = torch.eye(n, dtype=DOUBLE, device=DEVICE)
    assert float((Q.mT @ Q - eye).abs().max()) < rtol
    size = max(float(X.double().norm()), 1.0)
    assert float((Q @ H - X.double()).norm()) < rtol * size
    assert torch.equal(H, H.mT) and float(torch.linalg.eigvalsh(H).min()) > -rtol * size


def test_bad_matrices_give_nan_and_only_theirs():
    good, bad = (
        spd(1, 4, 10, DOUBLE),
        torch.diag(torch.tensor([1.0, 2.0, -1.0, 1.0], dtype=DOUBLE, device=DEVICE))[None],
    )
    X = torch.cat([good, bad, good * torch.nan, good * torch.inf])
    for result in (
        triton_backend.sqrtm(X, "float64", False), triton_backend.sqrtm(X, "float64", True),
        triton_backend.geometric_mean(X, good.expand(4, 4, 4).contiguous(), "float64"),
    ):  # fmt: skip
        assert result[0].isfinite().all() and result[1:].isnan().all()
    Q, H = triton_backend.polar(X, "float64")
    assert Q[:2].isfinite().all() and Q[2:].isnan().all() and H[2:].isnan().all()


def test_sizes_that_torch_serves():
    X = spd(1, 130, 10, DOUBLE)
    close(triton_backend.sqrtm(X, "float64", False), reference.sqrtm(X), 1e-11)
    assert triton_backend.sqrtm(X[:0], "float64", False).shape == (0, 130, 130)
