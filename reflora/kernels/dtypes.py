"""Loads and stores through raw addresses by storage type, and the scalars that go with a type.

A storage code is the DTYPE column: the index into constants.STORAGE_DTYPES. A launch whose rows agree has it as the
constexpr DTYPE; MIXED means that each program branches on the code of its own row.
"""

import triton
import triton.language as tl

FLOAT32, FLOAT64, BFLOAT16, FLOAT16, MIXED = (tl.constexpr(c) for c in (0, 1, 2, 3, -1))


@triton.jit
def _pointer(address, STORED: tl.constexpr, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(STORED))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load_as(address, offsets, mask, STORED: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr):
    return tl.load(_pointer(address, STORED, VECTOR) + offsets, mask=mask, other=0.0).to(WIDE)


@triton.jit
def load(address, offsets, mask, code, DTYPE: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr = False):
    """Elements at `offsets` from the int64 `address`, as WIDE; 0 where masked. VECTOR: of a multiple of 16."""
    if DTYPE == FLOAT32:
        return _load_as(address, offsets, mask, tl.float32, WIDE, VECTOR)
    elif DTYPE == FLOAT64:
        return _load_as(address, offsets, mask, tl.float64, WIDE, VECTOR)
    elif DTYPE == BFLOAT16:
        return _load_as(address, offsets, mask, tl.bfloat16, WIDE, VECTOR)
    elif DTYPE == FLOAT16:
        return _load_as(address, offsets, mask, tl.float16, WIDE, VECTOR)
    else:
        if code == FLOAT32:
            values = _load_as(address, offsets, mask, tl.float32, WIDE, VECTOR)
        elif code == FLOAT64:
            values = _load_as(address, offsets, mask, tl.float64, WIDE, VECTOR)
        elif code == BFLOAT16:
            values = _load_as(address, offsets, mask, tl.bfloat16, WIDE, VECTOR)
        else:
            values = _load_as(address, offsets, mask, tl.float16, WIDE, VECTOR)
        return values


@triton.jit
def root(x):
    """The square root, rounded. `tl.sqrt` of a float32 takes a subnormal number for 0 on a GPU."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def clamped(x, limit):
    """Within +-limit; NaN stays, which the hardware's minimum and maximum would take for no number at all."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -limit), limit), x)


@triton.jit
def bounded(x, limit):
    """Within +-limit; NaN, which inf - inf in a product leaves, has no sign and becomes 0."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -limit), limit), 0.0)


@triton.jit
def _saturate(values, STORED: tl.constexpr):
    """A finite product past the storage range saturates."""
    if STORED == tl.float64:
        top = 1.7976931348623157e308
    elif STORED == tl.float32:
        top = 3.4028234663852886e38
    elif STORED == tl.bfloat16:
        top = 3.3895313892515355e38
    else:
        top = 65504.0
    limit = tl.full((), top, values.dtype)
    return bounded(values, limit)


@triton.jit
def _round_as(values, STORED: tl.constexpr):
    values = _saturate(values, STORED)
    if STORED == tl.bfloat16:
        # to nearest, ties to even, in bits: the interpreter's own cast cuts off
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & tl.full((), 0xFFFF0000, tl.uint32)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    elif STORED == tl.float16:
        return values.to(tl.float32).to(tl.float16)
    else:
        return values.to(STORED)


@triton.jit
def rounded(values, code, DTYPE: tl.constexpr):
    """`values` (float32 or float64) as they come back from storage: rounded once, saturated to its range."""
    if DTYPE == FLOAT32:
        return _round_as(values, tl.float32).to(values.dtype)
    elif DTYPE == FLOAT64:
        return _round_as(values, tl.float64).to(values.dtype)
    elif DTYPE == BFLOAT16:
        return _round_as(values, tl.bfloat16).to(values.dtype)
    elif DTYPE == FLOAT16:
        return _round_as(values, tl.float16).to(values.dtype)
    else:
        # a float32 launch holds no float64 row
        single = _round_as(values, tl.float32).to(values.dtype)
        brain, half = _round_as(values, tl.bfloat16).to(values.dtype), _round_as(values, tl.float16).to(values.dtype)
        narrow = tl.where(code == BFLOAT16, brain, half)
        wide = tl.where(code == FLOAT64, _saturate(values, values.dtype), single)
        return tl.where(code >= BFLOAT16, narrow, wide)


@triton.jit
def _store_as(address, offsets, values, mask, STORED: tl.constexpr, VECTOR: tl.constexpr):
    tl.store(_pointer(address, STORED, VECTOR) + offsets, _round_as(values, STORED), mask=mask)


@triton.jit
def store(address, offsets, values, mask, code, DTYPE: tl.constexpr, VECTOR: tl.constexpr = False):
    """Store `values` (float32 or float64), rounded once to the storage type and saturated to its range."""
    if DTYPE == FLOAT32:
        _store_as(address, offsets, values, mask, tl.float32, VECTOR)
    elif DTYPE == FLOAT64:
        _store_as(address, offsets, values, mask, tl.float64, VECTOR)
    elif DTYPE == BFLOAT16:
        _store_as(address, offsets, values, mask, tl.bfloat16, VECTOR)
    elif DTYPE == FLOAT16:
        _store_as(address, offsets, values, mask, tl.float16, VECTOR)
    else:
        if code == FLOAT32:
            _store_as(address, offsets, values, mask, tl.float32, VECTOR)
        elif code == FLOAT64:
            # a float32 launch holds no float64 row
            if values.dtype == tl.float64:
                _store_as(address, offsets, values, mask, tl.float64, VECTOR)
        elif code == BFLOAT16:
            _store_as(address, offsets, values, mask, tl.bfloat16, VECTOR)
        else:
            _store_as(address, offsets, values, mask, tl.float16, VECTOR)


@triton.jit
def power_of_two(exponent):
    """`2^exponent` in float64 for an int64 exponent in [-1022, 1023]."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(value):
    """e with `2^(e-1) <= value < 2^e` of a positive float64, -1022 for subnormal ones."""
    bits = value.to(tl.int64, bitcast=True)
    return ((bits >> 52) & 2047) - 1022


@triton.jit
def normal_range(code):
    """Smallest normal and largest number, in float64, of the type that a storage code is applied in."""
    tiny, huge = tl.full((), 1.1754943508222875e-38, tl.float64), tl.full((), 3.4028234663852886e38, tl.float64)
    tiny = tl.where(code == FLOAT64, 2.2250738585072014e-308, tiny)
    return tiny, tl.where(code == FLOAT64, 1.7976931348623157e308, huge)


@triton.jit
def balanced_fits(norm_a, norm_b, code):
    """Whether balanced factors can be stored: their norms are at most sqrt(||A|| ||B||), or sqrt(2) times that."""
    half = tl.full((), 1.7014117331926443e38, tl.float64)
    half = tl.where(code == FLOAT64, 8.988465674311579e307, tl.where(code == BFLOAT16, 1.6947656946257677e38, half))
    half = tl.where(code == FLOAT16, 32752.0, half)
    return tl.sqrt(norm_a) * tl.sqrt(norm_b) <= half
