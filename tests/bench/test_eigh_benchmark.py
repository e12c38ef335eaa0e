"""The benchmark of eigh: errors and ratios are right, what is wrong or too slow is not timed, and the program runs."""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import re
import sys
import types
from collections.abc import Callable
from decimal import Decimal, getcontext
from pathlib import Path

import pytest
import torch
from bench_cases import PretendedGpu, medians, rows_of
from torch import Tensor

from benchmarks import eigh, eigh_figure, harness, kernels, probes, solvers
from benchmarks.solvers import Case, Sample, Solver

CPU = torch.device("cpu")
TINY = ["--sizes", "5", "--batches", "2", "20", "--rounds", "2", "--seconds", "0.01"]
ERRORS = {"residual", "orthogonality", "eigenvalues"}
Eigenpairs = tuple[Tensor, Tensor]


def main(folder: Path, *arguments: str, device: str = "cpu") -> tuple[dict[tuple[str, ...], float], str]:
    """Medians by case, method and metric, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        kernels.main(["eigh", *TINY, "--device", device, *arguments, "--out", str(folder)])
    return read(folder / f"eigh_{device}.csv"), printed.getvalue()


def read(path: Path) -> dict[tuple[str, ...], float]:
    return medians(path, "case", "method", "metric")


def symmetric(batch: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return solvers.draw(Case(str(dtype).removeprefix("torch."), n, batch), CPU)[0]


# ---- errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_lapack_are_a_few_eps(dtype: torch.dtype) -> None:
    X = symmetric(300, 12, dtype)
    errors = Sample(X).errors(*torch.linalg.eigh(X))
    assert set(errors) == ERRORS and all(1e-3 < error < 10 for error in errors.values()), errors


@pytest.mark.parametrize("place", [0, 150, -1])
def test_errors_are_in_units_of_eps_and_of_the_worst_matrix(place: int) -> None:
    X = symmetric(200, 4)
    w, V = torch.linalg.eigh(X)
    eps, n = torch.finfo(X.dtype).eps, 4
    w[place, 2] += 1e5 * eps
    errors = Sample(X).errors(w, V)
    assert errors["residual"] == pytest.approx(1e5 / n / float(torch.linalg.matrix_norm(X[place])), rel=1e-2)
    assert errors["eigenvalues"] == pytest.approx(1e5 / float(torch.linalg.eigvalsh(X)[place].abs().max()), rel=1e-3)
    assert errors["orthogonality"] < 10
    V[place] *= 1 + 1e6 * eps
    assert Sample(X).errors(w, V)["orthogonality"] == pytest.approx(2 * 1e6 * n**0.5 / n, rel=1e-2)


def test_the_last_matrix_of_a_long_stack_is_looked_at() -> None:
    sample = Sample(symmetric(1000, 2))
    assert len(sample.index) == solvers.CHECKED and (sample.index[0], sample.index[-1]) == (0, 999)


def test_exact_eigenvalues_are() -> None:
    """Of 2 x 2 matrices, against the formula in 40 digits: 1e-18 where float64 has 1e-16."""
    getcontext().prec = 40
    X = symmetric(50, 2)
    high, low = solvers.exact(X)
    if high is None or low is None:
        pytest.skip("numpy has no 80 bits here")
    for matrix, *parts in zip(X.tolist(), high.tolist(), low.tolist()):
        (a, b), (_, c) = ([Decimal(element) for element in row] for row in matrix)
        root = (((a - c) / 2) ** 2 + b**2).sqrt()
        for sign, *found in zip((-1, 1), *parts):
            assert abs(sum(map(Decimal, found)) - (a + c) / 2 - sign * root) < Decimal(3e-18) * (abs(a + c) + root)


def test_what_is_solved_is_symmetric_and_near_what_a_warm_start_knows() -> None:
    X, Y = solvers.draw(Case("float32", 16, 7), CPU)
    distance = torch.linalg.matrix_norm(X - Y) / torch.linalg.matrix_norm(X)
    assert torch.equal(X, X.mT) and torch.equal(Y, Y.mT) and X.dtype == torch.float32
    assert bool((distance > 0.5 * solvers.NEAR).all() and (distance < 2 * solvers.NEAR).all())


# ---- times


def test_ratios_are_of_one_round() -> None:
    run = eigh.Run(Case("float32", 8, 10))
    torch_, own, wrong = (Solver(name, lambda: (0, 0), CPU) for name in ("torch", "reflora", "reflora-warm"))
    torch_.times["wall"] = {0: 1.0, 1: 4.0, 2: 6.0}
    own.times["wall"] = {0: 0.5, 1: 1.0, 2: 0.25}
    wrong.times["wall"] = {0: 1.0}
    run.solvers, run.failed = [torch_, own, wrong], {"reflora-warm": "fell over in round 1"}
    rows = {(row.method, row.metric): row.summary for row in eigh.measurements(run)}
    ratio = rows["reflora", "wall speed-up over torch"]
    assert (ratio.p50, ratio.count) == (4.0, 3)  # of 2, 4, 24; that of medians would be 8
    assert rows["torch", "wall speed-up over torch"].p50 == 1 and rows["reflora", "wall"].p50 == 500
    assert rows["reflora", "wall a matrix"].p50 == pytest.approx(5e4)
    assert {method for method, _ in rows} == {"torch", "reflora"}
    assert run.remarks == ["reflora, warm, float32 n=8 batch=10: failed: fell over in round 1"]


def test_short_calls_are_timed_many_on_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    clock = iter([0.0, 0.001, 0.001, 5.0, 5.008, 5.008])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    solver = Solver("torch", lambda: (made.append(0), torch.ones(1), torch.ones(1))[1:], CPU)
    solver.first()
    assert (solver.once, solver.calls, len(made)) == (0.001, round(solvers.SAMPLE / 0.001), 2)
    solver.turn("wall", 7)
    assert len(made) == 2 + solver.calls and solver.times["wall"] == {7: pytest.approx(0.008 / solver.calls)}


# ---- the program


def test_end_to_end(tmp_path: Path) -> None:
    found, out = main(tmp_path)
    cases = [f"{dtype} n=5 batch={batch}" for dtype in ("float32", "float64") for batch in (2, 20)]
    assert list(dict.fromkeys(case for case, _, _ in found)) == cases
    assert {method for _, method, _ in found} == {"torch", "torch, 1 thread", "reflora"}
    least = {"residual", "orthogonality", "wall", "wall a matrix", "wall speed-up over torch"}
    for case in cases:
        assert {metric for own, method, metric in found if (own, method) == (case, "reflora")} >= least
        assert found[case, "torch", "wall speed-up over torch"] == 1 and found[case, "reflora", "residual"] < 100
    assert (tmp_path / "eigh_cpu.png").read_bytes().startswith(b"\x89PNG")
    row = rows_of(tmp_path / "eigh_cpu.csv")[0]
    assert row["dtype"] == "float32/float64" and row["torch.linalg.eigh"].startswith("syevd of ")
    assert "float64 n=5\nmethod" in out and "speed-up" in out and "orthogonality" in out
    assert row["threads"] == str(torch.get_num_threads())  # set back after the calls with one


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda w, V: (w + 1e-3, V), "wrong, so not timed: residual"),
        (lambda w, V: (w, 1.001 * V), "orthogonality"),
        (lambda w, V: (w.flip(-1), V.flip(-1)), "eigenvalues"),
        (lambda w, V: (w, torch.full_like(V, torch.nan)), "residual nan"),
        (lambda w, V: {}["no such kernel"], "KeyError: 'no such kernel'"),
    ],
    ids=["values", "vectors", "order", "nan", "raises"],
)
def test_a_wrong_method_is_not_timed(
    how: Callable[..., Eigenpairs], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(solvers.BUILD, "reflora", lambda X, Y, backend: lambda: how(*torch.linalg.eigh(X)))
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        kernels.main(["eigh", *TINY, "--device", "cpu", "--dtypes", "float32", "--out", str(tmp_path)])
    out, found = printed.getvalue(), read(tmp_path / "eigh_cpu.csv")
    assert ended.value.code == 1
    assert re.search(rf"^reflora, float32 n=5 batch=20: failed: .*{message}", out, re.M), out
    assert {metric for _, method, metric in found if method == "reflora"} <= ERRORS
    assert ("float32 n=5 batch=20", "torch", "wall") in found


def test_what_would_take_too_long_sits_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(X: Tensor, Y: Tensor, backend: str | None) -> solvers.Call:
        assert len(X) <= eigh.PROBED, "a call that was to be sat out"
        return lambda: (harness.time.sleep(0.02), *torch.linalg.eigh(X))[1:]

    monkeypatch.setitem(solvers.BUILD, "torch", slow)
    arguments = ["--dtypes", "float64", "--batches", "2", "200", "--seconds-per-call", "0.1"]
    found, out = main(tmp_path, *arguments, "--methods", "torch", "reflora")
    assert re.search(r"^torch, float64 n=5 batch=200: sat out: a call would take .* s", out, re.M)
    assert ("float64 n=5 batch=200", "reflora", "wall") in found
    assert ("float64 n=5 batch=200", "reflora", "wall speed-up over torch") not in found
    assert ("float64 n=5 batch=2", "reflora", "wall speed-up over torch") in found


def test_what_would_not_fit_sits_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("float64", 5, 20)
    assert probes.free_bytes(CPU) > 1 << 20  # known on Linux
    monkeypatch.setattr(probes, "free_bytes", lambda device: 2 * eigh.TENSORS * case.bytes - 1)
    found, out = main(tmp_path, "--dtypes", "float64")
    assert f"all, {case}: sat out: needs " in out
    assert {own for own, _, _ in found} == {"float64 n=5 batch=2"}


def test_methods_of_a_gpu_are_left_out_on_a_cpu(tmp_path: Path) -> None:
    found, out = main(tmp_path, "--dtypes", "float32", "--methods", "torch", "cupy", "reflora-graph")
    assert "CuPy: left out: needs a GPU" in out and "reflora, graph: left out: needs a GPU" in out
    assert {method for _, method, _ in found} == {"torch"} and not (tmp_path / "eigh_cpu.png").exists()


def test_the_lapack_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = "- Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 1\nLAPACK_INFO=mkl, TORCH_VERSION=1"
    monkeypatch.setattr(torch.__config__, "show", lambda: config)
    assert solvers.library(CPU) == "syevd of MKL 2024.2"
    monkeypatch.setattr(torch.__config__, "show", lambda: "LAPACK_INFO=open, ")
    assert solvers.library(CPU) == "syevd of LAPACK (open)"


@pytest.mark.parametrize("release,sizes", [("2.11.0", " up to n = 32"), ("2.12.0+cu130", "")])
def test_the_routine_of_cusolver_is_named(monkeypatch: pytest.MonkeyPatch, release: str, sizes: str) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(release))
    assert solvers.library(torch.device("cuda")).startswith(f"XsyevBatched{sizes} of cuSOLVER, CUDA ")


# ---- as on a GPU


class PretendedGraph:
    """Runs again what was called while it was captured."""

    replays = 0

    def replay(self) -> None:
        PretendedGraph.replays += 1


def pretended_cupy(calls: list[str]) -> types.ModuleType:
    def decompose(x: Tensor) -> Eigenpairs:
        calls.append("cupy")
        return tuple(torch.linalg.eigh(x))

    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.__version__, cupy.from_dlpack = "13.0", torch.from_dlpack  # type: ignore[attr-defined]
    cupy.cuda = types.SimpleNamespace(ExternalStream=lambda pointer: contextlib.nullcontext())  # type: ignore[attr-defined]
    cupy.linalg = types.SimpleNamespace(eigh=decompose)  # type: ignore[attr-defined]
    return cupy


def test_eigh_takes_the_way_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the device itself: both kinds of timing, graph, warm start, CuPy."""
    from reflora import linalg

    calls: list[str] = []

    def solve(X: Tensor, *, V0: Tensor | None = None, backend: str | None = None) -> Eigenpairs:
        calls.append(f"warm {V0 is not None}")
        if V0 is not None:  # the eigenvectors of something near X
            almost = V0.mT @ X @ V0
            off = almost - torch.diag_embed(almost.diagonal(dim1=-2, dim2=-1))
            assert bool((torch.linalg.matrix_norm(off) < 2e-3 * torch.linalg.matrix_norm(X)).all())
        return tuple(torch.linalg.eigh(X))

    monkeypatch.setattr(linalg, "eigh", solve)
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy(calls))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 1 << 31))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: types.SimpleNamespace(cuda_stream=0))
    with PretendedGpu(monkeypatch):
        found, out = main(tmp_path, "--dtypes", "float32", device="cuda")
    assert {method for _, method, _ in found} == {solvers.LABELS[name] for name in eigh.GPU_METHODS}
    case = "float32 n=5 batch=20"
    times = {f"{kind}{what}" for kind in ("gpu", "wall") for what in ("", " a matrix", " speed-up over torch")}
    for name in eigh.GPU_METHODS:
        own = {metric for at, method, metric in found if (at, method) == (case, solvers.LABELS[name])}
        assert own >= times | {"residual"}
    assert {"cupy", "warm True", "warm False"} <= set(calls) and PretendedGraph.replays > 4
    assert rows_of(tmp_path / "eigh_cuda.csv")[0]["torch.linalg.eigh"].endswith("; CuPy 13.0")
    assert "gpu ms" in out and (tmp_path / "eigh_cuda.png").exists()


def test_cupy_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers.importlib.util, "find_spec", lambda name: None)
    cuda = torch.device("cuda")
    assert solvers.missing("cupy", cuda) == "not installed" and "CuPy" not in solvers.library(cuda)
    assert solvers.missing("reflora-graph", cuda) is None


# ---- the figure


def test_nothing_is_drawn_of_nothing_compared(tmp_path: Path) -> None:
    row = harness.Measurement("eigh", "", "torch", "wall speed-up over torch", "ratio", harness.summarize([1.0]))
    assert not eigh_figure.draw(tmp_path / "eigh.png", {Case("float32", 4, 2): [row]}, {})
    assert not list(tmp_path.iterdir())
