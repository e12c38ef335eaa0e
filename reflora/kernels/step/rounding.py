"""Stochastic rounding to bfloat16: up or down with the probability that makes the mean exact, reproducibly."""

import triton
import triton.language as tl


@triton.jit
def mix64(z):
    """splitmix64 of a uint64."""
    z = z + tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def fmix32(h):
    """The finaliser of murmur3 on uint32."""
    h = (h ^ (h >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    h = (h ^ (h >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def key_of(seed, stream, count):
    """The key of one side of one row (a stream) at the step after `count` others; uint64."""
    return mix64(mix64(mix64(seed.to(tl.uint64)) + stream.to(tl.uint64)) + count.to(tl.uint64))


@triton.jit
def round_randomly(values, elements, key):
    """values float32, finite, within bfloat16's range; elements: int64, their numbers. As float32 again."""
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    h = fmix32(fmix32(elements.to(tl.uint32) ^ low) + high)
    bits = (values.to(tl.uint32, bitcast=True) + (h >> 16)) & tl.full((), 0xFFFF0000, tl.uint32)
    result = bits.to(tl.float32, bitcast=True)
    huge = tl.full((), 3.3895313892515355e38, tl.float32)
    return tl.minimum(tl.maximum(result, -huge), huge)
