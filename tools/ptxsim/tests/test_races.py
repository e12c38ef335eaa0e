"""Accesses that nothing orders."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx import SHARED, STORE, THREAD, address, load, run
from ptxsim import driver


def levels(found, differing=True):
    return {(r["kind"], r["level"], r["space"]) for r in found if r["differing"] or not differing}


def test_between_warps_in_shared_memory():
    out = np.zeros(64, np.uint32)
    found = levels(run(STORE + load(128), [out], 64, shared=256).found)
    assert ("write after read", "between warps", "shared") in found
    assert ("uninitialised read", "", "shared") in found
    assert not run(STORE + "\tbar.sync 0;\n" + load(128), [out], 64, shared=256).found
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)


def test_in_a_warp_that_only_lockstep_orders():
    out = np.zeros(64, np.uint32)
    found = run(STORE + load(4), [out], 64, shared=256).found
    assert levels(found) == {("read after write", "in a warp", "shared")}
    assert not run(STORE + "\tbar.warp.sync -1;\n" + load(4), [out], 64, shared=256).found


@pytest.mark.parametrize("barrier", ["", "\tbar.sync 0;\n"])
def test_between_warps_in_global_memory(barrier):
    x = np.arange(64, dtype=np.uint32)
    body = THREAD + "\txor.b32 %r2, %r1, 32;\n" + address(4, 0, "%rd1") + address(4, 0, "%rd2", "%r2")
    body += f"\tld.global.b32 %r5, [%rd2];\n{barrier}\tadd.s32 %r5, %r5, 1;\n\tst.global.b32 [%rd1], %r5;"
    module = run(body, [x], 64)
    assert any(level == "between warps" for _, level, _ in levels(module.found)) == (not barrier)


def test_in_one_instruction():
    x = np.zeros(4, np.uint32)
    found = run(THREAD + "\tst.global.b32 [%rd90], %r1;", [x]).found
    assert levels(found) == {("write after write", "in one instruction", "global")}
    assert not run("\tst.global.b32 [%rd90], 3;", [x]).found


@pytest.mark.parametrize("bits,eps", [(32, 2.0**-23), (64, 2.0**-52)])
@pytest.mark.parametrize("steps", [1, 100])
def test_sums_that_lanes_round_otherwise(bits, eps, steps):
    """Stores of one sum by lanes that have rounded it otherwise are harmless; those of other values are not."""
    x = np.array([3.0, 3.0 * (1 + steps * eps)], f"f{bits // 8}")
    register = {32: "%r5", 64: "%rd5"}[bits]
    body = THREAD + SHARED + "\tand.b32 %r2, %r1, 1;\n" + address(bits // 8, 0, "%rd1", "%r2")
    body += f"\tld.global.b{bits} {register}, [%rd1];\n\tst.shared.b{bits} [%r3], {register};"
    want = {("write after write", "in one instruction", "shared")} if steps > 8 else set()
    assert levels(run(body, [x], shared=8).found) == want


def test_between_blocks():
    x = np.zeros(4, np.uint32)
    # the same value: named, but harmless
    found = run("\tst.global.b32 [%rd90], 1;", [x], grid=(3,)).found
    assert {r["level"] for r in found} == {"between blocks"}
    found = run("\tmov.u32 %r1, %ctaid.x;\n\tst.global.b32 [%rd90], %r1;", [x], grid=(3,)).found
    assert levels(found) == {("write after write", "between blocks", "global")}


# each block writes, the last to arrive reads what all have written
ARRIVE = (
    """
	mov.u32 %r1, %ctaid.x;
	mov.u32 %r2, %tid.x;
"""
    + address(4, 0, "%rd1")
    + """
	setp.eq.b32 %p1, %r2, 40;
	@%p1 st.global.b32 [%rd1], 7;
	{first}
	setp.eq.b32 %p2, %r2, 0;
	mov.b32 %r3, 0;
	@%p2 atom.global.gpu.{order}.add.u32 %r3, [%rd91], 1;
	mov.b32 %r4, global_smem;
	@%p2 st.shared.b32 [%r4], %r3;
	bar.sync 0;
	ld.shared.b32 %r5, [%r4];
	setp.ne.b32 %p3, %r5, 3;
	@%p3 bra $L__BB0_9;
	setp.gt.u32 %p4, %r2, 3;
	@%p4 bra $L__BB0_9;
"""
    + address(4, 0, "%rd2", "%r2")
    + address(4, 2, "%rd3", "%r2")
    + """
	ld.global.b32 %r6, [%rd2];
	st.global.b32 [%rd3], %r6;
$L__BB0_9:"""
)


@pytest.mark.parametrize("resident,order", [(1, 0), (4, 2), (2, 1)])
def test_the_last_to_arrive_sees_all(resident, order):
    def go(first="bar.sync 0;", semantics="acq_rel"):
        x, count, out = np.zeros(4, np.uint32), np.zeros(1, np.uint32), np.zeros(4, np.uint32)
        text = ARRIVE.format(first=first, order=semantics)
        options = {"resident": resident, "order": order, "quantum": 5}
        return run(text, [x, count, out], 64, (4,), 16, **options).found, out

    found, out = go()
    assert not found and (out == 7).all()
    for planted in ({"first": ""}, {"semantics": "relaxed"}):
        assert ("read after write", "between blocks", "global") in levels(go(**planted)[0]), planted


@triton.jit
def last_sums(x, part, count, out, N: tl.constexpr, SEM: tl.constexpr):
    b = tl.program_id(0)
    tl.store(part + b, tl.sum(tl.load(x + b * N + tl.arange(0, N))))
    tl.debug_barrier()
    if tl.atomic_add(count, 1, sem=SEM) == tl.num_programs(0) - 1:
        tl.store(out, tl.sum(tl.load(part + tl.arange(0, 4))))


@pytest.mark.parametrize("semantics", ["acq_rel", "relaxed"])
def test_a_triton_kernel_whose_last_block_sums(semantics):
    x, part, count, out = torch.randn(512), torch.empty(4), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    last_sums[(4,)](x, part, count, out, 128, semantics)
    torch.testing.assert_close(out[0], x.sum())
    found = {r["level"] for r in driver.harmful()}
    assert found == (set() if semantics == "acq_rel" else {"between blocks"})


@triton.jit
def store_then_load(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, tl.load(y + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + i, tl.load(x + (N - 1 - i)) + 1)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_triton_kernel_without_its_barrier(barrier):
    x, y = torch.empty(256), torch.arange(256.0)
    store_then_load[(1,)](x, y, 256, barrier)
    found = [r for r in driver.harmful() if r["space"] == "global"]
    assert bool(found) != barrier
    assert all("test_races.py" in r["loc1"] for r in found)
