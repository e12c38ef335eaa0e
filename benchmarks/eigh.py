"""Batched symmetric eigendecomposition, reflora.linalg.eigh against torch.linalg.eigh and CuPy: time and error.

All methods solve the same stack of random symmetric X. "reflora, warm" starts from the eigenvectors of a Y that lies
1e-3 ||X|| away; "reflora, graph" replays the call from a CUDA graph, as torch's cannot be: it looks at its outcome on
the host. On a CPU torch calls LAPACK's syevd, one matrix after another, with as many threads as torch has: "torch,
1 thread" is the quicker one where they get in each other's way. On a GPU both it and CuPy (syevj) call cuSOLVER: from
torch 2.12 on XsyevBatched for every stack, before that only for n <= 32, and one matrix after another above.
Methods take turns, starting with another each round. "gpu": events around several calls on end, so that host time
counts only where it leaves the device waiting. "wall": on a GPU one call, the device idle before and after; on a CPU
several on end. "speed-up over torch" is torch's time over a method's own within a round.
Errors are the largest of up to 256 matrices: residual ||X V - V diag(w)||_F over n eps ||X||_F, orthogonality
||V^T V - I||_F over n eps, eigenvalues |w - exact| over eps ||X||_2. A method with one above 100 is wrong, not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from . import eigh_figure, harness, methods, probes
from .harness import Measurement, paired_ratio, summarize
from .solvers import BUILD, DTYPES, LABELS, SAMPLE, Case, Sample, Solver, draw, library, missing, reason

NAME = "eigh"
SIZES = (2, 4, 8, 16, 24, 32, 33, 48, 64, 96, 128)
BATCHES = (1, 32, 256, 2048, 16384)
CPU_METHODS = ("torch", "reflora", "torch-serial")
GPU_METHODS = ("torch", "reflora", "reflora-graph", "reflora-warm", "cupy")
WRONG = 100.0
PROBED = 16  # matrices of a method's first call, from which the cost of more is estimated
TENSORS = 8  # of the size of X that a case may have live at once
LEAST_ROUNDS = 3  # of a case whose calls are long
SPEED_UP = "{} speed-up over torch"


# ---- measuring


@dataclass
class Run:
    """What one case gave; by method the errors found, and why one failed or sat out ("" for all of them)."""

    case: Case
    solvers: list[Solver] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    sat_out: dict[str, str] = field(default_factory=dict)

    @property
    def remarks(self) -> list[str]:
        said = {"failed": self.failed, "sat out": self.sat_out}
        return [
            f"{LABELS[name] if name else 'all'}, {self.case}: {what}: {why}"
            for what, whys in said.items()
            for name, why in whys.items()
        ]


def measure(options: argparse.Namespace, case: Case, names: Sequence[str], pace: dict[str, float]) -> Run:
    """One case. pace: seconds a matrix by method, as known from smaller batches of its size; kept up to date."""
    run, device = Run(case), options.device
    needed, free = TENSORS * case.bytes, probes.free_bytes(device)
    if needed > free / 2:
        run.sat_out[""] = f"needs {needed / 1e9:.1f} GB, more than half of what is free"
        return run
    X, Y = draw(case, device)
    sample = Sample(X)
    for name in names:
        try:
            if case.batch > PROBED and name not in pace:
                probe = Solver(name, BUILD[name](X[:PROBED], Y[:PROBED], options.backend), device)
                probe.first()
                pace[name] = probe.once / PROBED
            expected = pace.get(name, 0.0) * case.batch
            if expected > options.seconds_per_call:
                run.sat_out[name] = f"a call would take about {expected:.2g} s"
                continue
            solver = Solver(name, BUILD[name](X, Y, options.backend), device)
            run.errors[name] = sample.errors(*solver.first())
        except Exception as error:  # one method's failure is a result, and shown; the others go on
            run.failed[name] = reason(error)
            continue
        wrong = [f"{kind} {error:.3g}" for kind, error in run.errors[name].items() if not error <= WRONG]
        if wrong:
            run.failed[name] = f"wrong, so not timed: {', '.join(wrong)}, expected at most {WRONG:g}"
        else:
            run.solvers.append(solver)
    _time(options, run)
    for solver in run.solvers:
        if case.batch >= PROBED:  # of fewer it would say what a call costs, not a matrix
            pace[solver.name] = min([solver.once, *solver.times["wall"].values()]) / case.batch
        if solver.failure:
            run.failed[solver.name] = solver.failure
    return run


def _time(options: argparse.Namespace, run: Run) -> None:
    kinds = ("gpu", "wall") if options.device.type == "cuda" else ("wall",)
    turns = {f"{solver.name} {kind}": partial(solver.turn, kind) for solver in run.solvers for kind in kinds}
    each = len(kinds) * sum(max(solver.once, SAMPLE) for solver in run.solvers)
    if turns:
        # no round starts after that time
        harness.interleave(turns, options.rounds, str(run.case), max(options.seconds, (LEAST_ROUNDS - 0.5) * each))


# ---- results


def measurements(run: Run) -> list[Measurement]:
    """Rows of a run: errors of every method that answered; times and, by round, speed-ups of those that are right."""
    rows: list[Measurement] = []

    def add(name: str, metric: str, unit: str, samples: Sequence[float]) -> None:
        if samples:
            rows.append(Measurement(NAME, str(run.case), LABELS[name], metric, unit, summarize(samples)))

    for name, errors in run.errors.items():
        for kind, error in errors.items():
            add(name, kind, "eps" if kind == "eigenvalues" else "n eps", [error])
    sound = [solver for solver in run.solvers if solver.name not in run.failed]
    base = next((solver for solver in sound if solver.name == "torch"), None)
    for solver in sound:
        for kind, times in solver.times.items():
            add(solver.name, kind, "ms", [1e3 * seconds for seconds in times.values()])
            add(solver.name, f"{kind} a matrix", "us", [1e6 * s / run.case.batch for s in times.values()])
            shared = sorted(times.keys() & base.times[kind].keys()) if base else []
            if base and shared:
                ratio = paired_ratio([base.times[kind][turn] for turn in shared], [times[turn] for turn in shared])
                label = LABELS[solver.name]
                rows.append(Measurement(NAME, str(run.case), label, SPEED_UP.format(kind), "ratio", ratio))
    return rows


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("gpu ms", "gpu", "{0.p50:.4g}"),
    ("p20-p80", "gpu", "{0.p20:.4g}-{0.p80:.4g}"),
    ("us each", "gpu a matrix", "{0.p50:.3g}"),
    ("speed-up", "gpu speed-up over torch", "{0.p50:.2f}"),
    ("wall ms", "wall", "{0.p50:.4g}"),
    ("p20-p80", "wall", "{0.p20:.4g}-{0.p80:.4g}"),
    ("us each", "wall a matrix", "{0.p50:.3g}"),
    ("speed-up", "wall speed-up over torch", "{0.p50:.2f}"),
    ("residual", "residual", "{0.p50:.2g}"),
    ("orthogonality", "orthogonality", "{0.p50:.2g}"),
    ("eigenvalues", "eigenvalues", "{0.p50:.2g}"),
)


def report(found: Mapping[Case, Sequence[Measurement]], remarks: Sequence[str] = ()) -> str:
    """A table of cases of one type and size, a row per method and batch, with the columns that were measured."""
    lines: list[str] = []
    known = {(case, row.method, row.metric): row.summary for case, rows in found.items() for row in rows}
    columns = [column for column in _COLUMNS if any(metric == column[1] for _, _, metric in known)]
    cells = [
        [method, str(case.batch)]
        + [form.format(known[case, method, m]) if (case, method, m) in known else "-" for _, m, form in columns]
        for case, method in dict.fromkeys((case, method) for case, method, _ in known)
    ]
    if cells:
        case = next(iter(found))
        lines.append(f"\n{case.dtype} n={case.n}")
        lines.append(harness.table(["method", "batch", *(title for title, _, _ in columns)], cells))
    return "\n".join([*lines, *remarks])


# ---- the program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="of a matrix")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="COUNT", help="of matrices")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), help="default: those of the device")
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds")
    parser.add_argument("--seconds", type=float, help="most seconds of counted rounds a case, but for long calls")
    parser.add_argument("--seconds-per-call", type=float, help="a method of which a call would take longer sits out")
    parser.add_argument("--backend", choices=("triton", "cpp", "torch"), help="of reflora (default: its own choice)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the CSV and the PNG")


def complete(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check the options and set those that depend on the device. Leaves through `parser.error`."""
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = options.device.type == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error(f"--device: expected a device that torch can use, got {options.device}; this torch sees no GPU")
    if gpu and options.device.index is not None:
        torch.cuda.set_device(options.device)
    options.seconds = (1.0 if gpu else 2.5) if options.seconds is None else options.seconds
    options.seconds_per_call = (1.0 if gpu else 3.0) if options.seconds_per_call is None else options.seconds_per_call
    unserved = methods.unserved(options.backend, options.device)
    if unserved:
        parser.error(unserved)
    for name in ("sizes", "batches", "rounds"):
        value = getattr(options, name)
        least = value if isinstance(value, int) else min(value)
        if least < 1:
            parser.error(f"--{name}: expected at least 1, got {least}")


