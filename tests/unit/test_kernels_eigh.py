"""The eigensolver kernels and what stands on them, against LAPACK: the same accuracy on every kind of matrix."""

from functools import partial

import pytest
import torch
from kernel_cases import DEVICE, DOUBLE, MARKS
from spectra import BAR, KINDS, errors, matrices, rotated

from reflora.backends import torch_backend, triton_backend

pytestmark = MARKS
SINGLE = torch.float32
THOROUGH = partial(pytest.param, marks=pytest.mark.thorough)
UNIT = 2.2e-16
PRECISIONS = [(SINGLE, "float32"), (DOUBLE, "float64")]
FEW = {
    3: ("gaussian", "repeated", "graded rows"),
    12: ("close to I", "graded rows", "glued wilkinson", "permuted diagonal"),
    16: ("gaussian", "lapack geometric", "orthogonal"), 17: ("repeated", "graded over 1e12", "permuted diagonal"),
    31: ("lapack clustered", "arrow"), 32: ("graded over 1e12", "orthogonal"),
}  # fmt: skip


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE)).Q


def of(w):
    return rotated(w[None])[0]


def kinds(n):
    """Symmetric float64 matrices by name."""
    return {kind: matrices(kind, 1, n, DOUBLE)[0] for kind in KINDS}


def stack(matrices, dtype):
    return torch.stack(list(matrices)).to(DEVICE, dtype)


def scaled(X):
    """Float64, over the largest element of each matrix or of float32's normal numbers."""
    top = X.double().abs().amax((1, 2), keepdim=True)
    return X.double() / top.where(top > 0, torch.ones_like(top)), top.where(top > 0, torch.ones_like(top))


def assert_like_lapack(errors, lapack, eps, n):
    """At most 4 times the error of LAPACK, and where that is next to nothing, at most a rounding or two a row."""
    bound = 4 * lapack.clamp_min(eps * max(1.0, n**0.5 / 2))
    assert bool((errors <= bound).all()), (errors / eps, lapack / eps)


def check_eigh(X, precision, V0=None):
    w, V = triton_backend.eigh(X, precision, V0)
    assert w.isfinite().all() and V.isfinite().all()
    assert bool((w.diff(dim=1) >= 0).all())
    for got, bar in zip(errors(X.cpu(), w.cpu(), V.cpu()), errors(X.cpu(), *torch.linalg.eigh(X.cpu()))):
        assert got <= BAR * bar, (got, bar)
    return w, V


@pytest.mark.parametrize("dtype, precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 2, 5, *FEW])
def test_every_kind_of_matrix(n, dtype, precision):
    check_eigh(stack([kinds(n)[kind] for kind in FEW.get(n, KINDS)], dtype), precision)


@pytest.mark.parametrize(
    "n, kind", [*map(THOROUGH, (5, 5, 64), ("graded over 1e12", "close to I", "graded rows")), (128, "close to I")]
)
def test_mixed_precision_and_large_ones(n, kind):
    precision = "float64" if n == 5 else "float32"
    check_eigh(kinds(n)[kind][None].to(DEVICE, SINGLE), precision)


@pytest.mark.parametrize("dtype, scales", [(SINGLE, (1e30, 1e-30, 1e-40)), (DOUBLE, (1e300, 1e-300, 1e-316))])
def test_scales(dtype, scales):
    """Denormal ones too: what their spacing leaves of a matrix is decomposed exactly as the same numbers near 1."""
    g = torch.randn(7, 7, dtype=DOUBLE)
    X = stack([scale * (g + g.mT) for scale in scales], dtype)
    precision = "float32" if dtype == SINGLE else "float64"
    w, V = triton_backend.eigh(X, precision)
    y, top = scaled(X)
    power = torch.exp2(torch.floor(torch.log2(top)))
    values, vectors = triton_backend.eigh((X.double() / power).to(dtype), precision)
    assert torch.equal(V, vectors)
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((w.double() - values.double() * power.squeeze(-1)).abs() <= spacing).all())


def test_values_alone_have_the_same_bits():
    X = stack([kinds(9)[k] for k in ("gaussian", "graded rows", "repeated")], SINGLE)
    w, V = triton_backend.eigh(X, "float32")
    values, none = triton_backend.eigh(X, "float32", vectors=False)
    assert none is None and torch.equal(values, w)


def test_a_matrix_does_not_depend_on_its_batch():
    X = stack(kinds(6).values(), DOUBLE)
    w, V = triton_backend.eigh(X, "float64")
    for k in (0, 4, 8):
        alone = triton_backend.eigh(X[k : k + 1].clone(), "float64")
        assert torch.equal(alone[0][0], w[k]) and torch.equal(alone[1][0], V[k])


