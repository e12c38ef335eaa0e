// The update of one side whose step is the mean gradient multiplied by an r x r matrix, block by block.
#pragma once
#include "apply.h"
#include "weights.h"

namespace reflora {
namespace REFLORA_ISA {

template <class T>
struct Momentum {
    T g_factor, one_minus_beta1, decay, step_size;
};

// differences of gradients stay finite, and so do sums of their squares in double
template <class T>
constexpr T MOST = sizeof(T) == 8 ? T(1e145) : T(1e38);

template <class T>
INLINE Momentum<T> make_momentum(const double* h, double count, double unscale) {
    return {T(h[MAXIMIZE] != 0 ? -unscale : unscale), T(1 - h[BETA1]), T(1 - h[LR] * h[WEIGHT_DECAY]),
            T(h[LR] / (1 - __builtin_pow(h[BETA1], count)))};
}

// a run of the mean gradient after the step; where a gradient is not finite its mean stays
template <class T, class S, class Q>
INLINE void average(const Momentum<T>& u, const S* RESTRICT g, int64_t inc, const Q* RESTRICT m, int64_t stride,
                    int64_t n, T* RESTRICT out, int64_t apart) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const T raw = T(widen(g[i * inc]));
        const T grad = bounded(raw * u.g_factor, MOST<T>);
        const T first = bounded(T(widen(m[i * stride])), MOST<T>);
        const T share = raw - raw == 0 ? u.one_minus_beta1 : T(0);
        out[i * apart] = first + (grad - first) * share;
    }
}

// columns [k0, k0 + count) of the mean gradient after the step, as Reader lays them out: [r, CHUNK], or [count, r]
// where `right`
template <class T, class S, class Q>
INLINE void average_block(const Momentum<T>& u, const Factor<S>& g, const Factor<Q>& m, bool right, int64_t k0,
                          int64_t count, T* out) {
    const S* from = g.p + k0 * g.sn;
    const Q* old = m.p + k0 * m.sn;
    if (right) {
        if (g.sr == 1 && m.sr == 1 && g.sn == g.r && m.sn == m.r)
            return average(u, from, 1, old, 1, count * m.r, out, 1);
        for (int64_t k = 0; k < count; ++k) average(u, from + k * g.sn, g.sr, old + k * m.sn, m.sr, m.r, out + k * m.r, 1);
        return;
    }
    for (int64_t i = 0; i < m.r; ++i) {
        T* row = out + i * CHUNK;
        if (m.sn == 1) prefetch(old + i * m.sr + count, least(CHUNK, m.n - k0 - count));
        if (g.sn == 1 && m.sn == 1) {
            average(u, from + i * g.sr, 1, old + i * m.sr, 1, count, row, 1);
        } else {
            average(u, from + i * g.sr, g.sn, old + i * m.sr, m.sn, count, row, 1);
        }
        for (int64_t k = count; k < CHUNK; ++k) row[k] = 0;
    }
}

template <class T, class S, class Q, class Weights>
INLINE void move_run(const Momentum<T>& u, const T* RESTRICT m, const T* RESTRICT step, S* RESTRICT p, Q* RESTRICT kept,
                     const Weights weights, int64_t stride, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const int64_t o = i * stride;
        if (sizeof(Q) == 2) {
            narrow_saturated(m[i], kept + o);
        } else {
            narrow(m[i], kept + o);  // within range already
        }
        const T change = bounded(step[i], MOST<T>);
        weights.write(weights.template read<T>(p, o) * u.decay - u.step_size * change, p, o, i);
    }
}

template <class T, class S, class Q, class Weights>
INLINE void move_strided(const Momentum<T>& u, const T* m, const T* step, S* p, Q* kept, const Weights& weights,
                         int64_t stride, int64_t n) {
    if (stride == 1) return move_run(u, m, step, p, kept, weights, 1, n);
    move_run(u, m, step, p, kept, weights, stride, n);
}

// mean gradient, the product with the symmetric mixer K [r, ldm], parameter and moment (stored as Q), block by block.
// in, out: scratch. done(k0, count): after a block, whose mean gradient is in `in`
template <class Q, class T, class S, class Weights, class Done>
static void move_side(const Factor<S>& p, const Factor<S>& g, const Factor<Q>& m, const T* K, int64_t ldm,
                      const Momentum<T>& u, const Weights& weights, T* in, T* out, const Done& done) {
    const bool right = p.transposed();
    const int64_t ldo = !right ? CHUNK : p.r <= HALF<T> ? HALF<T> : ldm;
    const int64_t ldi = right ? p.r : CHUNK;
    for (int64_t k0 = 0; k0 < p.n; k0 += CHUNK) {
        const int64_t count = least(CHUNK, p.n - k0);
        average_block(u, g, m, right, k0, count, in);
        if (right) {
            apply_right(K, ldm, in, ldi, p.r, count, out, ldo);
        } else {
            apply_left(K, ldm, in, ldi, p.r, out);
        }
        const int64_t o = k0 * p.sn;
        if (right && p.sn == p.r && ldo == p.r) {  // the whole block is one run
            move_strided(u, in, out, p.p + o, m.p + o, weights.run(o, k0 * p.r, 1), 1, count * p.r);
        } else {
            for (int64_t i = 0; i < (right ? count : p.r); ++i) {
                const int64_t at = o + i * (right ? p.sn : p.sr);
                const Weights own = weights.run(at, k0 * p.r + i * (right ? p.r : 1), right ? 1 : p.r);
                move_strided(u, in + i * ldi, out + i * ldo, p.p + at, m.p + at, own, right ? 1 : p.sn,
                             right ? p.r : count);
            }
        }
        done(k0, count);
    }
}

}  // namespace REFLORA_ISA
}  // namespace reflora
