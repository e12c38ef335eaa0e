"""Triton kernels against torch."""

import pytest
import torch
import triton
import triton.language as tl
from ptxsim import driver


@triton.jit
def matmul(x, y, z, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + i[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + j[None, :])
    tl.store(z + i[:, None] * N + j[None, :], tl.dot(a, b, input_precision=P, out_dtype=T))


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize(
    "dtype,precision,tolerance",
    [
        (torch.float64, "ieee", 1e-13),
        (torch.float32, "ieee", 1e-5),
        (torch.float32, "tf32", 2e-2),
        (torch.float16, "ieee", 1e-4),
        (torch.bfloat16, "ieee", 1e-4),
    ],
)
@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 64, 32), (64, 16, 64)])
@pytest.mark.parametrize("warps", [1, 4])
def test_products(capability, dtype, precision, tolerance, shape, warps):
    driver.install(capability)
    M, N, K = shape
    x, y = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    double = dtype == torch.float64
    z = torch.empty(M, N, dtype=torch.float64 if double else torch.float32)
    matmul[(1,)](x, y, z, M, N, K, precision, tl.float64 if double else tl.float32, num_warps=warps)
    torch.testing.assert_close(z.double(), x.double() @ y.double(), atol=tolerance, rtol=tolerance)
    assert not driver.harmful()


@triton.jit
def several(x, total, top, order, places, turned, N: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, N)
    v = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(total + j, tl.sum(v, 0))
    tl.store(top + i, tl.max(v, 1))
    tl.store(places + i, tl.argmax(v, 1))
    tl.store(order + i[:, None] * N + j[None, :], tl.sort(v, 1))
    tl.store(turned + i[:, None] * N + j[None, :], tl.trans(v))


@pytest.mark.parametrize("N,warps", [(16, 1), (16, 4), (64, 4), (64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reductions_and_sort(N, warps, dtype):
    x = torch.randn(N, N, dtype=dtype)
    total, top, places = torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype), torch.empty(N, dtype=torch.int32)
    order, turned = torch.empty_like(x), torch.empty_like(x)
    several[(1,)](x, total, top, order, places, turned, N, num_warps=warps)
    torch.testing.assert_close(total, x.sum(0))
    assert torch.equal(top, x.max(1).values) and torch.equal(order, x.sort(1).values)
    assert torch.equal(places.long(), x.argmax(1)) and torch.equal(turned, x.mT)
    assert not driver.harmful()


@triton.jit
def scans(x, index, running, gathered, counter, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(running + i, tl.cumsum(v, 0))
    tl.store(gathered + i, tl.gather(v, tl.load(index + i), 0))
    tl.atomic_add(counter + i % 4, 1)


def test_scan_gather_and_atomics():
    N = 256
    x, index = torch.randint(-50, 50, (N,), dtype=torch.int32), torch.randperm(N).int()
    running, gathered, counter = torch.empty_like(x), torch.empty_like(x), torch.zeros(4, dtype=torch.int32)
    scans[(3,)](x, index, running, gathered, counter, N)
    assert torch.equal(running.long(), x.cumsum(0)) and torch.equal(gathered, x[index.long()])
    assert counter.tolist() == [3 * N // 4] * 4


@triton.jit
def arguments(out, a, b, c, flag, d: tl.constexpr):
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, tl.where(flag, d, -1))


@pytest.mark.parametrize("flag", [True, False])
def test_arguments(flag):
    out = torch.empty(4, dtype=torch.float64)
    arguments[(1,)](out, -7, 2**40, 0.5, flag, 9)
    assert out.tolist() == [-7, 2.0**40, 0.5, 9 if flag else -1]
