"""Random views handed to the public functions: each call is served as on plain tensors, or refused before it writes.

The kernels take raw addresses: what is null, misaligned, overlapping or of another shape must not get that far.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from toys import OPTIMIZERS

import reflora

CASES = 200
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRONG = (torch.int64, torch.complex64, torch.bool)
SENTINEL = 77.0
# the one wording of this package's errors
REFUSED = re.compile(r".+: expected .+, got .+\. .+", re.DOTALL)


@dataclass
class Drawn:
    """A view and the buffer it is in, with a mask of the elements that are not the view's."""

    view: Tensor
    buffer: Tensor
    outside: Tensor

    def intact(self) -> bool:
        return bool((self.buffer[self.outside] == SENTINEL).all())


class Source:
    """Draws from a generator of its own."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.generator))

    def one_in(self, n: int) -> bool:
        return self.below(n) == 0

    def factor(self, rows: int, columns: int, dtype: torch.dtype) -> Drawn:
        """`[rows, columns]` somewhere in a larger buffer: sliced, spread out, transposed, and not on any boundary."""
        step_r, step_c, more = 1 + self.below(3), 1 + self.below(3), self.below(4)
        start = self.below(7)
        strides = ((columns * step_c + more) * step_r, step_c)
        if self.one_in(2):
            strides = (step_r, rows * step_r + more)
        size = start + (rows - 1) * strides[0] + (columns - 1) * strides[1] + 1 + self.below(4)
        buffer = torch.full((size,), SENTINEL, dtype=dtype)
        view = buffer.as_strided((rows, columns), strides, start)
        outside = torch.ones(buffer.shape, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), start).fill_(False)
        view.copy_(torch.randn(rows, columns, generator=self.generator, dtype=torch.float64).to(dtype))
        return Drawn(view, buffer, outside)

    def spoil(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """One of the ways in which a pair is none."""
        wrong = WRONG[self.below(len(WRONG))]
        r, n = A.shape
        return [
            (A[:, :0], B), (A[:0], B[:, :0]), (A[:1].expand(r, n), B), (A, B[:, :1].expand(B.shape[0], r)),
            (A, A.mT), (A, A.mT[:1]), (A.flatten()[None, :], B), (A[0], B), (A.to(wrong), B.to(wrong)),
            (A, B.to(torch.float64 if B.dtype != torch.float64 else torch.float32)), (A.to("meta"), B.to("meta")),
            (A.to_sparse(), B), (A, B[None]), (A, torch.cat([B, B], 1)), (B.mT, A.mT[:, :0]),
        ][self.below(15)]  # fmt: skip


def is_refused(call: object, A: Tensor, B: Tensor) -> bool:
    try:
        call(A, B)  # type: ignore[operator]
    except (ValueError, TypeError, RuntimeError) as error:
        assert REFUSED.match(str(error)), error
        return True
    return False


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1)
    return float((found.double() - wanted.double()).norm()) <= tolerance * max(float(wanted.double().norm()), 1e-30)


@pytest.mark.parametrize("scalar", [False, True])
def test_refactor(fast_backend: str, scalar: bool) -> None:
    source = Source(1)
    refused = 0
    for case in range(CASES):
        r, dtype = 1 + source.below(20), DTYPES[source.below(4)]
        a, b = source.factor(r, 1 + source.below(40), dtype), source.factor(1 + source.below(40), r, dtype)
        if source.one_in(3):
            A, B = source.spoil(a.view, b.view)
            before = a.buffer.clone(), b.buffer.clone()
            if is_refused(lambda A, B: reflora.refactor_([(A, B)], scalar=scalar, backend=fast_backend), A, B):
                refused += 1
                assert torch.equal(a.buffer, before[0]) and torch.equal(b.buffer, before[1]), case
            assert a.intact() and b.intact(), case
            continue
        plain = a.view.clone().contiguous(), b.view.clone().contiguous()
        report = reflora.refactor_([(a.view, b.view)], scalar=scalar, backend=fast_backend)
        wanted = reflora.refactor_([plain], scalar=scalar, backend=fast_backend)
        assert a.intact() and b.intact(), case
        assert torch.equal(report.status, wanted.status), case
        assert close(a.view, plain[0], dtype) and close(b.view, plain[1], dtype), case
    assert refused > CASES / 5


def test_precondition(fast_backend: str) -> None:
    source = Source(2)
    refused = 0
    for case in range(CASES):
        r, dtype = 1 + source.below(20), DTYPES[source.below(4)]
        n_in, n_out = 1 + source.below(40), 1 + source.below(40)
        a, b = source.factor(r, n_in, dtype), source.factor(n_out, r, dtype)
        ga, gb = source.factor(r, n_in, dtype), source.factor(n_out, r, dtype)
        drawn = (a, b, ga, gb)
        if source.one_in(3):
            gA, gB = source.spoil(ga.view, gb.view)
            before = [one.buffer.clone() for one in drawn]

            def call(gA: Tensor, gB: Tensor) -> object:
                return reflora.precondition_([(a.view, b.view)], [(gA, gB)], backend=fast_backend)  # noqa: B023

            if is_refused(call, gA, gB):
                refused += 1
                assert all(map(torch.equal, [one.buffer for one in drawn], before)), case
            assert all(one.intact() for one in drawn), case
            continue
        plain = [one.view.clone().contiguous() for one in drawn]
        reflora.precondition_([(a.view, b.view)], [(ga.view, gb.view)], backend=fast_backend)
        reflora.precondition_([(plain[0], plain[1])], [(plain[2], plain[3])], backend=fast_backend)
        assert all(one.intact() for one in drawn), case
        assert close(ga.view, plain[2], dtype) and close(gb.view, plain[3], dtype), case
        assert torch.equal(a.view, plain[0]) and torch.equal(b.view, plain[1]), case
    assert refused > CASES / 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adamw(fast_backend: str, name: str) -> None:
    """Factors that are views, with gradients laid out in other ways."""
    source = Source(3)
    for case in range(CASES // 4):
        r, dtype = 1 + source.below(20), DTYPES[source.below(2)]
        n_in, n_out = 1 + source.below(40), 1 + source.below(40)
        drawn = source.factor(r, n_in, dtype), source.factor(n_out, r, dtype)
        ours = [one.view.requires_grad_() for one in (Drawn(d.view.detach(), d.buffer, d.outside) for d in drawn)]
        plain = [p.detach().clone().contiguous().requires_grad_() for p in ours]
        optimizers = [OPTIMIZERS[name](p, pairs=[tuple(p)], lr=1e-2, backend=fast_backend) for p in (ours, plain)]
        for _ in range(2):
            for mine, other in zip(ours, plain):
                mine.grad = source.factor(*mine.shape, dtype).view  # type: ignore[arg-type]
                other.grad = mine.grad.clone().contiguous()
            for optimizer in optimizers:
                optimizer.step()
        assert all(one.intact() for one in drawn), case
        assert all(close(mine.detach(), other.detach(), dtype) for mine, other in zip(ours, plain)), case


def test_linalg(fast_backend: str) -> None:
    source = Source(4)
    for case in range(CASES // 4):
        n, dtype = 1 + source.below(20), DTYPES[source.below(2)]
        drawn = source.factor(n, n, dtype)
        X = drawn.view
        if source.one_in(3):
            wrong = [X[:, :0], X[0], X[:, : n - 1], X.to(torch.int64), X.to_sparse(), X[:0, :0]]
            if n > 1:
                with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
                    reflora.linalg.eigh(wrong[source.below(6)], backend=fast_backend)
            continue
        for f in (reflora.linalg.eigh, reflora.linalg.svd, reflora.linalg.polar):
            found, wanted = f(X, backend=fast_backend), f(X.clone().contiguous(), backend=fast_backend)
            assert all(map(torch.equal, found, wanted)), case
        assert drawn.intact(), case
