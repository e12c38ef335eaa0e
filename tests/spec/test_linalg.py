"""polar, geometric_mean, sqrtm, invsqrtm on every backend against the float64 reference."""

import math

import pytest
import torch
from refusals import each_refused

from reflora import linalg, reference

DTYPES = [torch.float32, torch.float64]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}


SIZES = (1, 2, 3, 8, 13, 16, 32, 33, 64, 100, 128, 150)


def spd(batch, n, condition, dtype=torch.float64):
    V = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64)).Q
    w = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    X = (V * w) @ V.mT
    return ((X + X.mT) / 2).to(dtype)


def close(got, want, tolerance):
    return (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_polar(fast_backend, dtype):
    for n in SIZES:
        X = torch.randn(3, n, n, dtype=dtype)
        Q, H = linalg.polar(X, backend=fast_backend)
        eye = torch.eye(n, dtype=torch.float64).expand(3, n, n)
        assert Q.dtype == dtype and close(Q @ H, X.double(), 20 * EXACT[dtype]), n
        assert close(Q.double().mT @ Q.double(), eye, 20 * EXACT[dtype]) and torch.equal(H, H.mT), n
        want_Q, want_H = reference.polar(X)
        k = float(torch.linalg.cond(X.double()).max())
        assert close(Q, want_Q, 20 * EXACT[dtype] * k) and close(H, want_H, 20 * EXACT[dtype] * k), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roots_and_geometric_mean(fast_backend, dtype):
    for n in SIZES:
        X, Y = spd((2,), n, 50.0, dtype), spd((2,), n, 20.0, dtype)
        tolerance = 1e3 * EXACT[dtype]
        assert close(linalg.sqrtm(X, backend=fast_backend), reference.sqrtm(X), tolerance), n
        inverse_root = linalg.invsqrtm(X, backend=fast_backend)
        assert close(inverse_root, torch.linalg.inv(reference.sqrtm(X)), tolerance), n
        mean = linalg.geometric_mean(X, Y, backend=fast_backend)
        assert mean.dtype == dtype and close(mean, reference.geometric_mean(X, Y), tolerance), n
        assert close(linalg.geometric_mean(Y, X, backend=fast_backend), mean.double(), tolerance), n


def test_ill_conditioned(fast_backend):
    for n in (4, 32, 100):
        X = spd((), n, 1e10)
        root = linalg.sqrtm(X, backend=fast_backend)
        assert close(root @ root, X, 1e-12)
        assert close(linalg.invsqrtm(X, backend=fast_backend) @ root, torch.eye(n, dtype=torch.float64), 1e-5)


def test_nan_stays_in_its_matrix(fast_backend):
    X = spd((4,), 6, 10.0)
    X[1, 2, 3] = torch.nan
    X[2] *= -1  # not positive definite
    for results in (linalg.polar(X, backend=fast_backend), (linalg.sqrtm(X, backend=fast_backend),)):
        for out in results:
            assert out[1].isnan().any() and out[[0, 3]].isfinite().all()
    assert linalg.sqrtm(X, backend=fast_backend)[2].isnan().all()


def test_shapes_dtypes_and_layouts(fast_backend):
    X = spd((2, 3), 5, 10.0)
    assert linalg.sqrtm(X, backend=fast_backend).shape == X.shape
    assert linalg.polar(X[0, 0], backend=fast_backend)[0].shape == (5, 5)
    assert torch.equal(linalg.sqrtm(X.mT, backend=fast_backend), linalg.sqrtm(X.mT.contiguous(), backend=fast_backend))
    assert linalg.sqrtm(X.bfloat16(), backend=fast_backend).dtype == torch.bfloat16
    assert linalg.sqrtm(X[:0], backend=fast_backend).shape == (0, 3, 5, 5)
    w, V = linalg.eigh(X)
    assert torch.allclose((V * w.unsqueeze(-2)) @ V.mT, X)


def test_bad_input():
    each_refused({
        "ValueError: square matrices": lambda: linalg.polar(torch.randn(3, 4)),
        "TypeError: floating-point tensor, got torch.int64": lambda: linalg.sqrtm(torch.ones(3, 3, dtype=torch.int64)),
        "ValueError: like X": lambda: linalg.geometric_mean(torch.eye(3), torch.eye(4)),
        "TypeError: Y: .* a tensor like X, got list": lambda: linalg.geometric_mean(torch.eye(3), [1.0]),
        "ValueError: backend": lambda: linalg.polar(torch.eye(3), backend="cusolver"),
    })  # fmt: skip


def test_extreme_scales_and_infinities(fast_backend):
    X, Y = spd((), 5, 10.0), spd((), 5, 20.0)
    for scale in (1e-250, 1e-160, 1e160, 1e250):
        Q, H = linalg.polar(X * scale, backend=fast_backend)
        assert close(Q, torch.eye(5, dtype=torch.float64), 1e-10) and close(H, X * scale, 1e-10)
        mean = linalg.geometric_mean(X * scale, Y / scale, backend=fast_backend)
        assert close(mean, reference.geometric_mean(X, Y), 1e-10)
        assert close(linalg.sqrtm(X * scale, backend=fast_backend) / scale**0.5, reference.sqrtm(X), 1e-10)
    X[1, 2] = torch.inf
    assert all(out.isnan().all() for out in linalg.polar(X, backend=fast_backend))


def test_the_reference_mean_is_symmetric_in_its_arguments():
    for condition in (1e6, 1e10):
        X, Y = spd((), 6, condition), spd((), 6, condition)
        mean = reference.geometric_mean(X, Y)
        assert close(reference.geometric_mean(Y, X), mean, 1e-9)


@pytest.mark.parametrize("r", [1, 3, 12])
@pytest.mark.parametrize("k", [1.0, 1.001, 1.5, 1e3, 1e10])
def test_polar_factors_are_orthogonal_to_rounding(backend, r, k):
    """Also where the iteration has next to nothing left to do: it must stop at 1, not go past it."""
    batch = 2 if backend == "triton" else 20
    U, V = (torch.linalg.qr(torch.randn(batch, r, r, dtype=torch.float64)).Q for _ in range(2))
    s = torch.logspace(0, -math.log10(k), r, dtype=torch.float64)
    X = (U * s) @ V.mT
    Q, H = linalg.polar(X, backend=backend)
    eye = torch.eye(r, dtype=torch.float64)
    assert (Q.mT @ Q - eye).abs().max() < 1e-14 * max(r, 4)
    assert (Q @ H - X).abs().max() < 1e-14 * max(r, 4)
    G = (V * s.clamp(min=1e-4)) @ V.mT
    root = linalg.sqrtm(G, backend=backend)
    assert (root @ root - G).abs().max() < 1e-14 * max(r, 4)


# X that has no inverse to begin an iteration with, or nearly none
SINGULAR = {
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
    "nilpotent": lambda n: torch.diag(torch.ones(n - 1, dtype=torch.float64), 1),
    "rank 1": lambda n: torch.randn(n, 1, dtype=torch.float64) @ torch.randn(1, n, dtype=torch.float64),
    "rank n - 1": lambda n: torch.randn(n, n - 1, dtype=torch.float64) @ torch.randn(n - 1, n, dtype=torch.float64),
    "triangular": lambda n: torch.randn(n, n, dtype=torch.float64).triu(),
    "kahan": lambda n: torch.eye(n, dtype=torch.float64) - 0.9 * torch.ones(n, n, dtype=torch.float64).triu(1),
    "graded": lambda n: torch.randn(n, n, dtype=torch.float64) * torch.logspace(0, -200, n, dtype=torch.float64),
    "1e16": lambda n: torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q @ spd((), n, 1e16),
    "permutation": lambda n: torch.eye(n, dtype=torch.float64)[torch.randperm(n)],
    "gaussian": lambda n: torch.randn(n, n, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", SINGULAR)
def test_svd_and_polar_of_any_matrix(kind, fast_backend):
    """Residual and orthogonality at most 4 times LAPACK's; the polar factors at most 20 roundings a row off."""
    for dtype in DTYPES:
        eps = torch.finfo(dtype).eps
        for n in (1, 2, 5, 16, 33, 64, 128):
            X = torch.stack([SINGULAR[kind](n) for _ in range(4)]).to(dtype)
            off = [
                max(float((M.double().mT @ M.double() - torch.eye(n)).flatten(1).norm(dim=1).max()) for M in (U, Vh))
                for U, _, Vh in (linalg.svd(X, backend=fast_backend), torch.linalg.svd(X))
            ]
            assert off[0] <= 4 * max(off[1], eps), (n, off)
            left = []
            for U, S, Vh in (linalg.svd(X, backend=fast_backend), torch.linalg.svd(X)):
                assert (S >= 0).all() and (S.diff(dim=-1) <= 0).all()
                product = (U.double() * S.double().unsqueeze(-2)) @ Vh.double()
                left.append(float((product - X.double()).flatten(1).norm(dim=1).max()) / max(float(X.norm()), 1e-300))
            assert left[0] <= 4 * max(left[1], eps), (n, left)
            Q, H = (M.double() for M in linalg.polar(X, backend=fast_backend))
            assert (Q.mT @ Q - torch.eye(n)).norm() <= 20 * eps * n, n
            assert (Q @ H - X.double()).norm() <= 20 * eps * n**0.5 * max(float(X.double().norm()), 1.0), n
            assert torch.equal(H, H.mT)


def test_signs_of_singular_vectors(fast_backend):
    Vh = linalg.svd(torch.randn(20, 7, 7), backend=fast_backend).Vh
    assert (Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_roots(dtype, fast_backend):
    for n in (1, 4, 16, 33, 128):
        X = spd((3,), n, 1e3, dtype)
        w, V = torch.linalg.eigh(X.double())
        for p, eps in ((1, 0.0), (2, 1e-3), (4, 0.0), (3.5, 0.1)):
            want = (V * (w + eps).pow(-1 / p).unsqueeze(-2)) @ V.mT
            got = linalg.inv_root(X, p, eps=eps, backend=fast_backend)
            assert got.dtype == dtype and torch.equal(got, got.mT)
            assert close(got, want, 1e3 * EXACT[dtype]), (n, p)


def test_inverse_roots_of_scaled_and_singular_matrices(fast_backend):
    X = spd((), 5, 10.0)
    for scale in (1e-250, 1e250):
        got = linalg.inv_root(X * scale, 4, backend=fast_backend)
        assert close(got * scale**0.25, linalg.inv_root(X, 4, backend=fast_backend), 1e-12)
    x = torch.randn(6, 2, dtype=torch.float64)
    low = x @ x.mT
    damped = linalg.inv_root(low, 4, eps=1e-4, backend=fast_backend)
    want = torch.linalg.matrix_power(damped, 4) @ (low + 1e-4 * torch.eye(6))
    assert close(want, torch.eye(6, dtype=torch.float64), 1e-7)
    assert linalg.inv_root(0 * low, 4, backend=fast_backend).isnan().all()
    stack = torch.stack([low + torch.eye(6), -low, torch.full_like(low, torch.nan), torch.eye(6)])
    result = linalg.inv_root(stack, 2, eps=1e-8, backend=fast_backend)
    assert result[[0, 3]].isfinite().all() and result[[1, 2]].isnan().all()


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float64, 1e-12)])
def test_inverse_roots_of_grams_of_low_rank(dtype, eps, backend):
    """X is known to the rounding of its own type: what that has made negative is no eigenvalue below zero."""
    for n in (4, 8) if backend == "triton" else (8, 64, 128):
        G = torch.randn(3, n, n // 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        X = (G @ G.mT).to(dtype)
        precisions = ["float64", "float32"]
        if backend == "triton":  # which compiles each
            precisions = precisions[: 1 if dtype == torch.float64 else None][-1:]
        for precision in precisions:
            root = linalg.inv_root(X, 4, eps=eps, backend=backend, precision=precision)
            assert root.isfinite().all(), (n, precision)
    assert linalg.inv_root(-X, 4, eps=eps, backend=backend, precision=precision).isnan().all()


def test_roots_past_any_condition(fast_backend):
    for tail in (1e-30, 1e-36, 1e-60, 1e-200):
        X = torch.diag(torch.tensor([1.0, 0.5, tail], dtype=torch.float64))
        root = linalg.sqrtm(X, backend=fast_backend)
        assert close(root, X.sqrt(), 1e-14), tail
        assert close(linalg.invsqrtm(X, backend=fast_backend) @ root, torch.eye(3, dtype=torch.float64), 1e-12), tail
        assert close(linalg.geometric_mean(torch.eye(3).double(), X, backend=fast_backend), X.sqrt(), 1e-14), tail


def test_the_whole_range_of_float32(fast_backend):
    X = torch.diag(torch.tensor([1e-25, 1e30]))
    assert close(linalg.sqrtm(X, backend=fast_backend).diagonal(), X.double().diagonal().sqrt(), 1e-6)
    S = linalg.svd(torch.diag(torch.tensor([1e-20, 1e30])), backend=fast_backend).S
    assert float(S[1]) == pytest.approx(1e-20)