def test_bad_matrices_give_nan_and_only_theirs():
    good = stack([kinds(5)["gaussian"]], SINGLE)
    X = good.repeat(4, 1, 1)
    X[1, 2, 3], X[2, 0, 0], X[3] = torch.nan, -torch.inf, torch.inf
    bad = torch.tensor([False, True, True, True], device=DEVICE)
    for results in (triton_backend.eigh(X, "float32"), triton_backend.svd(X, "float32")):
        for result in results:
            assert torch.equal(result.isnan().flatten(1).all(1), bad) and result[0].isfinite().all()
    root = triton_backend.inv_root(X @ X.mT, 2.0, 0.1, UNIT, "float32")
    assert torch.equal(root.isnan().flatten(1).all(1), bad) and root[0].isfinite().all()


@pytest.mark.parametrize("n", [THOROUGH(5), 6], ids=["unaligned", "aligned"])
def test_out_is_written_and_nothing_beside_it(n):
    X = stack([kinds(n)["gaussian"], kinds(n)["rank 1"]], DOUBLE)
    room = torch.full((4, n, n), torch.nan, dtype=DOUBLE, device=DEVICE)
    values = torch.full((4, n), torch.nan, dtype=DOUBLE, device=DEVICE)
    w, V = triton_backend.eigh(X, "float64", out=(values[1:3], room[1:3]))
    assert w.data_ptr() == values[1].data_ptr() and V.data_ptr() == room[1].data_ptr()
    for written in (room, values):
        assert written[1:3].isfinite().all() and written[[0, 3]].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip((w, V), triton_backend.eigh(X, "float64")))


@pytest.mark.parametrize("dtype, precision", PRECISIONS)
def test_signs(dtype, precision):
    """The first component of the largest magnitude is positive, as the numbers are stored."""
    X = stack([kinds(4)[k] for k in ("gaussian", "orthogonal", "permutation", "ones", "lapack zero")], dtype)
    for vectors in (triton_backend.eigh(X, precision)[1], triton_backend.svd(X, precision)[2].mT):
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        assert bool((largest > 0).all())


@pytest.mark.parametrize("dtype, precision", [PRECISIONS[0], THOROUGH(*PRECISIONS[1])])
def test_warm_start(dtype, precision):
    """Good or bad, a start changes rounding only; a bad one is as if there were none."""
    X = stack([kinds(6)[k] for k in ("gaussian", "repeated", "gaussian", "graded over 1e12", "close to I")], dtype)
    start = torch.linalg.eigh((X + 1e-3 * X.mean()).double())[1].to(dtype)
    start[1] = torch.randn_like(start[1])
    start[2, 4, 5] = torch.nan
    start[3] = 1e30
    w, V = check_eigh(X, precision, start)
    cold = triton_backend.eigh(X, precision)
    for k in (1, 2, 3):
        assert torch.equal(w[k], cold[0][k]) and torch.equal(V[k], cold[1][k])
    check_eigh(X, precision, V)


