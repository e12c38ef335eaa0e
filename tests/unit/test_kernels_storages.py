"""Kernels over every storage type and alignment: preconditioned gradients, refactored factors, steps."""

from functools import partial

import pytest
import torch
from kernel_cases import DOUBLE, MARKS, pair, precondition, preconditioned, randn, refactor
from rows import Rows

from reflora import columns as col
from reflora.columns import REFACTORED
from reflora.kernels.step import launch
from reflora.kernels.step.launch import aligned
from reflora.pairs import LoRAPair

pytestmark = MARKS

STORAGES = {
    "float32": (torch.float32,),
    "float64": (DOUBLE,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "mixed": (torch.float32, torch.bfloat16, DOUBLE, torch.float16),
}
CASES = [(8, storage) for storage in STORAGES] + [(24, "float32")]
# these compile for minutes what the others have in class 16 and float32
LARGE = [(24, "bfloat16"), (24, "mixed"), (48, "float32"), (100, "float32")]
CASES += [pytest.param(*case, marks=pytest.mark.thorough) for case in LARGE]


def pairs_of(r, storage):
    """One a type, of two ranks, and of sizes for accesses of 16 bytes; test_step.py has others."""
    types = STORAGES[storage]
    return [pair(r - i % 2 * 4, 3, 20, dtype, 2 * r + 36, 3 * r + 21) for i, dtype in enumerate((*types, types[0]))]


def draw(pairs):
    return [(randn(*p.A.shape, dtype=p.A.dtype), randn(*p.B.shape, dtype=p.B.dtype)) for p in pairs]


@pytest.mark.parametrize("r, storage", CASES)
def test_preconditioned_gradients(r, storage):
    pairs = pairs_of(r, storage)
    grads = draw(pairs)
    wanted = preconditioned(pairs, grads)
    results = precondition(pairs, grads)
    assert results[:, col.STATUS].tolist() == [REFACTORED] * len(pairs)
    rounding = {DOUBLE: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
    for sides, exact in zip(grads, wanted):
        for got, want in zip(sides, exact):
            assert float((got.cpu().double() - want).norm() / want.norm()) < rounding[got.dtype]


@pytest.mark.parametrize("r, storage", CASES)
def test_refactored_factors(r, storage):
    pairs = pairs_of(r, storage)
    products = [p.B.double() @ p.A.double() for p in pairs]
    results = refactor(pairs)
    assert results[:, col.STATUS].tolist() == [REFACTORED] * len(pairs)
    rounding = {DOUBLE: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
    for p, product in zip(pairs, products):
        A, B = p.A.double(), p.B.double()
        assert float((B @ A - product).norm() / product.norm()) < rounding[p.A.dtype]
        assert float((A @ A.mT - B.mT @ B).norm() / (A @ A.mT).norm()) < rounding[p.A.dtype]


def views_from(offset, tensors, spare):
    """The same values `offset` elements past a multiple of 16 bytes, with some to spare after each row."""
    moved = []
    for t, more in zip(tensors, spare):
        rows, columns = t.shape
        room = torch.empty(rows * (columns + more) + offset, dtype=t.dtype, device=t.device)
        moved.append(room[offset:].view(rows, columns + more)[:, :columns].copy_(t))
    return moved


# r, n_in, n_out; elements past a multiple of 16 bytes of factor and gradient, and after each row of A and of B;
# whether accesses take 16 bytes
ALIGNMENTS = {
    "whole": (8, 76, 53, 0, 0, (0, 0), True), "n_in": (8, 75, 53, 0, 0, (0, 0), False),
    "r": (6, 76, 53, 0, 0, (0, 0), False), "factor": (8, 76, 53, 1, 0, (0, 0), False),
    "gradient": (8, 76, 53, 0, 2, (0, 0), False), "spread out": (8, 76, 53, 0, 0, (4, 8), True),
    "n_in in whole rows": (8, 75, 53, 0, 0, (1, 0), False), "r in whole rows": (7, 76, 53, 0, 0, (0, 1), False),
}  # fmt: skip


def seen(found, forced, *arguments):
    found.append(aligned(*arguments))
    return found[-1] and not forced


def take(kind, p, grads):
    """What `kind` leaves of a pair and its gradients."""
    if kind == "refactor":
        refactor([p])
        return [p.A, p.B]
    if kind == "precondition":
        precondition([p], grads[0])
        return [p.A, p.B, *grads[0][0]]
    rows = Rows([p], "triton", copied=False)
    for own in grads:
        rows.step(own, scalar=kind == "scalar step")
    return rows.snapshot()


@pytest.mark.parametrize("kind", ["step", "scalar step", "precondition", "refactor"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_accesses_of_16_bytes_change_no_bit(alignment, kind, monkeypatch):
    """They are taken where every address and stride allows, and by no other row: the emulator faults such a one."""
    r, n_in, n_out, of_factor, of_gradient, spare, wide = ALIGNMENTS[alignment]
    wide = wide or (alignment == "gradient" and kind == "refactor")
    ends, found = [], []
    for forced in (False, True):
        torch.manual_seed(0)
        p = pair(r, 3, 20, n_in=n_in, n_out=n_out)
        p = LoRAPair("", *views_from(of_factor, (p.A, p.B), spare))
        grads = [[tuple(views_from(of_gradient, draw([p])[0], spare))] for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "aligned", partial(seen, found, forced))
            ends.append(take(kind, p, grads))
    assert found and all(each == wide for each in found)
    assert all(torch.equal(x, y) for x, y in zip(*ends))
