"""Kernels written in PTX over numpy arrays."""

import struct

import numpy as np
from ptxsim import Module, library

HEAD = """.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
"""
REGISTERS = """
	.reg .pred %p<50>;
	.reg .b16 %rs<50>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<99>;
"""
LETTERS = {1: "rs", 2: "rs", 4: "r", 8: "rd"}
THREAD = "\tmov.u32 %r1, %tid.x;\n"
SHARED = "\tmov.b32 %r3, global_smem;\n"
# each thread writes its number to its own word of shared memory
STORE = THREAD + SHARED + "\tshl.b32 %r2, %r1, 2;\n\tadd.s32 %r4, %r3, %r2;\n\tst.shared.b32 [%r4], %r1;\n"


def run(body, arrays, threads=32, grid=(1,), shared=0, **options):
    """A launch; array i's address is in %rd90 + i. The module, with its reports in `found`."""
    parameters = ",\n".join(f"\t.param .u64 k_param_{i}" for i in range(len(arrays)))
    loads = "".join(f"\tld.param.b64 %rd{90 + i}, [k_param_{i}];\n" for i in range(len(arrays)))
    module = Module(f"{HEAD}{parameters}\n)\n.reqntid {threads}\n{{{REGISTERS}{loads}{body}\n\tret;\n}}\n")
    for a in arrays:
        library().ps_register(a.ctypes.data, a.nbytes)
    try:
        module.launch(grid, struct.pack(f"<{len(arrays)}Q", *(a.ctypes.data for a in arrays)), shared, **options)
    finally:
        for a in arrays:
            library().ps_unregister(a.ctypes.data)
    module.found = module.reports()
    return module


def address(size, array, register, index="%r1"):
    """register = array + size * index"""
    return f"\tmul.wide.u32 %rd80, {index}, {size};\n\tadd.s64 {register}, %rd{90 + array}, %rd80;\n"


# each thread reads another's word of shared memory and writes it out
def load(distance):
    body = f"\txor.b32 %r5, %r2, {distance};\n\tadd.s32 %r6, %r3, %r5;\n\tld.shared.b32 %r7, [%r6];\n"
    return body + address(4, 0, "%rd1") + "\tst.global.b32 [%rd1], %r7;"


def each(op, out, *inputs):
    """One instruction on 32 lanes: out[i] = op(inputs[0][i], ...)."""
    out = np.zeros(32, out)
    body, names = THREAD, []
    for i, x in enumerate(inputs):
        names.append(f"%{LETTERS[x.itemsize]}{20 + i}")
        body += address(x.itemsize, i, "%rd1") + f"\tld.global.b{8 * x.itemsize} {names[-1]}, [%rd1];\n"
    result = f"%{LETTERS[out.itemsize]}30"
    body += f"\t{op} {result}, {', '.join(names)};\n" + address(out.itemsize, len(inputs), "%rd1")
    run(body + f"\tst.global.b{8 * out.itemsize} [%rd1], {result};", [*inputs, out])
    return out


def compare(op, x, y):
    """setp on 32 lanes."""
    out = np.zeros(32, np.int32)
    bits = 8 * x.itemsize
    a, b = (f"%{LETTERS[x.itemsize]}{n}" for n in (20, 21))
    body = THREAD + address(x.itemsize, 0, "%rd1") + address(x.itemsize, 1, "%rd2") + address(4, 2, "%rd3")
    body += f"\tld.global.b{bits} {a}, [%rd1];\n\tld.global.b{bits} {b}, [%rd2];\n\tsetp.{op} %p1, {a}, {b};\n"
    run(body + "\tselp.b32 %r5, 1, 0, %p1;\n\tst.global.b32 [%rd3], %r5;", [x, y, out])
    return out