def chosen(options: argparse.Namespace) -> list[str]:
    """The methods that can run here; says which of those asked for cannot."""
    gpu = options.device.type == "cuda"
    names = options.methods or (GPU_METHODS if gpu else CPU_METHODS)
    reasons = {name: missing(name, options.device) for name in names}
    for name, why in reasons.items():
        if why:
            print(f"{LABELS[name]}: left out: {why}")
    return [name for name, why in reasons.items() if not why]


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`python -m benchmarks.kernels eigh`: writes after every case, so that one cut short leaves what it has."""
    complete(parser, options)
    env = harness.environment(options.device, torch.float64)
    env |= {"dtype": "/".join(options.dtypes), "torch.linalg.eigh": library(options.device)}
    print(f"{harness.header(env)}\ntorch.linalg.eigh: {env['torch.linalg.eigh']}", flush=True)
    names = chosen(options)
    found: dict[Case, list[Measurement]] = {}
    path = options.out / f"{NAME}_{options.device.type}.csv"
    sound = True
    for n, dtype in ((n, dtype) for n in sorted(set(options.sizes)) for dtype in options.dtypes):
        pace: dict[str, float] = {}
        group: dict[Case, list[Measurement]] = {}
        remarks: list[str] = []
        for batch in sorted(set(options.batches)):
            case = Case(dtype, n, batch)
            done = measure(options, case, names, pace)
            group[case] = measurements(done)
            remarks += done.remarks
            sound &= not done.failed
            found[case] = group[case]
            harness.write_csv(path, [row for rows in found.values() for row in rows], env)
            del done
        print(report(group, remarks), flush=True)
    drawn = eigh_figure.draw(path.with_suffix(".png"), found, env)
    print(f"\nwrote {path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))
    if not sound:
        raise SystemExit(1)
