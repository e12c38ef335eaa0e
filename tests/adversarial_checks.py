"""What holds for every adversarial pair and matrix, on a CPU and on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import adversarial
import spectra
import torch
from torch import Tensor

import reflora
from reflora import linalg, reference
from reflora.columns import REFACTORED, SKIPPED

CPU = torch.device("cpu")
ORDERS = range(1, 131)
# how far B A may move, relative to its norm
KEPT = {torch.float32: 1e-5, torch.float64: 1e-9}
Pairs = list[tuple[Tensor, Tensor]]


@functools.lru_cache(maxsize=3)
def drawn(dtype: torch.dtype, seed: int, count: int, ranks: range) -> list[tuple[str, Tensor, Tensor]]:
    return list(adversarial.pairs(count, ranks, torch.Generator().manual_seed(seed), dtype))


def draw(dtype: torch.dtype, count: int = 500, seed: int = 1, ranks: range = range(1, 131)) -> tuple[list[str], Pairs]:
    """The first of 500, whose drawing takes 1 s; of another seed as many as are asked for."""
    made = drawn(dtype, seed, 500 if seed == 1 else count, ranks)[:count]
    return [name for name, _, _ in made], [(A.clone(), B.clone()) for _, A, B in made]


def top_of(*tensors: Tensor) -> float:
    """Largest magnitude, 1 for zeros."""
    return max(float(X.double().abs().max()) for X in tensors) or 1.0


def norm_of(X: Tensor) -> float:
    return top_of(X) * float((X.double() / top_of(X)).norm())


def check_refactored(names: list[str], pairs: Pairs, backend: str, scalar: bool) -> None:
    """`check_kept`, and of hundreds of pairs from a fixed seed enough are refactored for it to mean something."""
    status = check_kept(names, pairs, backend, scalar)
    assert status.count(REFACTORED) > len(pairs) / 10
    assert status.count(SKIPPED) < len(pairs) / 10


def check_kept(names: list[str], pairs: Pairs, backend: str, scalar: bool = False) -> list[int]:
    before = [(A.clone(), B.clone()) for A, B in pairs]
    status: list[int] = reflora.refactor_(pairs, scalar=scalar, backend=backend).status.tolist()
    for name, (A, B), (old_A, old_B), how in zip(names, pairs, before, status):
        assert A.isfinite().all() and B.isfinite().all(), name
        if how == SKIPPED:
            assert torch.equal(A, old_A) and torch.equal(B, old_B), name
            continue
        a, b, old_a, old_b = top_of(A), top_of(B), top_of(old_A), top_of(old_B)
        product, old = (B.double() / b) @ (A.double() / a), (old_B.double() / old_b) @ (old_A.double() / old_a)
        # numbers below the normal range have no relative accuracy to keep
        unit = torch.finfo(A.dtype).tiny * torch.finfo(A.dtype).eps
        lost = sum(unit / X for X in (a, b, old_a, old_b)) * A.numel() * B.numel()
        moved = float((product * ((a / old_a) * (b / old_b)) - old).norm())
        # rounding A and B moves B A by this, however small the product of their large directions is
        rounded = torch.finfo(A.dtype).eps * float((old_A.double() / old_a).norm() * (old_B.double() / old_b).norm())
        assert moved <= KEPT[A.dtype] * float(old.norm()) + rounded + lost, (name, moved, float(old.norm()))
        if how == REFACTORED and not scalar and lost < 1e-3:
            A, B = A.double() / a, B.double() / a
            Ga, Gb = A @ A.mT, B.mT @ B
            assert (Ga - Gb).norm() < 1e-4 * Ga.norm(), (name, float((Ga - Gb).norm() / Ga.norm()))
    return status


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    top = torch.finfo(dtype).max
    return values.clamp(-top, top).to(dtype).double()


def three_steps(names: list[str], pairs: Pairs, optimizer: torch.optim.Optimizer, all_step: bool = True) -> None:
    """Finite, and no layer of finite factors and gradients left behind; not all_step: norms may be out of range."""
    for _ in range(3):
        for A, B in pairs:
            A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        optimizer.step()
        assert optimizer.diagnostics().skipped == 0 or not all_step  # type: ignore[attr-defined]
    for name, (A, B) in zip(names, pairs):
        assert A.isfinite().all() and B.isfinite().all(), name


def check_adamw(names: list[str], pairs: Pairs, backend: str, cls: Any, **options: Any) -> None:
    for A, B in pairs:
        A.requires_grad_(), B.requires_grad_()
    optimizer = cls(pairs, lr=1e-3, backend=backend, **options)
    three_steps(names, pairs, optimizer)
    for name, pair in zip(names, pairs):
        for tensor in pair:
            moments = (optimizer.state[tensor][key] for key in ("exp_avg", "exp_avg_sq"))
            assert all(moment.isfinite().all() for moment in moments), name


def check_invariant(names: list[str], pairs: Pairs, backend: str, metric: str, moments: str, **more: Any) -> None:
    """Finite; and in the frame of its metric no first step of a sound layer is longer than the rate."""
    for A, B in pairs:
        A.requires_grad_(), B.requires_grad_()
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    options: dict[str, Any] = {"metric": metric, "moments": moments, "weight_decay": 0.0, **more}
    optimizer = reflora.InvariantAdamW(pairs, lr=1e-3, backend=backend, **options)
    before = [(A.detach().double(), B.detach().double()) for A, B in pairs]
    optimizer.step()
    compared = 0
    for name, (A, B), (old_A, old_B) in zip(names, pairs, before):
        if " x 1," not in name or not name.endswith(" x 1"):
            continue
        P_A, P_B, why = reference.frames(old_A, old_B, metric)
        if why != "refactored" or max(map(float, map(torch.linalg.cond, (P_A, P_B)))) > 1e5:
            continue
        compared += 1
        for change, P, factor in ((A - old_A, P_A, A), ((B - old_B).mT, P_B, B)):
            rounding = torch.finfo(factor.dtype).eps * top_of(factor) * float(torch.linalg.matrix_norm(P.inverse(), 2))
            size = torch.linalg.solve(P, change.detach().double()).square().mean().sqrt()
            assert float(size) < 1.01e-3 + rounding, name
    assert compared > len(pairs) / 20
    three_steps(names, pairs, optimizer, all_step=pairs[0][0].dtype == torch.float32)
    for name, pair in zip(names, pairs):
        for tensor in pair:
            kept = (optimizer.state[tensor][key] for key in ("exp_avg", optimizer.storage.grams))
            assert all(moment.isfinite().all() for moment in kept), name


def factors(
    n: int,
    generator: torch.Generator,
    kinds: Sequence[str] = adversarial.KINDS,
    scales: Sequence[float] = tuple(adversarial.SCALES.values()),
    largest: float = 3e38,
) -> Tensor:
    """Float64 `[kinds, n, n]`, each at a scale of its own, with norms up to `largest`."""
    found = []
    for kind in kinds:
        X = adversarial.factor(kind, n, n, generator)
        scale = scales[int(torch.randint(len(scales), (1,), generator=generator))]
        found.append(X * min(scale, largest / max(float(X.norm()), 1.0)))
    return torch.stack(found)


def check_eigh(n: int, dtype: torch.dtype, backend: str, device: torch.device = CPU) -> None:
    scales = (1.0, *spectra.SCALES[dtype])
    X = torch.cat([spectra.matrices(k, 1, n, dtype, scales[i % len(scales)]) for i, k in enumerate(spectra.KINDS)])
    w, V = (part.cpu() for part in linalg.eigh(X.to(device), backend=backend))
    assert w.isfinite().all() and V.isfinite().all() and (w.diff(dim=-1) >= 0).all(), n
    residual, orthogonality = spectra.errors(X, w, V)
    assert residual < 4 + n and orthogonality < 8 + 4 * n, (n, residual, orthogonality)


def check_polar(
    n: int, dtype: torch.dtype, backend: str, generator: torch.Generator, device: torch.device = CPU
) -> None:
    X = factors(n, generator).to(dtype)
    Q, H = (part.cpu().double() for part in linalg.polar(X.to(device), backend=backend))
    assert Q.isfinite().all() and H.isfinite().all(), n
    unit, eye = torch.finfo(dtype), torch.eye(n, dtype=torch.float64)
    top = X.double().abs().amax((1, 2), keepdim=True).clamp_min(unit.tiny)
    norm = (X.double() / top).flatten(1).norm(dim=1).clamp_min(1.0)
    # subnormal numbers have no relative accuracy
    lost = n * (unit.tiny * unit.eps / top).flatten()
    residual = (Q @ (H / top) - X.double() / top).flatten(1).norm(dim=1)
    assert (residual < (100 + n) * unit.eps * norm + lost).all(), (n, residual / norm / unit.eps)
    orthogonality = (Q.mT @ Q - eye).flatten(1).norm(dim=1)
    assert (orthogonality < (100 + 4 * n) * unit.eps).all(), (n, orthogonality / unit.eps)
    least = torch.linalg.eigvalsh(H / top)[:, 0]
    assert torch.equal(H, H.mT) and (least > -(100 + n) * unit.eps * norm - lost).all(), n


def check_mean(
    n: int, dtype: torch.dtype, backend: str, generator: torch.Generator, device: torch.device = CPU
) -> tuple[int, int]:
    """NaN throughout where X or Y is singular in its type, right elsewhere; how many there were of either."""
    order = torch.randperm(len(adversarial.KINDS), generator=generator).tolist()
    hard, mild = [adversarial.KINDS[number] for number in order[:4]], list(adversarial.MILD[:4])
    sides = hard + mild, mild[2:] + hard[:2] + mild
    halves = [factors(n, generator, kinds, (1.0, 1e-12, 1e12), 1e18) for kinds in sides]
    X, Y = ((F @ F.mT).to(dtype) for F in halves)
    mean = linalg.geometric_mean(X.to(device), Y.to(device), backend=backend).cpu().double()
    whole, gone = (mean.isfinite().flatten(1).all(1), mean.isnan().flatten(1).all(1))
    assert (whole | gone).all(), n
    a, b = (torch.linalg.eigvalsh(M.double()) for M in (X, Y))
    limit = 30 * n * torch.finfo(dtype).eps
    definite = (a[:, 0] > limit * a[:, -1]) & (b[:, 0] > limit * b[:, -1])
    assert whole[definite].all(), n
    for M, A, B, k in zip(mean[definite], X[definite].double(), Y[definite].double(), (a[:, -1] / a[:, 0])[definite]):
        error = float((M @ torch.linalg.solve(A, M) - B).norm() / B.norm())
        assert error < (50 + 20 * n + 4 * float(k)) * torch.finfo(dtype).eps, (n, error, float(k))
    return int(definite.sum()), int(gone.sum())
