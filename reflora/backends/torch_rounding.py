"""Stochastic rounding of float32 to bfloat16: upwards with the probability that keeps the mean.

The bits come from a hash of (seed, row, side, step, element), the same in every backend. uint32 is held in int64 with
masks, uint64 as the int64 with the same bits: their sums and products wrap alike, and right shifts are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW32 = (1 << 32) - 1
LOW64 = (1 << 64) - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix64(z: int) -> int:
    """One step of SplitMix64."""
    z = (z + GOLDEN) & LOW64
    z = ((z ^ z >> 30) * MIX_1) & LOW64
    z = ((z ^ z >> 27) * MIX_2) & LOW64
    return z ^ z >> 31


def row_key(seed: int, tag: int, side: int) -> int:
    """The part of a row's key known before the step: uint64 as the int64 with the same bits. side: 0 for A, 1 for B."""
    return _signed(mix64(mix64(seed) + 2 * tag + side))


def round_stochastically(values: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
    """`values [b, r, n]` float32, finite and inside the range of bfloat16 -> bfloat16.

    keys, counts: int64 `[b]`, the row's key and how many steps it has done.
    """
    _, r, n = values.shape
    key = _mix64(keys + counts).view(-1, 1, 1)
    i = torch.arange(r, dtype=torch.int64, device=values.device).view(r, 1)
    k = torch.arange(n, dtype=torch.int64, device=values.device)
    h = _fmix32(((i + r * k) & LOW32) ^ (key & LOW32))
    h = _fmix32((h + _shift(key, 32)) & LOW32)
    # the range ends at 0x7f7f0000: what is added there never reaches inf
    bits = (values.contiguous().view(torch.int32).long() & LOW32).add_(h >> 16)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _fmix32(h: Tensor) -> Tensor:
    """The finaliser of MurmurHash3."""
    h = (h ^ h >> 16).mul_(0x85EBCA6B).bitwise_and_(LOW32)
    h = (h ^ h >> 13).mul_(0xC2B2AE35).bitwise_and_(LOW32)
    return h ^ h >> 16


def _mix64(z: Tensor) -> Tensor:
    z = z + _signed(GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(MIX_2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """The logical right shift; torch's is arithmetic."""
    return (z >> by) & (LOW64 >> by)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z
