"""Devices, backends, random pairs, and the one table of tolerances."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
from pathlib import Path

import messages
import pytest
import releases
import torch

from reflora import reference
from reflora.backends import load

# affine-invariant error of S against the QR + SVD oracle, by (storage, k of both factors); rounding S to float32
# alone costs about 6e-8 k(S)
TOLERANCE = {
    (torch.float64, 10.0): 1e-12,
    (torch.float64, 1e3): 1e-10,
    (torch.float64, 1e4): 1e-8,
    (torch.float32, 10.0): 1e-4,
    (torch.float32, 1e3): 1e-3,
    (torch.float32, 1e4): 1e-2,
}
# precision="float32", k(A) = 3, k(B) = 500
FLOAT32_TOLERANCE = 5e-3
RANKS = (1, 2, 4, 8, 12, 16, 32, 48, 64, 128)


messages.install()


def served(name: str) -> bool:
    return load(name).unavailable(torch.device("cpu")) is None


# "triton" under `make emulate`, which runs on CPU tensors what Triton compiles for a GPU
BACKENDS = [name for name in ("cpp", "torch", "triton") if served(name)]
# on a GPU the kernels run under `pytest -m gpu`
ON_GPU = torch.cuda.is_available()
KERNELS = [pytest.mark.gpu] if ON_GPU else [pytest.mark.kernels]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), reason="builds C++; no compiler"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if why := releases.lacking(f"{item.path.name}::{item.nodeid.partition('::')[2]}"):
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish() -> None:
    """Trainings and memory probes collect garbage: over what the imports have made that takes 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[pytest.param(b, marks=pytest.mark.kernels if b == "triton" else ()) for b in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(
    params=[b for b in BACKENDS if b != "triton"]
    + [pytest.param("triton", marks=KERNELS)] * (ON_GPU or served("triton"))
)
def every_backend(request: pytest.FixtureRequest) -> str:
    """As `backend`, for tests that put tensors on `device_of` it: on a GPU its kernels are among them."""
    return request.param


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and ON_GPU else "cpu")


@pytest.fixture(params=[b for b in BACKENDS if b != "triton"])
def fast_backend(request: pytest.FixtureRequest) -> str:
    """Backends that are quick enough for long runs on the CPU."""
    return request.param


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Every test draws its own numbers, the same in every run."""
    torch.manual_seed(sum(map(ord, request.path.name + request.node.name)))


@pytest.fixture(autouse=True)
def solved_apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the emulator ranks up to 16 are solved in a launch of their own, as larger ones are: the same bits.

    It then compiles one solve per type, not one for every way to read gradients, which takes most of its time.
    test_kernels_routes.py compares the two; tests that are marked as_launched take the launches of a GPU.
    """
    marked = request.node.get_closest_marker
    if marked("kernels") and not marked("as_launched"):
        from reflora.kernels import routes

        route = routes.ROUTES[16]
        monkeypatch.setitem(routes.ROUTES, 16, dataclasses.replace(route, gram_warps=route.warps))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' models, small enough for every test run."""
    from tiny_models import shrink

    shrink(monkeypatch)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved adapter."""
    from adapter_cases import save

    return save(tmp_path / "adapter")


def spectrum_factor(r: int, n: int, condition: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """`[r, n]` with log-spaced singular values from 1 down to 1 / condition and random singular vectors."""
    U = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)
    return ((U * s) @ V.mT).to(dtype)


def spectrum_pair(
    r: int, n_in: int, n_out: int, k_A: float, k_B: float, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    return spectrum_factor(r, n_in, k_A, dtype), spectrum_factor(r, n_out, k_B, dtype).mT.contiguous()


def affine_error(S: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    """`|| R^(-1/2) S R^(-1/2) - I ||_2` against the oracle R, by its factor: `P^-1 S P^-T` has the same spectrum."""
    P_inv = reference.refactoring(A, B).P_inv_T.mT
    eye = torch.eye(S.shape[0], dtype=torch.float64)
    return float(torch.linalg.matrix_norm(P_inv @ S.double() @ P_inv.mT - eye, 2))


def read_S(
    A: torch.Tensor, B: torch.Tensor, backend: str, precision: str = "float64"
) -> tuple[torch.Tensor, torch.Tensor]:
    """S and S^-1 as the backend applies them: preconditioning gradients whose first r rows are I."""
    from reflora import precondition_

    r = A.shape[0]
    gA, gB = torch.zeros_like(A), torch.zeros_like(B)
    gA[:, :r].fill_diagonal_(1)
    gB[:r].fill_diagonal_(1)
    diagnostics = precondition_([(A, B)], [(gA, gB)], backend=backend, precision=precision)
    assert diagnostics.refactored == 1, diagnostics
    return gB[:r].clone(), gA[:, :r].clone()
