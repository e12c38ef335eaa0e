"""The orthogonal factor of a matrix by Householder reflections, a matrix in registers as its even and odd columns."""

import triton
import triton.language as tl


@triton.jit
def orthogonal_factor(p_u, p_t, n, RC: tl.constexpr, TC: tl.constexpr):
    """Slot `p_u` becomes Q of what it holds, which is Q R and anything finite; slot `p_t` is scratch.

    A reflection is `I - v v^T`. Each v is written down, and Q is made from the last to the first.
    """
    HC: tl.constexpr = RC // 2
    i, c = tl.arange(0, RC)[:, None], tl.arange(0, HC)[None, :]
    L, R = tl.load(p_u + i * RC + 2 * c), tl.load(p_u + i * RC + 2 * c + 1)
    for pair in range(0, (n + 1) // 2):
        pick = tl.zeros([RC, HC], tl.int32) + pair
        L, R = reflect(L, R, tl.gather(L, pick, 1), 2 * pair, p_t, RC, HC)
        L, R = reflect(L, R, tl.gather(R, pick, 1), 2 * pair + 1, p_t, RC, HC)
    L = tl.where((i == 2 * c) & (i < n), 1.0, 0.0).to(TC)
    R = tl.where((i == 2 * c + 1) & (i < n), 1.0, 0.0).to(TC)
    tl.debug_barrier()
    for number in range(0, n):
        v = tl.load(p_t + (n - 1 - number) * RC + i + 0 * c)
        L -= v * tl.sum(v * L, 0)[None, :]
        R -= v * tl.sum(v * R, 0)[None, :]
    tl.store(p_u + i * RC + 2 * c, L)
    tl.store(p_u + i * RC + 2 * c + 1, R)
    tl.debug_barrier()


@triton.jit
def reflect(L, R, x, k, p_t, RC: tl.constexpr, HC: tl.constexpr):
    """The reflection that clears column k of L and R below the diagonal; x is that column, in every column."""
    i, c = tl.arange(0, RC)[:, None], tl.arange(0, HC)[None, :]
    x = tl.where(i >= k, x, 0.0)
    norm = tl.sqrt(tl.sum(x * x, 0))
    pivot = tl.sum(tl.where(i == k, x, 0.0), 0)
    length = norm * (norm + tl.abs(pivot))
    scale = tl.where(length > 0, 1.0 / tl.sqrt(tl.where(length > 0, length, 1.0)), 0.0)
    v = tl.where(i == k, x + tl.where(pivot < 0, -norm, norm)[None, :], x) * scale[None, :]
    tl.store(p_t + k * RC + i + 0 * c, v, mask=(c == 0) & (i < RC))
    return L - v * tl.sum(v * L, 0)[None, :], R - v * tl.sum(v * R, 0)[None, :]
