"""Divergent lanes, instructions of a whole warp, what is refused."""

import numpy as np
import pytest
from ptx import THREAD, address, run
from ptxsim import Module, PtxSimError

# collatz steps: lanes leave the loop one by one, then all meet in a shuffle
COLLATZ = (
    THREAD
    + address(4, 0, "%rd1")
    + address(4, 1, "%rd2")
    + """
	ld.global.b32 %r2, [%rd1];
	mov.b32 %r3, 0;
$L__BB0_1:
	setp.eq.b32 %p1, %r2, 1;
	@%p1 bra $L__BB0_5;
	and.b32 %r4, %r2, 1;
	setp.eq.b32 %p2, %r4, 0;
	@%p2 bra $L__BB0_3;
	mad.lo.s32 %r2, %r2, 3, 1;
	bra.uni $L__BB0_4;
$L__BB0_3:
	shr.u32 %r2, %r2, 1;
$L__BB0_4:
	add.s32 %r3, %r3, 1;
	bra.uni $L__BB0_1;
$L__BB0_5:
	shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
	st.global.b32 [%rd2], %r5;"""
)


def steps(n):
    return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)


def test_divergence_and_shuffles():
    x, out = np.arange(1, 33, dtype=np.uint32), np.zeros(32, np.uint32)
    run(COLLATZ, [x, out])
    np.testing.assert_array_equal(out, [steps((i ^ 1) + 1) for i in range(32)])


LANE = THREAD + address(4, 0, "%rd1")


@pytest.mark.parametrize(
    "body,want",
    [
        ("shfl.sync.up.b32 %r5, %r1, 3, 0, -1;", [i - 3 if i >= 3 else i for i in range(32)]),
        ("shfl.sync.down.b32 %r5, %r1, 3, 31, -1;", [i + 3 if i < 29 else i for i in range(32)]),
        ("shfl.sync.idx.b32 %r5, %r1, 5, 0x181f, -1;", [i // 8 * 8 + 5 for i in range(32)]),
        ("redux.sync.max.s32 %r5, %r1, -1;", [31] * 32),
        ("redux.sync.add.s32 %r5, %r1, -1;", [496] * 32),
        ("setp.gt.u32 %p1, %r1, 3;\n\tvote.sync.ballot.b32 %r5, %p1, -1;", [0xFFFFFFF0] * 32),
        ("mov.b64 %rd3, {%r1, 7};\n\tmov.b64 {%r6, %r5}, %rd3;", [7] * 32),
    ],
)
def test_exchanges(body, want):
    out = np.zeros(32, np.uint32)
    run(LANE + "\t" + body + "\n\tst.global.b32 [%rd1], %r5;", [out])
    np.testing.assert_array_equal(out, want)


def test_lanes_that_wait_for_each_other_are_refused():
    body = """
	mov.u32 %r1, %tid.x;
	setp.lt.u32 %p1, %r1, 16;
	@%p1 bra $L__BB0_1;
	shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;
	ret;
$L__BB0_1:
	shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;"""
    with pytest.raises(PtxSimError, match="wait for each other"):
        run(body, [])


@pytest.mark.parametrize(
    "line",
    [
        "tanh.approx.f32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "ld.volatile.global.b32 %r1, [%rd90];",
        "add.rz.f32 %r1, %r2, %r3;",
        "cp.async.bulk.commit_group;",
        "atom.global.add.noftz.f16 %rs1, [%rd90], %rs2;",
    ],
)
def test_unknown_instructions_are_refused(line):
    with pytest.raises(PtxSimError, match="not implemented|operands"):
        run("\t" + line, [np.zeros(32)])


def test_operands_of_another_width_are_refused():
    with pytest.raises(PtxSimError, match="4 bytes wide, the instruction wants 8"):
        run("\tadd.s64 %rd1, %rd2, %r1;", [])


def test_a_loop_without_end_is_stopped():
    with pytest.raises(PtxSimError, match="more than 1000 instructions"):
        run("$L__BB0_1:\n\tadd.s32 %r1, %r1, 1;\n\tbra.uni $L__BB0_1;", [], max_instructions=1000)


def test_registers_read_before_they_are_written():
    body = "\tsetp.gt.u32 %p1, %r1, 3;\n\t@%p1 mov.b32 %r2, 1;\n\tst.global.b32 [%rd90], %r2;"
    out = np.zeros(1, np.uint32)
    assert run(THREAD + body, [out]).undefined == 1
    assert run(THREAD + "\tmov.b32 %r2, 0;\n" + body, [out]).undefined == 0


def test_text_without_a_kernel_is_refused():
    with pytest.raises(PtxSimError, match="no code"):
        Module(".version 8.0\n")


def test_special_registers():
    out = np.zeros((3, 2, 64, 4), np.int32)
    body = """
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mov.u32 %r3, %ctaid.y;
	mov.u32 %r4, %nctaid.x;
	mov.u32 %r5, %ntid.x;
	mad.lo.s32 %r6, %r3, %r4, %r2;
	mad.lo.s32 %r6, %r6, %r5, %r1;
"""
    body += address(16, 0, "%rd1", "%r6") + "\tst.global.v4.b32 [%rd1], {%r3, %r2, %r1, %r5};"
    run(body, [out], 64, (2, 3))
    i = np.indices((3, 2, 64))
    np.testing.assert_array_equal(out, np.stack([*i, np.full((3, 2, 64), 64)], -1))
