"""The functions of reflora.linalg as operators: shapes ahead of a run, torch.compile, gradients; and out=."""

import numpy as np
import pytest
import torch
from refusals import each_refused, refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from reflora import linalg

DOUBLE = torch.float64


def symmetric(*shape, dtype=DOUBLE):
    X = torch.randn(*shape, shape[-1], dtype=dtype)
    return (X + X.mT) / 2


def spd(*shape, dtype=DOUBLE):
    X = torch.randn(*shape, shape[-1], dtype=DOUBLE)
    return (X @ X.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=DOUBLE)).to(dtype)


CALLS = {
    **{name: getattr(linalg, name) for name in ("eigh", "eigvalsh", "svd", "polar", "sqrtm", "invsqrtm")},
    "geometric_mean": lambda X, **options: linalg.geometric_mean(X, X + X.mT, **options),
    "inv_root": lambda X, **options: linalg.inv_root(X, 4, eps=1e-6, **options),
}


def flat(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


@pytest.mark.parametrize("name", CALLS)
def test_out(name, fast_backend):
    for dtype in (torch.float32, DOUBLE, torch.bfloat16):
        X = spd(2, 3, 5, dtype=dtype)
        want = flat(CALLS[name](X, backend=fast_backend))
        contiguous = [torch.full_like(result, torch.nan) for result in want]
        strided = [torch.full((*result.shape, 2), torch.nan, dtype=dtype)[..., 0] for result in want]
        for out in (contiguous, strided):
            given = out[0] if len(out) == 1 else tuple(out)
            got = flat(CALLS[name](X, out=given, backend=fast_backend))
            assert all(one is other for one, other in zip(got, out))
            assert all(torch.equal(one, other) for one, other in zip(got, want))
    # over the input itself
    X = spd(4, 5)
    want = flat(CALLS[name](X, backend=fast_backend))
    if len(want) == 1 and want[0].shape == X.shape:
        assert torch.equal(CALLS[name](X, out=X, backend=fast_backend), want[0])


def test_bad_out():
    X, (w, V) = symmetric(2, 3), (torch.zeros(2, 3, dtype=DOUBLE), torch.zeros(2, 3, 3, dtype=DOUBLE))
    room = torch.zeros(3, 3, 3, dtype=DOUBLE)
    each_refused({
        "TypeError: eigh, out: expected 2 tensors, got Tensor": lambda: linalg.eigh(X, out=w),
        "TypeError: eigh, out: expected 2 tensors, got int": lambda: linalg.eigh(X, out=5),
        "TypeError: svd, out: expected 3 tensors, got 1": lambda: linalg.svd(X, out=(V,)),
        r"ValueError: out\[0\]: expected \(2, 3\)": lambda: linalg.eigh(X, out=(V, V)),
        r"ValueError: out\[1\]: expected .* torch.float64": lambda: linalg.eigh(X, out=(w, V.float())),
        "RuntimeError: Detach it": lambda: linalg.eigh(X.clone().requires_grad_(), out=(w, V)),
        r"RuntimeError: out\[1\]: .* does not require": lambda: linalg.eigh(X, out=(w, V.clone().requires_grad_())),
        r"ValueError: out\[1\]: expected memory of its own": lambda: linalg.polar(X, out=(V, V)),
        "ValueError: expected memory of its own": lambda: linalg.polar(X, out=(room[:2], room[1:])),
    }, w, V, room)  # fmt: skip


def test_bad_arguments():
    X = symmetric(2, 3)
    each_refused({
        "TypeError: sqrtm: expected a dense floating-point tensor": lambda: linalg.sqrtm(torch.eye(3).to_sparse()),
        "ValueError: V0: expected .* like X": lambda: linalg.eigh(X, V0=X[0]),
        "ValueError: inv_root, eps": lambda: linalg.inv_root(X, 4, eps=-1.0),
    })  # fmt: skip
    for p in (0, -1, float("inf"), True, "4"):
        with refused("inv_root, p: expected a finite number > 0"):
            linalg.inv_root(X, p)


@pytest.mark.parametrize("name", CALLS)
def test_one_operator_under_compile(name):
    X = spd(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for got, want in zip(flat(compiled(X)), flat(CALLS[name](X))):
        assert torch.equal(got, want)


def test_operators_keep_their_contract():
    X, ops = spd(2, 4), torch.ops.reflora
    differentiable = X.clone().requires_grad_()
    for op, arguments in (
        (ops.eigh, (differentiable, None, "", "float64")), (ops.eigh, (X, X.clone(), "", "float64")),
        (ops.eigvalsh, (X, "", "float64")), (ops.svd, (X, "", "float64")), (ops.polar, (X, "", "float64")),
        (ops.geometric_mean, (X, X + 1, "", "float64")), (ops.sqrtm, (differentiable, False, "", "float64")),
        (ops.sqrtm, (differentiable, True, "", "float64")), (ops.inv_root, (X, 4.0, 0.0, "", "float64")),
    ):  # fmt: skip
        torch.library.opcheck(op, arguments)


def test_gradients():
    X = spd(2, 5).requires_grad_()

    def of_vectors(X):
        w, V = linalg.eigh((X + X.mT) / 2)
        return w, V * V  # whatever their signs

    assert torch.autograd.gradcheck(of_vectors, X)
    assert torch.autograd.gradcheck(lambda X: linalg.eigvalsh((X + X.mT) / 2), X)
    assert torch.autograd.gradcheck(lambda X: linalg.sqrtm((X + X.mT) / 2), X)
    assert torch.autograd.gradcheck(lambda X: linalg.invsqrtm((X + X.mT) / 2), X)


def test_gradients_where_eigenvalues_coincide():
    X = torch.eye(4, dtype=DOUBLE).requires_grad_()
    w, V = linalg.eigh(X)
    (w.sum() + V.sum()).backward()
    assert torch.allclose(X.grad, torch.eye(4, dtype=DOUBLE))


def test_out_may_overlap_an_input_and_is_seen_by_autograd(fast_backend):
    X, buffer = spd(40, 3), spd(41, 3)
    want = linalg.geometric_mean(X, buffer[:40].clone(), backend=fast_backend)
    assert torch.equal(linalg.geometric_mean(X, buffer[:40], out=buffer[1:], backend=fast_backend), want)
    used, a = torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    product = (a * used).sum()
    linalg.eigvalsh(spd(2, 3), out=used, backend=fast_backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_out_under_compile():
    X, w, V = spd(2, 3), torch.empty(2, 3, dtype=DOUBLE), torch.empty(2, 3, 3, dtype=DOUBLE)
    torch._dynamo.reset()
    torch.compile(lambda X, w, V: linalg.eigh(X, out=(w, V)), fullgraph=True, backend="aot_eager")(X, w, V)
    assert torch.equal(w, linalg.eigh(X).eigenvalues) and torch.equal(V, linalg.eigh(X).eigenvectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_of_close_eigenvalues_are_finite(dtype):
    X = torch.diag(torch.tensor([1e-3, 1.001e-3, 1.0 if dtype == torch.float16 else 1e-40])).to(dtype).requires_grad_()
    linalg.eigvalsh(X).sum().backward()
    assert torch.allclose(X.grad.float(), torch.eye(3), atol=1e-3)
    X.grad = None
    w, V = linalg.eigh(X)
    (w.sum() + V.square().sum()).backward()
    assert X.grad.isfinite().all()


def test_autocast_changes_nothing(fast_backend):
    X = spd(2, 8, dtype=torch.float32).requires_grad_()

    def run():
        X.grad = None
        linalg.sqrtm(X, backend=fast_backend, precision="float32").sum().backward()
        return linalg.geometric_mean(X, X + X.mT, backend=fast_backend, precision="float32"), X.grad

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(run(), want))


def test_traced_by_make_fx():
    traced = make_fx(lambda X: linalg.eigvalsh(X))(spd(3))
    X = spd(3)
    assert torch.equal(traced(X), linalg.eigvalsh(X))


def test_tensors_without_memory():
    """Shapes alone, outside of torch.compile."""
    real = torch.eye(3).repeat(2, 1, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert linalg.geometric_mean(real, torch.empty(2, 3, 3)).shape == (2, 3, 3)
        assert linalg.eigvalsh(real, out=torch.empty(2, 3)).shape == (2, 3)
    with FakeTensorMode():
        for call in CALLS.values():
            for result in flat(call(torch.empty(2, 3, 3))):
                assert result.shape in ((2, 3, 3), (2, 3))


def test_numbers_of_numpy():
    X = spd(2, 3)
    want = linalg.inv_root(X, 4, eps=0.5)
    assert torch.equal(linalg.inv_root(X, np.int64(4), eps=np.float32(0.5)), want)


def test_no_graph_where_none_is_asked_for():
    X = spd(3).requires_grad_()
    with torch.no_grad():
        assert not linalg.eigh(X).eigenvalues.requires_grad
    assert linalg.eigh(X).eigenvalues.requires_grad
    assert not linalg.polar(X).Q.requires_grad
