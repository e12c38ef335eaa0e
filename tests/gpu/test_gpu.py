"""On a CUDA device: real sizes, half-precision storage, one launch per rank class, no wait for the device.

The kernel tests proper (tests/unit/test_kernels*.py) run here too under `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch
from conftest import affine_error, spectrum_pair
from kernel_cases import DEVICE, DOUBLE, pair, precondition, preconditioned, randn
from rows import PLAIN_ADAMW, Rows, check_step

from reflora import RefLoRAAdamW, linalg, precondition_, refactor_
from reflora import columns as col
from reflora.backends import resolve
from reflora.columns import REFACTORED
from reflora.pairs import LoRAPair

pytestmark = pytest.mark.gpu

# (n_in, n_out) of the linear layers of a block; DeBERTaV3-base has 12 blocks, LLaMA-7B 32
DEBERTA = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
LLAMA = [(4096, 4096)] * 3 + [(4096, 11008), (11008, 4096)]


def layers(shapes, blocks, r, dtype=torch.float32, k_B=100.0):
    pairs = []
    for n_in, n_out in shapes * blocks:
        A, B = spectrum_pair(r, n_in, n_out, 3.0, k_B)
        pairs.append(LoRAPair(f"{n_in}-{n_out}", A.to(DEVICE, dtype), B.to(DEVICE, dtype)))
    return pairs


def gradients(pairs, scale=1.0):
    return [(scale * torch.randn_like(p.A), scale * torch.randn_like(p.B)) for p in pairs]


def error(got, want):
    return float((got.double().cpu() - want.cpu()).norm() / want.cpu().norm())


def test_triton_is_chosen():
    assert resolve(None, DEVICE).NAME == "triton"


@pytest.mark.parametrize("shapes, blocks, r", [(DEBERTA, 12, 8), (LLAMA, 2, 32), (LLAMA, 1, 64), (LLAMA, 1, 128)])
def test_real_shapes(shapes, blocks, r):
    pairs = layers(shapes, blocks, r)
    grads = gradients(pairs)
    wanted = preconditioned(pairs, grads)
    assert precondition_(pairs, grads).refactored == len(pairs)
    assert all(error(got, want) < 1e-5 for sides, both in zip(grads, wanted) for got, want in zip(sides, both))
    products = [p.B.double() @ p.A.double() for p in pairs]
    diagnostics = refactor_(pairs)
    assert diagnostics.refactored == len(pairs)
    for p, product in zip(pairs, products):
        assert error(p.B.double() @ p.A.double(), product) < 2e-6
    assert refactor_(pairs).worst_balance < 1e-4


@pytest.mark.parametrize("r", [1, 2, 4, 8, 12, 16, 32, 48, 64, 128])
@pytest.mark.parametrize(
    "dtype, k_B, precision, bound",
    [
        (torch.float32, 1e3, "float64", 1e-3),
        (torch.float32, 1e4, "float64", 1e-2),
        (DOUBLE, 1e4, "float64", 1e-8),
        (torch.float32, 500.0, "float32", 5e-3),
    ],
)
def test_accuracy_of_S(r, dtype, k_B, precision, bound):
    p = pair(r, 3.0, k_B, dtype, 1536, 2048)
    gA, gB = torch.zeros_like(p.A), torch.zeros_like(p.B)
    gB[:r].fill_diagonal_(1)
    assert precondition_([p], [(gA, gB)], precision=precision).refactored == 1
    assert affine_error(gB[:r].cpu(), p.A.cpu(), p.B.cpu()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [8, 32, 64])
def test_half_precision_storage(dtype, r):
    """Against the reference on the same rounded factors; one rounding of the result is left."""
    pairs = layers(DEBERTA, 1, r, dtype, k_B=20.0)
    grads = gradients(pairs)
    wanted, rounding = preconditioned(pairs, grads), torch.finfo(dtype).eps
    assert precondition_(pairs, grads).refactored == len(pairs)
    assert all(error(got, want) < rounding for sides, both in zip(grads, wanted) for got, want in zip(sides, both))
    products = [p.B.double() @ p.A.double() for p in pairs]
    refactor_(pairs)
    for p, product in zip(pairs, products):
        assert error(p.B.double() @ p.A.double(), product) < 4 * rounding
    products = [p.B.double() @ p.A.double() for p in pairs]
    refactor_(pairs, scalar=True)
    assert all(torch.equal(p.B.double() @ p.A.double(), product) for p, product in zip(pairs, products))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adamw_step(dtype):
    rows = Rows(layers(DEBERTA, 1, 8, dtype, k_B=20.0), "triton")
    for options in (PLAIN_ADAMW, {}):
        check_step(rows, gradients(rows.pairs), **options)


def test_mixed_types_and_ranks_in_few_launches(monkeypatch):
    """One of each kernel a rank class, whatever the shapes and storage types."""
    from reflora.kernels.step.precondition import solve_kernel

    launches = []
    run = solve_kernel.run
    monkeypatch.setattr(solve_kernel, "run", lambda *a, **k: launches.append(k["grid"]) or run(*a, **k))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, DOUBLE)
    pairs = [pair(r, 3, 10, dtype, 300 + r, 200) for r in (3, 8, 24, 40, 100) for dtype in dtypes]
    grads = gradients(pairs)
    wanted = preconditioned(pairs, grads)
    assert precondition_(pairs, grads, backend="triton").refactored == len(pairs)
    assert sorted(grid[0] for grid in launches) == [4, 4, 4, 8]
    for sides, both in zip(grads, wanted):
        for got, want in zip(sides, both):
            assert error(got, want) < max(1e-5, torch.finfo(got.dtype).eps)


def no_wait(run):
    """`run()` with every wait for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_wait_for_the_device():
    pairs = layers(DEBERTA, 2, 8) + [pair(24), pair(40)]
    grads = gradients(pairs)
    precondition_(pairs, grads), refactor_(pairs)  # compiles
    assert no_wait(lambda: precondition_(pairs, grads)).refactored == len(pairs)
    assert no_wait(lambda: refactor_(pairs)).refactored == len(pairs)
    results = no_wait(lambda: precondition(pairs, grads, scalar=True))
    assert (results[:, col.STATUS] == REFACTORED).all()


