"""Bounds, alignment, bytes never written."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx import SHARED, THREAD, address, run
from ptxsim import PtxSimError, driver, library

WORDS = np.zeros(32, np.uint32)


@pytest.mark.parametrize("offset,word", [(128, "out of bounds"), (-4, "out of bounds"), (2, "misaligned")])
@pytest.mark.parametrize("access", ["ld.global.b32 %r1, [%rd90+{}];", "st.global.b32 [%rd90+{}], 1;"])
def test_global_accesses(access, offset, word):
    with pytest.raises(PtxSimError, match=word):
        run("\t" + access.format(offset), [WORDS])


def test_memory_that_another_allocator_has_freed_is_forgotten():
    """It would hide what lies behind it in a tensor of later."""
    words = np.zeros(32, np.uint32)
    library().ps_register(words.ctypes.data + 16, 4)
    run("\tld.global.b32 %r1, [%rd90+64];", [words])
    with pytest.raises(PtxSimError, match="out of bounds"):
        run("\tld.global.b32 %r1, [%rd90+128];", [words])


@pytest.mark.parametrize(
    "access,word",
    [
        ("ld.shared.b32 %r1, [%r3+64];", "out of bounds"),
        ("st.shared.b32 [%r3+-4], 1;", "out of bounds"),
        ("ld.shared.v2.b32 {%r1, %r2}, [%r3+4];", "misaligned"),
        ("st.shared.b64 [%r3+60], 1;", "out of bounds"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r3+56];", "out of bounds"),
    ],
)
def test_shared_accesses(access, word):
    with pytest.raises(PtxSimError, match=word):
        run(SHARED + "\t" + access, [WORDS], shared=64)


def test_a_message_names_place_and_neighbour():
    with pytest.raises(PtxSimError, match=r"lane 7: .*read of 4 bytes.* 0 bytes past the end .* PTX line \d+ `ld.glob"):
        body = THREAD + "\tadd.s32 %r1, %r1, 25;\n" + address(4, 0, "%rd1") + "\tld.global.b32 %r2, [%rd1];"
        run(body, [WORDS])


def test_an_uninitialised_read_of_shared_memory():
    found = run(SHARED + "\tld.shared.b32 %r1, [%r3];", [WORDS], shared=64).found
    assert [(r["kind"], r["count"]) for r in found] == [("uninitialised read", 32)]
    body = SHARED + "\tst.shared.b32 [%r3], 1;\n\tbar.sync 0;\n\tld.shared.b32 %r1, [%r3];"
    assert not [r for r in run(body, [WORDS], shared=64).found if r["differing"]]


def test_a_tensor_ends_where_it_ends():
    t = torch.zeros(10)
    at = np.array([t.data_ptr()], np.uint64)
    run("\tld.global.b64 %rd1, [%rd90];\n\tld.global.b32 %r1, [%rd1+36];", [at])
    with pytest.raises(PtxSimError, match="out of bounds"):
        run("\tld.global.b64 %rd1, [%rd90];\n\tld.global.b32 %r1, [%rd1+40];", [at])


def test_new_memory_is_nan():
    assert torch.empty(100).isnan().all() and torch.empty(100, dtype=torch.float64).isnan().all()


def test_signs_and_vectors():
    x = np.arange(-64, 64, dtype=np.int8)
    out = np.zeros((32, 4), np.int32)
    body = THREAD + address(4, 0, "%rd1") + address(16, 1, "%rd2")
    body += "\tld.global.v4.s8 {%r2, %r3, %r4, %r5}, [%rd1];\n\tst.global.v4.b32 [%rd2], {%r2, %r3, %r4, %r5};"
    run(body, [x, out])
    np.testing.assert_array_equal(out.ravel(), x)


@triton.jit
def shifted(x, y, SHIFT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i + SHIFT))


@pytest.mark.parametrize("load", [True, False])
def test_a_triton_kernel_past_the_end(load):
    x, y = torch.zeros(256), torch.zeros(256)
    shifted[(1,)](x, y, 0, 256)
    with pytest.raises(PtxSimError, match="read of" if load else "write of") as e:
        if load:
            shifted[(1,)](x, y, 1, 256)
        else:
            shifted[(1,)](x, y[1:], 0, 256)
    assert "out of bounds" in str(e.value) and "test_memory.py" in str(e.value)
    assert not driver.harmful()