def singular_kinds(n):
    g, s = torch.randn(n, n, dtype=DOUBLE), torch.logspace(0, -14, n, dtype=DOUBLE)
    return {
        "gaussian": g,
        "graded": (orthogonal(n) * s) @ orthogonal(n),
        "graded rows": g * s[:, None],
        "graded columns": g * s,
        "half rank": g[:, : (n + 1) // 2] @ g[: (n + 1) // 2],
        "rank 1": g[:, :1] @ g[:1],
        "negative definite": -g @ g.mT,
        "orthogonal": orthogonal(n),
        "nilpotent": torch.diag(torch.ones(n - 1, dtype=DOUBLE), 1),
        "nearly nilpotent": torch.diag(torch.ones(n - 1, dtype=DOUBLE), 1) + 1e-6 * torch.eye(n, dtype=DOUBLE),
        "zero": 0 * g,
        "large": 1e30 * g,
        "small": 1e-30 * g,
    }


def singular_errors(X, U, S, Vh):
    x, top = scaled(X)
    U, S, Vh = U.double(), S.double() / top.squeeze(-1), Vh.double()
    eye, size = torch.eye(x.shape[1], dtype=DOUBLE, device=x.device), x.flatten(1).norm(dim=1).clamp_min(1e-300)
    parts = (x - (U * S.unsqueeze(1)) @ Vh, U.mT @ U - eye, Vh @ Vh.mT - eye)
    residual, left, right = (part.flatten(1).norm(dim=1) for part in parts)
    values = (S - torch.linalg.svdvals(x)).abs().amax(1)
    return torch.stack([residual / size, left, right, values / size], 1)


@pytest.mark.parametrize(
    "dtype, precision, n", [*((*t, n) for t in PRECISIONS for n in (1, 5)), THOROUGH(*PRECISIONS[0], 20)]
)
def test_svd(dtype, precision, n):
    names = singular_kinds(n)
    if n != 5:
        names = {k: names[k] for k in ("graded", "half rank", "nearly nilpotent")}
    X = stack(names.values(), dtype)
    U, S, Vh = triton_backend.svd(X, precision)
    assert all(result.isfinite().all() for result in (U, S, Vh))
    assert bool((S.diff(dim=1) <= 0).all()) and bool((S >= 0).all())
    x = scaled(X)[0].to(getattr(torch, precision)).cpu()
    want = singular_errors(x, *torch.linalg.svd(x)).to(DEVICE)
    assert_like_lapack(singular_errors(X, U, S, Vh), want, max(torch.finfo(x.dtype).eps, torch.finfo(dtype).eps), n)


def spd(n, orders, scale=1.0):
    return scale * of(torch.logspace(0, -orders, n, dtype=DOUBLE))


ROOTS = [(1, 2, 0.0, 1.0), (5, 2, 0.0, 1e30), (3, 4, 1e-3, 1.0), (12, 3.3, 0.0, 1e-30), (3, 0.5, 0.1, 1.0)]
ACCURACY = [(SINGLE, "float32", 1e-4), (SINGLE, "float64", 1e-6), (DOUBLE, "float64", 1e-12)]


@pytest.mark.parametrize("dtype, precision, rtol", ACCURACY)
@pytest.mark.parametrize("n, p, eps, scale", ROOTS)
def test_inv_root(n, p, eps, scale, dtype, precision, rtol):
    X = stack([spd(n, 2, scale)], dtype)
    w, V = torch.linalg.eigh(X.double())
    want = (V * (w + eps).pow(-1 / p).unsqueeze(1)) @ V.mT
    got = triton_backend.inv_root(X, p, eps, UNIT, precision)
    assert torch.equal(got, got.mT)
    assert float((got.double() - want).norm() / want.norm()) < rtol


def test_inv_root_of_what_has_none():
    """Singular or negative X without enough eps is NaN; a negative eigenvalue of the size of rounding counts as 0."""
    negative = torch.diag(torch.tensor([1.0, 2.0, -1.0, 1.0], dtype=DOUBLE))
    X = stack(
        [spd(4, 1), negative, torch.zeros(4, 4, dtype=DOUBLE), spd(4, 1) - 0.1 * (1 + 1e-16) * torch.eye(4)], DOUBLE
    )
    for eps, want in ((0.0, [False, True, True]), (0.5, [False, True, False]), (2.0, [False, False, False])):
        root = triton_backend.inv_root(X, 2.0, eps, UNIT, "float64")
        assert root[:3].isnan().flatten(1).all(1).tolist() == want
        assert eps == 0 or root[3].isfinite().all()
    assert float(triton_backend.inv_root(X[2:3], 4.0, 1e-8, UNIT, "float64")[0, 0, 0]) == pytest.approx(100.0)


def test_one_launch_a_call(monkeypatch):
    from reflora import linalg
    from reflora.kernels.linalg import eigh, inv_root, svd

    launches = []
    for module, name in ((eigh, "eigh_kernel"), (svd, "svd_kernel"), (inv_root, "inv_root_kernel")):
        kernel = getattr(module, name)
        monkeypatch.setattr(
            kernel, "run", lambda *a, _n=name, _r=kernel.run, **k: launches.append(_n) or _r(*a, **k)
        )  # fmt: skip
    X = stack([spd(3, 1), spd(3, 2)], SINGLE).expand(2, 2, 3, 3)
    how = {"backend": "triton", "precision": "float32"}
    linalg.eigh(X, **how), linalg.eigvalsh(X, **how), linalg.svd(X, **how), linalg.inv_root(X, 4, **how)
    assert launches == ["eigh_kernel", "eigh_kernel", "svd_kernel", "inv_root_kernel"]


def test_what_torch_serves():
    X = stack([spd(130, 1)], DOUBLE)
    for function, *arguments in (("eigh",), ("svd",), ("inv_root", 2.0, 0.0, UNIT)):
        got, want = (getattr(b, function)(X, *arguments, "float64") for b in (triton_backend, torch_backend))
        for a, b in zip(got, want):
            assert torch.equal(a, b)
    assert triton_backend.eigh(X[:0], "float64")[0].shape == (0, 130)
