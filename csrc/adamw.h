// The AdamW update of one side (torch.optim.AdamW's arithmetic), fused with what is applied to its gradient.
#pragma once
#include "apply.h"
#include "weights.h"

namespace reflora {
namespace REFLORA_ISA {

// gradient, parameter and m are first multiplied by grad, param and first (1, 1, 1 most of the time), v by first^2
template <class T>
struct Update {
    T grad, param, first;
    T decay, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, step_size;
    bool amsgrad;
};

// count is the step's number, from 1; move: the moments' change of units; factor: the parameter's own
template <class T>
INLINE Update<T> make_update(const double* h, double count, double grad, double param, double move) {
    const double bias1 = 1 - __builtin_pow(h[BETA1], count);
    const double bias2 = 1 - __builtin_pow(h[BETA2], count);
    return {T(h[MAXIMIZE] != 0 ? -grad : grad),
            T(param),
            T(move),
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
    const T top = sizeof(T) == 8 ? T(1e153) : T(1e18);  // its square stays in range too
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const int64_t o = PLAIN_STEP ? i : i * stride;
        const T grad = saturated(g[PLAIN_STEP ? i : i * inc] * u.grad, top);
        T first = T(widen(m[o]));
        T second = T(widen(v[o]));
        if (!PLAIN_STEP) {
            first *= u.first;
            second = second * u.first * u.first;
        }
        first += (grad - first) * u.one_minus_beta1;
        second = second * u.beta2 + u.one_minus_beta2 * grad * grad;
        // saturated: a moment that was loaded may be NaN or inf
        narrow_saturated(first, m + o);
        narrow_saturated(second, v + o);
        if (!PLAIN_STEP && u.amsgrad) {
            const T highest = T(widen(x[o])) * u.first * u.first;
            second = highest != highest ? highest : highest > second ? highest : second;
            narrow_saturated(second, x + o);
        }
        // eps = 0 and no gradient yet: 0 / 0 is no step. A select on the divisor keeps the loop in vectors
        const T divisor = root(second) * u.correction2 + u.eps + (first == 0 ? T(1) : T(0));
        const T value = weights.template read<T>(p, o) * u.param * u.decay - u.step_size * first / divisor;
        weights.write(value, p, o, i);
    }
}

template <class T, class S, class Q, class Weights>
INLINE void update_strided(const Update<T>& u, const T* g, int64_t inc, S* p, Q* m, Q* v, Q* x, const Weights& weights,
                           int64_t stride, int64_t n) {
    if (inc == 1 && stride == 1 && !u.amsgrad && u.first == 1)
        return update_run<true>(u, g, 1, p, m, v, x, weights, 1, n);
    update_run<false>(u, g, inc, p, m, v, x, weights, stride, n);
}

// Preconditions the gradient by M (null: I) and updates parameter and moments (stored as Q) block by block. CARRY is
// known at compile time: the loops of a step that carries nothing would lose registers to it.
template <bool CARRY, class Q, class T, class S, class Weights>
static void update_side(const int64_t* row, int side, const T* m, const T* mt, int64_t ldm, const Update<T>& u,
                        const Weights& weights, Carry* carry, T* in, T* out) {
    const Factor<S> p = factor<S>(row, side, P);
    const Factor<S> g = factor<S>(row, side, G);
    Q* first = reinterpret_cast<Q*>(row[side + M]);
    Q* second = reinterpret_cast<Q*>(row[side + V]);
    Q* top = reinterpret_cast<Q*>(row[side + X]);
    for_blocks<T, S>(g, m, mt, ldm, in, out, [&](const T* values, int64_t li, int64_t lk, int64_t k0, int64_t count) {
        const bool along_r = p.transposed();
        if (along_r && p.sn == p.r && li == 1 && lk == p.r) {  // the whole block is one run
            const int64_t o = k0 * p.sn;
            const Weights own = weights.run(o, k0 * p.r, 1);
            update_strided(u, values, 1, p.p + o, first + o, second + o, top + o, own, 1, count * p.r);
        } else {
            const int64_t outer = along_r ? count : p.r;
            const int64_t inner = along_r ? p.r : count;
            const int64_t lo = along_r ? lk : li;
            const int64_t lin = along_r ? li : lk;
            const int64_t so = along_r ? p.sn : p.sr;
            const int64_t si = along_r ? p.sr : p.sn;
            for (int64_t i = 0; i < outer; ++i) {
                const int64_t o = k0 * p.sn + i * so;
                const Weights own = weights.run(o, k0 * p.r + i * (along_r ? p.r : 1), along_r ? 1 : p.r);
                update_strided(u, values + i * lo, lin, p.p + o, first + o, second + o, top + o, own, si, inner);
            }
        }
        if constexpr (CARRY) carry->add(p, k0, count);
    });
}

}  // namespace REFLORA_ISA
}  // namespace reflora
