// The AdamW update of one side (torch.optim.AdamW's arithmetic), fused with what is applied to its gradient.
#pragma once
#include "apply.h"
#include "weights.h"

namespace reflora {
namespace REFLORA_ISA {

// gradient, parameter and m are multiplied by their factors first (1, 1, 1 most of the time), v by m_factor^2
template <class T>
struct Update {
    T g_factor, p_factor, m_factor;
    T decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step_size;
    bool amsgrad;
};

// count: number of the step, from 1
template <class T>
INLINE Update<T> make_update(const double* h, double count, double g_factor, double p_factor, double m_factor) {
    const double bias1 = 1 - __builtin_pow(h[BETA1], count);
    const double bias2 = 1 - __builtin_pow(h[BETA2], count);
    return {T(h[MAXIMIZE] != 0 ? -g_factor : g_factor),
            T(p_factor),
            T(m_factor),
            T(1 - h[LR] * h[WEIGHT_DECAY]),
            T(1 - h[BETA1]),
            T(h[BETA2]),
            T(1 - h[BETA2]),
            T(1 / root(bias2)),
            T(h[EPS]),
            T(h[LR] / bias1),
            h[AMSGRAD] != 0};
}

// PLAIN_STEP: contiguous, no amsgrad, moments stay in their units
template <bool PLAIN_STEP, class T, class S, class Q, class Weights>
INLINE void update_run(const Update<T>& u, const T* RESTRICT g, int64_t inc, S* RESTRICT p, Q* RESTRICT m,
                       Q* RESTRICT v, Q* RESTRICT x, const Weights weights, int64_t stride, int64_t n) {
    const T limit = sizeof(T) == 8 ? T(1e153) : T(1e18);  // its square stays in range too
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const int64_t o = PLAIN_STEP ? i : i * stride;
        const T grad = bounded(g[PLAIN_STEP ? i : i * inc] * u.g_factor, limit);
        T first = T(widen(m[o]));
        T second = T(widen(v[o]));
        if (!PLAIN_STEP) {
            first *= u.m_factor;
            second = second * u.m_factor * u.m_factor;
        }
        first += (grad - first) * u.one_minus_beta1;
        second = second * u.beta2 + u.one_minus_beta2 * grad * grad;
        // a moment that was loaded may be nan or inf
        narrow_saturated(first, m + o);
        narrow_saturated(second, v + o);
        if (!PLAIN_STEP && u.amsgrad) {
            const T highest = T(widen(x[o])) * u.m_factor * u.m_factor;
            second = highest != highest ? highest : highest > second ? highest : second;
            narrow_saturated(second, x + o);
        }
        // eps = 0 and no gradient yet: 0 / 0 is no step. A select on the divisor keeps the loop in vectors
        const T divisor = root(second) * u.correction + u.eps + (first == 0 ? T(1) : T(0));
        const T value = weights.template read<T>(p, o) * u.p_factor * u.decay - u.step_size * first / divisor;
        weights.write(value, p, o, i);
    }
}

template <class T, class S, class Q, class Weights>
INLINE void update_strided(const Update<T>& u, const T* g, int64_t inc, S* p, Q* m, Q* v, Q* x, const Weights& weights,
                           int64_t stride, int64_t n) {
    if (inc == 1 && stride == 1 && !u.amsgrad && u.m_factor == 1)
        return update_run<true>(u, g, 1, p, m, v, x, weights, 1, n);
    update_run<false>(u, g, inc, p, m, v, x, weights, stride, n);
}

// multiplies the gradient by the mixer (null: I), and updates parameter and moments (stored as Q) block by block. CARRY
// is known at compile time: the loops of a step that carries nothing would lose registers to it
template <bool CARRY, class Q, class T, class S, class Weights>
static void update_side(const int64_t* row, int side, const T* mixer, const T* mixer_t, int64_t ldm,
                        const Update<T>& u, const Weights& weights, Carry* carry, T* in, T* out) {
    const Factor<S> p = factor<S>(row, side, P);
    const Factor<S> g = factor<S>(row, side, G);
    Q* m = reinterpret_cast<Q*>(row[side + M]);
    Q* v = reinterpret_cast<Q*>(row[side + V]);
    Q* x = reinterpret_cast<Q*>(row[side + X]);
    const auto use = [&](const T* values, int64_t li, int64_t lk, int64_t k0, int64_t count) {
        const bool along_r = p.transposed();
        if (along_r && p.sn == p.r && li == 1 && lk == p.r) {  // the whole block is one run
            const int64_t o = k0 * p.sn;
            const Weights own = weights.run(o, k0 * p.r, 1);
            update_strided(u, values, 1, p.p + o, m + o, v + o, x + o, own, 1, count * p.r);
        } else {
            const int64_t outer = along_r ? count : p.r;
            const int64_t inner = along_r ? p.r : count;
            const int64_t lo = along_r ? lk : li;
            const int64_t lin = along_r ? li : lk;
            const int64_t so = along_r ? p.sn : p.sr;
            const int64_t si = along_r ? p.sr : p.sn;
            for (int64_t i = 0; i < outer; ++i) {
                const int64_t o = k0 * p.sn + i * so;
                if (si == 1 && !along_r) {
                    const int64_t next = least(count, p.n - k0 - count);
                    prefetch(m + o + count, next);
                    prefetch(v + o + count, next);
                }
                const Weights own = weights.run(o, k0 * p.r + i * (along_r ? p.r : 1), along_r ? 1 : p.r);
                update_strided(u, values + i * lo, lin, p.p + o, m + o, v + o, x + o, own, si, inner);
            }
        }
        if constexpr (CARRY) carry->add(p, k0, count);
    };
    for_blocks<T, S>(g, mixer, mixer_t, ldm, in, out, use);
}

}  // namespace REFLORA_ISA
}  // namespace reflora
