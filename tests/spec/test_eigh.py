"""Eigenvalues and eigenvectors on matrices that are hard on solvers, beside LAPACK in the same precision."""

import pytest
import torch
from spectra import BAR, DOUBLE, DTYPES, KINDS, SCALES, SIZES, eigenvalue_error, errors, matrices

from reflora import linalg


def check(X, backend, what):
    w, V = linalg.eigh(X, backend=backend)
    assert w.isfinite().all() and V.isfinite().all(), what
    assert (w.diff(dim=-1) >= 0).all(), what
    lapack = torch.linalg.eigh(X)
    for name, got, bar in zip(("residual", "orthogonality"), errors(X, w, V), errors(X, *lapack)):
        assert got <= BAR * bar, (what, name, got, bar)
    if X.dtype == torch.float32 and len(X) >= 30:  # the worst of a few says little
        got, bar = eigenvalue_error(X, w), eigenvalue_error(X, lapack[0])
        assert got <= BAR * bar, (what, "eigenvalues", got, bar)
    return w, V


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_lapack(kind, dtype, fast_backend):
    assert sum(SIZES.values()) == 1000
    for n, count in SIZES.items():
        if fast_backend == "torch":  # which is LAPACK behind a scaling
            count //= 20
        check(matrices(kind, count, n, dtype), fast_backend, (kind, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", [0, 1, 2], ids=["huge", "tiny", "subnormal"])
def test_scales(dtype, end, fast_backend):
    for kind in ("gaussian", "lapack clustered", "graded over 1e12", "rank 1"):
        for n in (1, 2, 7, 33):
            check(matrices(kind, 20, n, dtype, SCALES[dtype][end]), fast_backend, (kind, n))


def test_every_size(fast_backend):
    for n in range(1, 131):
        check(matrices("gaussian", 3, n, torch.float32), fast_backend, n)


def test_signs_and_order(fast_backend):
    X = matrices("gaussian", 20, 9, DOUBLE)
    w, V = linalg.eigh(X, backend=fast_backend)
    largest = V.gather(-2, V.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    # of equal ones the first decides
    _, V = linalg.eigh(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), backend=fast_backend)
    assert (V[0] > 0).all() or (V.abs()[1] > V.abs()[0]).any()


def test_values_alone_have_the_same_bits(fast_backend):
    for dtype in DTYPES:
        for n in (1, 4, 32, 40, 128):
            X = matrices("gaussian", 9, n, dtype)
            assert torch.equal(linalg.eigvalsh(X, backend=fast_backend), linalg.eigh(X, backend=fast_backend)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_has_the_same_bits_in_every_batch(dtype):
    """Alone, in the lane of a vector, in a batch that fills no vector, with one thread or two."""
    general = [linalg.eigh, linalg.svd, linalg.polar, linalg.eigvalsh]
    definite = [linalg.sqrtm, lambda P: linalg.inv_root(P, 4, eps=1e-6)]
    threads = torch.get_num_threads()
    for n in (1, 2, 3, 8, 16, 20, 32, 33, 64, 100, 128):
        X = matrices("gaussian", 40 if n < 64 else 19, n, dtype)
        X[3] = matrices("wilkinson", 1, n, dtype)[0]  # its lane goes its own way
        X[4] = 0
        P = X @ X.mT + torch.eye(n)  # once: torch's product of a part may have other bits
        for f, M in (*((f, X) for f in general), *((f, P) for f in definite)):
            flat = lambda result: (result,) if isinstance(result, torch.Tensor) else tuple(result)  # noqa: E731
            whole = flat(f(M))
            torch.set_num_threads(2)
            again = flat(f(M))
            torch.set_num_threads(threads)
            for few in (slice(0, 1), slice(3, 5), slice(7, 18), slice(2, None, 3)):
                part = flat(f(M[few].contiguous()))
                assert all(torch.equal(p.view_as(w[few]), w[few]) for p, w in zip(part, whole)), (n, few)
            assert all(torch.equal(one, other) for one, other in zip(whole, again)), n


def test_nan_stays_in_its_matrix(fast_backend):
    for n in (2, 6, 40):
        X = matrices("gaussian", 20, n, torch.float32)
        clean = linalg.eigh(X, backend=fast_backend)
        X[4, 1, 0], X[11, 0, 0], X[12, 1, 1] = torch.nan, torch.inf, -torch.inf
        w, V = linalg.eigh(X, backend=fast_backend)
        bad = torch.zeros(20, dtype=torch.bool)
        bad[[4, 11, 12]] = True
        assert w[bad].isnan().all() and V[bad].isnan().all()
        assert torch.equal(w[~bad], clean[0][~bad]) and torch.equal(V[~bad], clean[1][~bad])


@pytest.mark.parametrize("start", ["good", "identity", "zero", "nan", "huge", "random"])
def test_any_start_gives_the_right_answer(start, fast_backend):
    X = matrices("gaussian", 5, 12, DOUBLE)
    w, V = linalg.eigh(X, backend=fast_backend)
    V0 = {
        "good": V + 1e-4 * torch.randn_like(V), "identity": torch.eye(12, dtype=DOUBLE).expand_as(V),
        "zero": torch.zeros_like(V), "nan": torch.full_like(V, torch.nan), "huge": 1e300 * torch.ones_like(V),
        "random": torch.randn_like(V),
    }[start]  # fmt: skip
    again = linalg.eigh(X, V0=V0, backend=fast_backend)
    assert torch.allclose(again[0], w, atol=1e-13, rtol=1e-13) and torch.allclose(again[1], V, atol=1e-11)


def test_the_symmetric_part_counts(fast_backend):
    X = torch.randn(7, 5, 5, dtype=DOUBLE)
    w, V = linalg.eigh(X, backend=fast_backend)
    want = linalg.eigh((X + X.mT) / 2, backend=fast_backend)
    assert torch.allclose(w, want[0], atol=1e-13) and torch.allclose(V, want[1], atol=1e-11)


def test_precision(fast_backend):
    X = matrices("gaussian", 9, 20, torch.float32)
    exact = torch.linalg.eigvalsh(X.double())
    w, V = linalg.eigh(X, precision="float64", backend=fast_backend)
    assert w.dtype == V.dtype == torch.float32
    assert torch.equal(w, exact.float())
    half = linalg.eigh(X.bfloat16(), backend=fast_backend)
    assert half.eigenvalues.dtype == half.eigenvectors.dtype == torch.bfloat16


def test_names_of_torch():
    X = torch.eye(3)
    assert linalg.eigh(X).eigenvalues.shape == (3,) and linalg.eigh(X).eigenvectors.shape == (3, 3)
    U, S, Vh = linalg.svd(X)
    assert torch.equal(linalg.svd(X).S, S) and U.shape == Vh.shape


def test_elements_of_all_magnitudes(fast_backend):
    """LAPACK gives up on some of these: what is nothing beside the rest underflows on its way."""
    for dtype, low, high in ((torch.float32, -140, 120), (DOUBLE, -1060, 1000)):
        for n in (2, 3, 5, 9, 17, 33):
            exponents = torch.rand(60, n, n, dtype=DOUBLE) * torch.rand(60, 1, 1) * (high - low) + low
            X = torch.ldexp(torch.randn(60, n, n, dtype=DOUBLE), exponents.floor())
            X = ((X + X.mT) / 2).to(dtype)
            w, V = linalg.eigh(X, backend=fast_backend)
            # of an eigenvalue of X the sum of roundings is what all methods are off by
            assert max(errors(X, w, V)) <= 4 * n, n


def test_torch_tries_again_where_lapack_gives_up(monkeypatch):
    from reflora.backends import torch_linalg

    X, calls = matrices("gaussian", 3, 5, torch.float32), []

    def unwilling(X):
        calls.append(X)
        if len(calls) < 3:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return torch.linalg.eigh(X)

    w, V = torch_linalg._stubborn(unwilling, X)
    assert [call.dtype for call in calls] == [torch.float32, torch.float32, DOUBLE]
    assert torch.allclose(w, torch.linalg.eigh(X)[0], atol=1e-5) and V.dtype == torch.float32
