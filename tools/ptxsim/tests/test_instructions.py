"""Instructions on each lane, against numpy and torch."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import compare, each

rng = np.random.default_rng(0)
EDGES32 = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 1.5, 2.5, -0.5, 70000.0]
EDGES64 = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-310, 1e300, 3e38, 1.5, 2.5, -0.5, 7e10]
F32 = np.concatenate([rng.standard_normal(20), EDGES32]).astype(np.float32)
F64 = np.concatenate([rng.standard_normal(20), EDGES64])
I32 = np.concatenate([rng.integers(-(2**31), 2**31, 26), [0, 1, -1, 31, 2**31 - 1, -(2**31)]]).astype(np.int32)
I64 = np.concatenate([rng.integers(-(2**63), 2**63, 26), [0, 1, -1, 31, 2**63 - 1, -(2**63)]]).astype(np.int64)
same = np.testing.assert_array_equal


def roll(x, n=7):
    return np.roll(x, n)


@pytest.mark.parametrize("bits,x", [(32, I32), (64, I64)])
def test_integers(bits, x):
    y, z, u = roll(x), roll(x, 3), x.view(f"u{bits // 8}")
    v = roll(u)
    with np.errstate(over="ignore"):
        same(each(f"add.s{bits}", x.dtype, x, y), x + y)
        same(each(f"sub.s{bits}", x.dtype, x, y), x - y)
        same(each(f"mul.lo.s{bits}", x.dtype, x, y), x * y)
        same(each(f"mad.lo.s{bits}", x.dtype, x, y, z), x * y + z)
        same(each(f"neg.s{bits}", x.dtype, x), -x)
    same(each(f"min.s{bits}", x.dtype, x, y), np.minimum(x, y))
    same(each(f"max.u{bits}", u.dtype, u, v), np.maximum(u, v))
    same(each(f"xor.b{bits}", u.dtype, u, v), u ^ v)
    n = np.arange(32, dtype=np.uint32) * 3
    left = [int(a) << int(s) & (2**bits - 1) if s < bits else 0 for a, s in zip(u, n)]
    same(each(f"shl.b{bits}", u.dtype, u, n), left)
    same(each(f"shr.s{bits}", x.dtype, x, n), [int(a) >> min(int(s), bits - 1) for a, s in zip(x, n)])
    same(each(f"shr.u{bits}", u.dtype, u, n), [int(a) >> int(s) if s < bits else 0 for a, s in zip(u, n)])


@pytest.mark.parametrize("bits,x", [(32, I32), (64, I64)])
def test_integer_division(bits, x):
    d = np.where(roll(x) == 0, 3, roll(x))
    keep = ~((x == np.iinfo(x.dtype).min) & (d == -1))
    q = [abs(int(a)) // abs(int(b)) * (1 if (a < 0) == (b < 0) else -1) for a, b in zip(x, d)]
    r = [int(a) - int(b) * c for a, b, c in zip(x, d, q)]
    same(each(f"div.s{bits}", x.dtype, x, d)[keep], np.array(q, dtype=object)[keep])
    same(each(f"rem.s{bits}", x.dtype, x, d)[keep], np.array(r, dtype=object)[keep])
    least = np.full(32, np.iinfo(x.dtype).min, x.dtype)
    same(each(f"div.s{bits}", x.dtype, least, np.full(32, -1, x.dtype)), least)


def test_wide_products():
    x, y = I32, roll(I32)
    same(each("mul.wide.s32", np.int64, x, y), x.astype(np.int64) * y)
    same(each("mul.hi.s32", np.int32, x, y), (x.astype(np.int64) * y >> 32).astype(np.int32))
    same(each("mad.wide.s32", np.int64, x, y, I64), x.astype(np.int64) * y + I64)
    high = [int(a) * int(b) >> 64 for a, b in zip(I64, roll(I64))]
    same(each("mul.hi.s64", np.int64, I64, roll(I64)), high)
    s = I32.astype(np.int16)
    same(each("mul.wide.s16", np.int32, s, roll(s)), s.astype(np.int32) * roll(s))


def test_fields_of_bits():
    u = I32.view(np.uint32)
    position, length = np.arange(32, dtype=np.uint32), np.full(32, 5, np.uint32)
    same(each("bfe.u32", np.uint32, u, position, length), [int(a) >> int(p) & 31 for a, p in zip(u, position)])
    # a signed field that reaches past the end continues the highest bit
    want = []
    for a, p in zip(I32, position):
        value = int(a) >> int(p) & 31
        want.append(value - 32 if value & 16 else value)
    same(each("bfe.s32", np.int32, I32, position, length), want)
    same(each("popc.b32", np.uint32, u), [bin(int(a)).count("1") for a in u])
    same(each("clz.b32", np.uint32, u), [32 - int(a).bit_length() for a in u])
    same(each("brev.b32", np.uint32, u), [int(f"{int(a):032b}"[::-1], 2) for a in u])
    same(each("max.relu.s32", np.int32, I32, roll(I32)), np.maximum(np.maximum(I32, roll(I32)), 0))
    bytes_of = np.stack([u, roll(u)], 1).view(np.uint8)
    picked = np.ascontiguousarray(bytes_of[:, [6, 1, 4, 3]]).view(np.uint32)[:, 0]
    same(each("prmt.b32", np.uint32, u, roll(u), np.full(32, 0x3416, np.uint32)), picked)


@pytest.mark.parametrize("t,x", [("f32", F32), ("f64", F64)])
def test_floats(t, x):
    y = roll(x)
    with np.errstate(all="ignore"):
        same(each(f"add.{t}", x.dtype, x, y), x + y)
        same(each(f"sub.{t}", x.dtype, x, y), x - y)
        same(each(f"mul.{t}", x.dtype, x, y), x * y)
        same(each(f"div.rn.{t}", x.dtype, x, y), x / y)
        same(each(f"sqrt.rn.{t}", x.dtype, x), np.sqrt(x))
        same(each(f"max.{t}", x.dtype, x, y), np.fmax(x, y))
        same(each(f"min.{t}", x.dtype, x, y), np.fmin(x, y))
    same(each(f"neg.{t}", x.dtype, x), -x)
    same(each(f"abs.{t}", x.dtype, x), abs(x))
    same(each(f"copysign.{t}", x.dtype, x, y), np.copysign(y, x))
    zero = np.array([0.0, -0.0] * 16, x.dtype)
    assert not np.signbit(each(f"max.{t}", x.dtype, zero, roll(zero, 1))).any()
    assert np.signbit(each(f"min.{t}", x.dtype, zero, roll(zero, 1))).all()


def test_maximum_that_keeps_nan():
    y = roll(F32)
    with np.errstate(all="ignore"):
        same(each("max.NaN.f32", np.float32, F32, y), np.maximum(F32, y))


@pytest.mark.parametrize("name,x,pattern", [("f32", F32, 0x7FFFFFFF), ("f64", F64, 0x7FF8000000000000)])
def test_a_nan_has_one_pattern(name, x, pattern):
    """Whichever operand it came from: a sum of two is then the same in any order."""
    one, other = (np.full(32, pattern ^ payload, f"u{x.itemsize}") for payload in (1, 2))
    numbers = np.full(32, 2, x.dtype)
    for operands in [(one, other), (other, one), (one, numbers), (numbers, other)]:
        for op in ("add", "sub", "mul", "div.rn"):
            same(each(f"{op}.{name}", one.dtype, *operands), pattern)
        same(each(f"fma.rn.{name}", one.dtype, *operands, one), pattern)
    for op in ("neg", "abs", "sqrt.rn", "rcp.rn"):
        same(each(f"{op}.{name}", one.dtype, one), pattern)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_rounds_once(dtype):
    a = dtype(1) + np.finfo(dtype).eps * np.arange(32).astype(dtype)
    got = each(f"fma.rn.f{8 * a.itemsize}", dtype, a, a, -a * a)
    same(got, [float(Fraction(float(p)) ** 2 + Fraction(float(q))) for p, q in zip(a, -a * a)])


def test_approximations():
    close = np.testing.assert_allclose
    x = np.exp(rng.standard_normal(32) * 5)
    got = each("rcp.approx.ftz.f64", x.dtype, x)
    assert (abs(got * x - 1) < 2.0**-19).all() and ((got.view(np.uint64) & 0xFFFFFFFF) == 0).all()
    f, small = x.astype(np.float32), np.full(32, 1e-40, np.float32)
    close(each("sqrt.approx.ftz.f32", f.dtype, f), np.sqrt(f), rtol=2e-7)
    close(each("rsqrt.approx.ftz.f32", f.dtype, f), 1 / np.sqrt(f), rtol=4e-7)
    close(each("div.full.f32", f.dtype, f, roll(f)), f / roll(f), rtol=3e-7)
    exponents = rng.standard_normal(32).astype(np.float32)
    close(each("ex2.approx.ftz.f32", f.dtype, exponents), np.exp2(exponents), rtol=4e-7)
    close(each("lg2.approx.f32", f.dtype, f), np.log2(f), rtol=4e-7)
    assert each("sqrt.approx.ftz.f32", f.dtype, small)[0] == 0


def test_conversions_of_floats():
    with np.errstate(all="ignore"):
        same(each("cvt.rn.f32.f64", np.float32, F64), F64.astype(np.float32))
        same(each("cvt.f64.f32", np.float64, F32), F32.astype(np.float64))
    t = torch.from_numpy(F32)
    same(each("cvt.rn.f16.f32", np.uint16, F32)[:20], t.half().view(torch.uint16).numpy()[:20])
    same(each("cvt.rn.bf16.f32", np.uint16, F32)[:20], t.bfloat16().view(torch.uint16).numpy()[:20])
    assert each("cvt.rn.bf16.f32", np.uint16, np.full(32, np.nan, np.float32))[0] == 0x7FFF
    assert each("cvt.rn.f16.f32", np.uint16, F32)[27] == 0x7C00
    h = np.arange(0, 65536, 2048, dtype=np.uint16)
    bits = torch.from_numpy(h.view(np.int16))
    same(each("cvt.f32.f16", np.float32, h), bits.view(torch.float16).float().numpy())
    same(each("cvt.f64.bf16", np.float64, h), bits.view(torch.bfloat16).double().numpy())
    # straight from float64, where rounding through float32 would go the other way
    assert each("cvt.rn.bf16.f64", np.uint16, np.full(32, 1 + 2.0**-8 + 2.0**-40))[0] == 0x3F81


def test_conversions_to_whole_numbers():
    special = np.array([np.nan, 1e30, -1e30, 1.5, -1.5, 2.5, np.inf, -np.inf] * 4)
    least, most = -(2**31), 2**31 - 1
    same(each("cvt.rzi.s32.f64", np.int32, special)[:8], [least, most, least, 1, -1, 2, most, least])
    same(each("cvt.rzi.s32.f32", np.int32, special.astype(np.float32))[:4], [0, most, least, 1])
    same(each("cvt.rni.s32.f64", np.int32, special)[3:6], [2, -2, 2])
    same(each("cvt.rmi.f64.f64", np.float64, special)[3:6], [1, -2, 2])
    same(each("cvt.rpi.f64.f64", np.float64, special)[3:6], [2, -1, 3])


def test_conversions_of_whole_numbers():
    same(each("cvt.rn.f64.s64", np.float64, I64), I64.astype(np.float64))
    same(each("cvt.rn.f32.s64", np.float32, I64), I64.astype(np.float32))
    same(each("cvt.s64.s32", np.int64, I32), I32)
    same(each("cvt.s64.s32", np.int64, I64), I64.astype(np.int32))  # from the lower half of the register
    same(each("cvt.u64.u16", np.uint64, I32.astype(np.uint16)), I32.astype(np.uint16))
    same(each("cvt.u32.u64", np.uint32, I64.view(np.uint64)), I64.astype(np.uint32))
    same(each("cvt.s32.s8", np.int32, I32), I32.astype(np.int8))
    same(each("cvt.u16.u8", np.uint16, I32), I32.astype(np.uint8))


ORDERED = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}


@pytest.mark.parametrize("op", [*ORDERED, "neu"])
def test_comparisons(op):
    function = ORDERED.get(op, np.not_equal)
    same(compare(f"{op}.f64", F64, roll(F64)), function(F64, roll(F64)))
    same(compare(f"{op}.f32", F32, roll(F32)), function(F32, roll(F32)))
    if op in ORDERED:
        same(compare(f"{op}.s32", I32, roll(I32)), function(I32, roll(I32)))


@pytest.mark.parametrize("op,want", [("ltu", 1), ("geu", 1), ("equ", 1), ("ne", 0), ("num", 0), ("nan", 1)])
def test_comparisons_with_nan(op, want):
    assert (compare(f"{op}.f64", np.full(32, np.nan), np.ones(32)) == want).all()
