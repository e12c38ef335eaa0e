"""Sectors, passes of shared memory, classes, times."""

import pytest
import torch
from ptx import STORE, THREAD, address, load, run
from ptxsim import counters
from ptxsim.module import classes

WORDS = torch.zeros(2048, dtype=torch.int32).numpy()  # at a multiple of 64


def got(body, shared=0):
    module = run(THREAD + body, [WORDS], shared=shared)
    return [(row[5], row[6]) for row in module.stats() if row[1] in ("global", "shared")]


@pytest.mark.parametrize("stride,sectors", [(4, (4, 4)), (128, (32, 4)), (0, (1, 1)), (8, (8, 4))])
def test_sectors(stride, sectors):
    assert got(address(stride, 0, "%rd1") + "\tld.global.b32 %r2, [%rd1];") == [sectors]


@pytest.mark.parametrize("stride,bits,passes", [(4, 32, (1, 1)), (8, 32, (2, 1)), (128, 32, (32, 1)), (8, 64, (2, 2))])
def test_passes(stride, bits, passes):
    value = "%r1" if bits == 32 else "%rd90"
    body = f"\tmov.b32 %r3, global_smem;\n\tmad.lo.s32 %r4, %r1, {stride}, %r3;\n\tst.shared.b{bits} [%r4], {value};"
    assert got(body, 8192) == [passes]


def two_warps():
    return run(STORE + "\tbar.sync 0;\n" + load(128), [WORDS], 64, shared=256, timing=400)


def test_summary():
    table = counters.summary(two_warps(), clear=False)
    assert table["st.shared"] == {"instructions": 2, "passes": 2, "least": 2, "bytes": 256}
    assert table["st.global"] == {"instructions": 2, "sectors": 8, "least": 8, "bytes": 256}
    assert table["classes"]["barrier"] == 2 and table["lanes"] == 32 * table["total"]
    assert "st.global: 2 instructions, 8 sectors (least 8, x1.00)" in counters.text("k", table)


def test_lines_and_blocks():
    module = two_warps()
    total = counters.summary(module, clear=False)["total"]
    assert sum(times for times, _ in counters.lines(module)) == total
    [block] = module.block_counts()
    assert sum(block) == total and block[classes().index("barrier")] == 2
    counters.summary(module)
    assert counters.summary(module)["total"] == 0


def test_times():
    module = two_warps()
    [(chain, in_order)] = module.times()
    [(line, at_barrier, _, loc)] = module.trace()
    assert 0 < at_barrier < chain <= in_order
    assert run(STORE, [WORDS], shared=256).times() == []


def test_times_with_a_cache():
    twice = address(4, 0, "%rd1") + "\tld.global.b32 %r2, [%rd1];\n\tcvt.s64.s32 %rd3, %r2;\n"
    twice += "\tadd.s64 %rd1, %rd1, %rd3;\n\tld.global.b32 %r2, [%rd1];\n\tadd.s32 %r2, %r2, %r2;\n\tbar.sync 0;"
    zeros = torch.zeros(2048, dtype=torch.int32).numpy()
    without, with_one = (run(THREAD + twice, [zeros], timing=600, **near).times()[0] for near in ({}, {"near": 270}))
    assert without[0] - with_one[0] == without[1] - with_one[1] == 330
