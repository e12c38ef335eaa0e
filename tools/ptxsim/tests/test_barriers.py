"""Barriers taken out are missed."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx import STORE, load, run
from ptxsim import PtxSimError, driver


@triton.jit
def turned_sum(x, out, N: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, N)
    v = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(out + i, tl.sum(tl.trans(v) * v, 1))


def launched(kernel, grid, *arguments, **options):
    """The module of a launch."""
    modules = []
    driver.CALLBACKS.append(lambda name, module, metadata: modules.append(module))
    try:
        kernel[grid](*arguments, **options)
    finally:
        driver.CALLBACKS.pop()
    return modules[0]


def test_every_barrier_of_a_triton_kernel_is_missed():
    x, out = torch.randn(64, 64), torch.empty(64)
    module = launched(turned_sum, (1,), x, out, 64, num_warps=4)
    torch.testing.assert_close(out, (x * x.mT).sum(1))
    assert not driver.harmful()
    barriers = [pc for pc, line, times, loc in module.barriers() if times]
    assert barriers
    for pc in barriers:
        module.disable(pc)
        turned_sum[(1,)](x, out, 64, num_warps=4)
        assert driver.take_harmful(), f"nothing misses the barrier at {pc}"
        module.disable(pc, False)
    turned_sum[(1,)](x, out, 64, num_warps=4)
    assert not driver.take_harmful()


def test_barriers_are_listed():
    module = run(STORE + "\tbar.sync 0;\n" + load(128), [np.zeros(64, np.uint32)], 64, shared=256)
    [(pc, line, times, loc)] = module.barriers()
    assert times == 2 and module.ptx.splitlines()[line - 1].strip() == "bar.sync 0;"


def test_a_barrier_that_some_warps_never_reach_is_refused():
    body = "\tmov.u32 %r1, %tid.x;\n\tsetp.gt.u32 %p1, %r1, 31;\n\t@%p1 bra $L__BB0_1;\n\tbar.sync 0;\n$L__BB0_1:"
    with pytest.raises(PtxSimError, match="1 warps wait at a barrier, 1 have ended"):
        run(body, [], 64)


def test_a_barrier_in_divergent_code_is_refused():
    with pytest.raises(PtxSimError, match="for some lanes only"):
        run("\tmov.u32 %r1, %tid.x;\n\tsetp.gt.u32 %p1, %r1, 15;\n\t@%p1 bar.sync 0;", [])
