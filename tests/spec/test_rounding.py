"""Stochastic rounding to bfloat16: the very bits of a writing in plain Python integers, and their statistics."""

import struct

import pytest
import torch

from reflora.backends.torch_rounding import mix64, round_stochastically, row_key

BF16_MAX = torch.finfo(torch.bfloat16).max


def plain_mix64(z):
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_fmix32(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def plain_round(value, seed, tag, side, n, e):
    """One element: a float32 value to the bfloat16 that step n of this side stores for element number e."""
    key = plain_mix64((plain_mix64((plain_mix64(seed % 2**64) + 2 * tag + side) % 2**64) + n) % 2**64)
    h = plain_fmix32((plain_fmix32(e % 2**32 ^ key % 2**32) + (key >> 32)) % 2**32)
    value = max(min(value, BF16_MAX), -BF16_MAX)
    upper = (struct.unpack("<I", struct.pack("<f", value))[0] + (h >> 16)) >> 16
    return struct.unpack("<f", struct.pack("<I", upper << 16))[0]


def rounded(values, seed=1, tag=0, side=0, n=0):
    """`values [r, n]` of one row."""
    keys, counts = torch.tensor([row_key(seed, tag, side)]), torch.tensor([n])
    return round_stochastically(values[None], keys, counts)[0]


def upwards(fraction, size=(8, 50_000), exponent=0, **which):
    """Whether each of equal values, that far between two neighbours in bfloat16, has been rounded up, as 0.0 or 1.0."""
    low = 2.0**exponent
    value = low * (1 + fraction / 128)
    got = rounded(torch.full(size, value), **which).double()
    assert ((got == low) | (got == low * (1 + 1 / 128))).all()
    return (got > low).double()


def test_mix64_is_splitmix64():
    """The first outputs of SplitMix64 from seed 0, as published with it."""
    outputs = [mix64(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 11, -1])
def test_bits_are_those_of_plain_integers(seed):
    tags, counts = [0, 3, 2**20], [0, 41, 16_000_000]
    values = torch.randn(3, 5, 13) * torch.logspace(-40, 37, 13)
    values[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-45, -BF16_MAX])
    for side in (0, 1):
        keys = torch.tensor([row_key(seed, tag, side) for tag in tags])
        got = round_stochastically(values, keys, torch.tensor(counts))
        for b, (tag, n) in enumerate(zip(tags, counts)):
            for i in range(5):
                for k in range(13):
                    want = plain_round(float(values[b, i, k]), seed, tag, side, n, i + 5 * k)
                    assert float(got[b, i, k]) == want


@pytest.mark.parametrize("fraction", [1 / 65536, 0.1, 0.5, 0.9, 1 - 1 / 65536])
@pytest.mark.parametrize("exponent", [-126, -60, 0, 60, 126])
def test_the_mean_is_kept_at_every_scale(fraction, exponent):
    up = upwards(fraction, exponent=exponent)
    sigma = (fraction * (1 - fraction) / up.numel()) ** 0.5
    assert abs(float(up.mean()) - fraction) < 5 * sigma


@pytest.mark.parametrize("other", [{"n": 5}, {"tag": 1}, {"side": 1}, {"seed": 2}], ids=str)
def test_steps_rows_sides_and_seeds_are_uncorrelated(other):
    start = {"seed": 1, "tag": 0, "side": 0, "n": 4}
    assert_uncorrelated(upwards(0.5, **start), upwards(0.5, **{**start, **other}))


@pytest.mark.parametrize("apart", [(0, 1), (1, 0), (1, 1), (0, 2), (0, 64)], ids=str)
def test_neighbours_are_uncorrelated(apart):
    up, (i, k) = upwards(0.5), apart
    assert_uncorrelated(up[i:, k:], up[: up.shape[0] - i, : up.shape[1] - k])


def assert_uncorrelated(x, y):
    """Fair coins: the mean of the products of their signs is 0 with variance 1 / size."""
    products = (2 * x - 1) * (2 * y - 1)
    assert abs(float(products.mean())) < 5 / products.numel() ** 0.5


def test_exact_values_stay():
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()].view(2, -1)
    for n in range(3):
        got = rounded(every.float(), n=n)
        assert torch.equal(got, every) and torch.equal(got.signbit(), every.signbit())


def test_the_end_of_the_range_is_never_passed():
    top = torch.full((8, 1000), BF16_MAX)
    assert (rounded(top) == BF16_MAX).all() and (rounded(-top) == -BF16_MAX).all()
    last_gap = 2.0**120
    up = rounded(top - 0.25 * last_gap).double()
    assert up.unique().tolist() == [BF16_MAX - last_gap, BF16_MAX]


def test_both_signs_are_rounded_alike():
    x = torch.randn(6, 400) * torch.logspace(-38, 37, 400)
    assert torch.equal(rounded(-x), -rounded(x))


def test_the_same_numbers_give_the_same_bits():
    x = torch.randn(6, 400)
    assert torch.equal(rounded(x, n=9), rounded(x, n=9))
    assert not torch.equal(rounded(x, n=9), rounded(x, n=10))
    # wherever the row stands in a batch
    keys = torch.tensor([row_key(1, tag, 0) for tag in (5, 0)])
    batch = round_stochastically(torch.stack([-x, x]), keys, torch.tensor([2, 9]))
    assert torch.equal(batch[1], rounded(x, n=9))
