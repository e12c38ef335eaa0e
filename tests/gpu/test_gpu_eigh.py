"""On a CUDA device: the eigensolver on every kind of matrix, 1000 of each, its launches, waits and captures."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DOUBLE
from spectra import BAR, DTYPES, KINDS, SCALES, SIZES, errors, matrices
from test_gpu import no_wait

from reflora import linalg

pytestmark = pytest.mark.gpu


def spd(batch, n, dtype):
    X = matrices("gaussian", batch, n, dtype).to(DEVICE)
    return X @ X + torch.eye(n, dtype=dtype, device=DEVICE)


CALLS = {
    "eigh": lambda X: linalg.eigh(X), "eigvalsh": lambda X: (linalg.eigvalsh(X),), "svd": lambda X: linalg.svd(X),
    "polar": lambda X: linalg.polar(X), "inv_root": lambda X: (linalg.inv_root(X, 4, eps=1e-6),),
    "sqrtm": lambda X: (linalg.sqrtm(X),), "warm": lambda X: linalg.eigh(X, V0=X),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_lapack(kind, dtype):
    for n, count in SIZES.items():
        X = matrices(kind, count, n, dtype)
        w, V = (result.cpu() for result in linalg.eigh(X.to(DEVICE)))
        assert w.isfinite().all() and V.isfinite().all() and (w.diff(dim=-1) >= 0).all(), (kind, n)
        for got, bar in zip(errors(X, w, V), errors(X, *torch.linalg.eigh(X))):
            assert got <= BAR * bar, (kind, n, got, bar)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales(dtype):
    for scale in SCALES[dtype]:
        for n in (1, 7, 33):
            X = matrices("gaussian", 20, n, dtype, scale)
            w, V = (result.cpu() for result in linalg.eigh(X.to(DEVICE)))
            for got, bar in zip(errors(X, w, V), errors(X, *torch.linalg.eigh(X))):
                assert got <= BAR * bar, (scale, n, got, bar)


@pytest.mark.parametrize("name", CALLS)
def test_no_wait_and_the_same_bits_in_every_batch(name):
    for n in (5, 16, 32, 64, 128):
        X = spd(300, n, torch.float32)
        CALLS[name](X[:1])  # compiles
        whole = no_wait(lambda: CALLS[name](X))  # noqa: B023
        for few in (slice(0, 1), slice(7, 40), slice(None, None, 3)):
            part = CALLS[name](X[few].contiguous())
            assert all(torch.equal(one, other[few]) for one, other in zip(part, whole)), (name, n)
        assert all(torch.equal(one, other) for one, other in zip(CALLS[name](X), whole)), (name, n)


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_follows_its_input(name):
    X = spd(40, 24, torch.float32)
    CALLS[name](X)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = CALLS[name](X)
    other = spd(40, 24, torch.float32)
    X.copy_(other)
    graph.replay()
    assert all(torch.equal(one, want) for one, want in zip(results, CALLS[name](other)))


def test_one_kernel_a_call():
    X = spd(40, 24, torch.float32)
    for name, call in CALLS.items():
        call(X)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(X)
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        if not kernels:
            pytest.skip("this machine forbids profiling")
        assert len(kernels) == 1, (name, kernels)


def test_any_start_gives_the_same_answer():
    X = matrices("gaussian", 50, 32, DOUBLE).to(DEVICE)
    w, V = linalg.eigh(X)
    for start in (V + 1e-3 * torch.randn_like(V), torch.full_like(V, torch.nan)):
        again = linalg.eigh(X, V0=start)
        assert torch.allclose(again[0], w, atol=1e-11) and torch.allclose(again[1], V, atol=1e-9)