@pytest.mark.parametrize("scalar", [False, True])
def test_optimizer_steps_without_waiting(scalar):
    pairs = layers(DEBERTA, 2, 8)
    for p in pairs:
        p.A.requires_grad_(), p.B.requires_grad_()
    optimizer = RefLoRAAdamW(pairs, lr=1e-3, scalar=scalar)
    assert set(optimizer.backends.values()) == {"triton"}

    def step():
        for p, (gA, gB) in zip(pairs, gradients(pairs)):
            p.A.grad, p.B.grad = gA, gB
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()

    step(), step()
    versions = [p.A._version for p in pairs]
    no_wait(step)
    assert all(p.A._version > version for p, version in zip(pairs, versions))
    assert optimizer.diagnostics().refactored == len(pairs)
    assert all(p.A.isfinite().all() and p.B.isfinite().all() for p in pairs)


@pytest.mark.parametrize("n", [8, 17, 32, 64, 100, 128])
def test_linalg(n):
    X = randn(5, n, 2 * n, dtype=DOUBLE)
    X = X @ X.mT
    Y = torch.linalg.inv(X)
    Q, H = linalg.polar(X @ Y.roll(1, -1))
    assert error(Q.mT @ Q, torch.eye(n, dtype=DOUBLE).expand(5, n, n)) < 1e-12
    root = linalg.sqrtm(X)
    assert error(root @ root, X) < 1e-12
    assert error(linalg.invsqrtm(X) @ root, torch.eye(n, dtype=DOUBLE).expand(5, n, n)) < 1e-9
    assert error(linalg.geometric_mean(X, Y), torch.eye(n, dtype=DOUBLE).expand(5, n, n)) < 1e-8


def test_repeated_runs_agree():
    """A result that changes from run to run is a race."""
    for r in (8, 32, 64, 128):
        pairs = layers([(1000, 1500)], 40, r)
        grads = gradients(pairs)
        runs = []
        for _ in range(3):
            copies = [(a.clone(), b.clone()) for a, b in grads]
            precondition_(pairs, copies)
            runs.append(copies)
        for other in runs[1:]:
            assert all(torch.equal(x, y) for one, two in zip(runs[0], other) for x, y in zip(one, two))
