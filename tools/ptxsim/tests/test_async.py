"""cp.async: copies that are there once they have been waited for."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx import SHARED, THREAD, address, run
from ptxsim import Module, PtxSimError, driver

# each thread copies 16 bytes, then reads its neighbour's
COPY = THREAD + SHARED + address(16, 0, "%rd1") + "\tmad.lo.s32 %r4, %r1, 16, %r3;\n"
ISSUE = "\tcp.async.cg.shared.global [ %r4 + 0 ], [ %rd1 + 0 ], 0x10;\n"
COMMIT = "\tcp.async.commit_group;\n"
WAIT = "\tcp.async.wait_group 0;\n"
BARRIER = "\tbar.sync 0;\n"
READ = (
    "\txor.b32 %r5, %r1, 1;\n\tmad.lo.s32 %r6, %r5, 16, %r3;\n\tld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r6];\n"
    + address(16, 1, "%rd2")
    + "\tst.global.v4.b32 [%rd2], {%r10, %r11, %r12, %r13};"
)


def go(body, x=None, threads=64, **options):
    x = np.arange(4 * threads, dtype=np.uint32).reshape(threads, 4) if x is None else x
    out = np.zeros((threads, 4), np.uint32)
    module = run(COPY + body + READ, [x, out], threads, shared=16 * threads, **options)
    return module.found, x[(np.arange(threads) ^ 1) % len(x)], out


@pytest.mark.parametrize("wait", [COMMIT + WAIT, "\tcp.async.wait_all;\n"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_copy_that_is_waited_for(wait, order):
    found, want, out = go(ISSUE + wait + BARRIER, order=order)
    assert not found
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("wait", [COMMIT, COMMIT + "\tcp.async.wait_group 1;\n", WAIT])
def test_a_copy_that_is_not_waited_for(wait):
    """No wait, one that leaves this group under way, one of no group."""
    found, want, out = go(ISSUE + wait + BARRIER)
    assert {r["level"] for r in found if r["kind"] == "read after write"} == {"of a copy in flight"}
    assert any(r["kind"] == "uninitialised read" for r in found)
    assert (out != want).all()


def test_a_wait_is_no_barrier():
    found, _, _ = go(ISSUE + COMMIT + WAIT)
    assert {(r["kind"], r["level"]) for r in found} == {("read after write", "in a warp")}


def test_writes_to_a_copy_in_flight():
    found, _, _ = go(ISSUE + "\tst.shared.b32 [%r4], 77;\n" + COMMIT + WAIT + BARRIER)
    assert [(r["kind"], r["level"]) for r in found] == [("write after write", "of a copy in flight")]


def test_a_copy_onto_what_others_may_still_read():
    body = "\tst.shared.b32 [%r4], 77;\n" + BARRIER + "\txor.b32 %r7, %r4, 512;\n\tld.shared.b32 %r8, [%r7];\n"
    found, _, _ = go(body + ISSUE + COMMIT + WAIT + BARRIER)
    assert ("write after read", "between warps") in {(r["kind"], r["level"]) for r in found if r["differing"]}
    assert not go(body + BARRIER + ISSUE + COMMIT + WAIT + BARRIER)[0]


def test_groups_finish_in_order():
    second = "\tcp.async.ca.shared.global [%r4+8], [%rd1+8], 8;\n"
    first = "\tcp.async.ca.shared.global [%r4], [%rd1], 8;\n"
    body = first + COMMIT + second + COMMIT + "\tcp.async.wait_group 1;\n" + BARRIER
    body += "\tld.shared.b32 %r20, [%r4+4];\n"  # of the first group: there
    found, want, out = go(body + WAIT + BARRIER)
    assert not found
    np.testing.assert_array_equal(out, want)
    assert {r["level"] for r in go(body.replace("+4]", "+12]") + WAIT + BARRIER)[0]} >= {"of a copy in flight"}


def test_fewer_bytes_of_the_source():
    body = "\tand.b32 %r8, %r1, 3;\n\tmul.lo.s32 %r8, %r8, 4;\n" + ISSUE.replace("0x10", "16, %r8")
    _, want, out = go(body + COMMIT + WAIT + BARRIER)
    kept = np.arange(4) < (np.arange(64) ^ 1)[:, None] % 4
    np.testing.assert_array_equal(out, want * kept)
    with pytest.raises(PtxSimError, match="a source of 17 bytes for 16"):
        go(ISSUE.replace("0x10", "16, 17"))


def test_a_source_to_ignore():
    body = "\tsetp.gt.u32 %p1, %r1, 31;\n" + ISSUE.replace("0x10", "16, %p1")
    _, want, out = go(body + COMMIT + WAIT + BARRIER)
    np.testing.assert_array_equal(out, want * (np.arange(64) < 32)[:, None])


def test_sources_are_checked_when_a_copy_is_issued():
    short = np.zeros((63, 4), np.uint32)
    with pytest.raises(PtxSimError, match="out of bounds: asynchronous read of 16 bytes"):
        go(ISSUE, short)
    # none of the last one's bytes are read
    go("\tsetp.gt.u32 %p1, %r1, 62;\n" + ISSUE.replace("0x10", "16, %p1") + "\tcp.async.wait_all;\n", short)
    with pytest.raises(PtxSimError, match="misaligned: asynchronous read"):
        go(ISSUE.replace("%rd1 + 0", "%rd1 + 8"))
    with pytest.raises(PtxSimError, match="out of bounds: asynchronous write"):
        go(ISSUE.replace("%r4 + 0", "%r4 + 16"), np.zeros((65, 4), np.uint32))


@triton.jit
def pipelined(x, y, z, M: tl.constexpr, N: tl.constexpr, K, STEP: tl.constexpr, STAGES: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, STEP, num_stages=STAGES):
        k = start + tl.arange(0, STEP)
        a = tl.load(x + i[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        b = tl.load(y + k[:, None] * N + j[None, :], mask=k[:, None] < K, other=0.0)
        total += tl.dot(a, b)
    tl.store(z + i[:, None] * N + j[None, :], total)


def pipeline(stages, K=144):
    x, y = torch.randn(32, K).half(), torch.randn(K, 32).half()
    z = torch.empty(32, 32)
    compiled = pipelined[(1,)](x, y, z, 32, 32, K, 32, stages, num_warps=4)
    return compiled, z, x.float() @ y.float()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_pipelined_loop(capability, stages, order):
    driver.install(capability, order=order, quantum=7)
    compiled, z, want = pipeline(stages)
    assert "cp.async" in compiled.asm["ptx"]
    torch.testing.assert_close(z, want, atol=1e-3, rtol=1e-3)
    assert not driver.harmful()


WAIT_TEXT = r"cp\.async\.wait_group[^;]*;"
BARRIER_TEXT = r"bar\.sync[^;]*;"


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(
    "planted,pattern",
    [
        ("no wait", f"({WAIT_TEXT})"),
        ("no barrier after a wait", rf"{WAIT_TEXT}\s*({BARRIER_TEXT})"),
        ("no barrier before a buffer is used again", rf"mma\.sync(?:(?!bar\.sync|bra)[\s\S])*({BARRIER_TEXT})"),
    ],
)
def test_a_fault_planted_in_a_pipelined_loop(stages, planted, pattern, monkeypatch):
    compiled, _, _ = pipeline(stages)
    assert not driver.take_harmful()
    ptx = compiled.asm["ptx"]
    places = list(re.finditer(pattern, ptx))
    assert places
    for place in places:
        changed = ptx[: place.start(1)] + ptx[place.end(1) :]
        monkeypatch.setattr(compiled, "function", Module(changed, 128))
        pipeline(stages)
        assert driver.take_harmful(), f"nothing misses `{place.group(1)}`"
