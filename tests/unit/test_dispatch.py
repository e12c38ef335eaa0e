"""Every instruction set that the C++ core carries computes the same thing; the best one is the default."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from reflora import RefLoRAAdamW, _C, linalg, precondition_, reference
torch.manual_seed(0)
for r in (1, 4, 8, 12, 32, 70):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10), (torch.bfloat16, 2e-2)):
        A, B = torch.randn(r, 150).to(dtype), torch.randn(133, r).to(dtype)
        gA, gB = torch.randn_like(A), torch.randn_like(B)
        want = reference.precondition(A, B, gA, gB)
        pair = (A.clone().requires_grad_(), B.clone().requires_grad_())
        precondition_([(A, B)], [(gA, gB)], backend="cpp")
        for got, exact in zip((gA, gB), want):
            assert (got - exact).norm() <= tolerance * exact.norm(), (r, dtype)
        optimizer = RefLoRAAdamW([pair], lr=1e-2, backend="cpp")
        for t in pair:
            t.grad = torch.ones_like(t)
        optimizer.step()
        assert all(t.isfinite().all() for t in pair)
# groups as wide as a vector, whose width is the instruction set's
X = torch.randn(19, 5, 5)
for f in (linalg.eigh, linalg.svd, linalg.polar, lambda X: [linalg.inv_root(X @ X.mT, 4, eps=1e-3)]):
    for part, whole in zip(f(X[4:17].contiguous()), f(X)):
        assert torch.equal(part, whole[4:17])
U, S, Vh = linalg.svd(X)
assert torch.allclose((U * S.unsqueeze(-2)) @ Vh, X, atol=1e-5)
print(_C.instruction_set())
"""


# sets before it is loaded what each of the processes forked of it loads
FORKS = """
import os, sys
import torch._dynamo  # as a first step does
for isa in sys.argv[2:]:
    if not os.fork():
        os.environ["REFLORA_ISA"] = isa
        exec(sys.argv[1])
        break
    os.wait()
"""


def supported():
    import reflora._C as core

    order = ["base", "avx2", "avx512"]
    return order[: order.index(core.instruction_set()) + 1]


@pytest.fixture(scope="module")
def printed():
    command = [sys.executable, "-c", FORKS, SCRIPT, *supported()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout.split(), done.stderr


@pytest.mark.xdist_group("instruction sets")
@pytest.mark.parametrize("isa", supported())
def test_instruction_set(isa, printed):
    found, errors = printed
    assert isa in found, errors
