// Symmetric eigenproblems: Householder tridiagonalisation, then QL with implicit shifts. Written once for two kinds of
// element: a vector, one matrix a lane, for small matrices; a scalar, with vectors along the rows, for large ones.
#pragma once
#include "vec.h"

namespace reflora {
namespace REFLORA_ISA {

// an element, and integers of its size to choose by
template <class T, bool LANES>
struct Element {
    using E = T;
    using I = int64_t;
};
template <class T>
struct Element<T, true> {
    using E = typename VecOf<T>::type;
    using I = decltype(E{} < E{});
};

template <class T, bool LANES>
struct Eigen {
    using E = typename Element<T, LANES>::E;
    using I = typename Element<T, LANES>::I;
    using B = typename VecOf<T>::type;  // what the elements of a row are taken in
    static constexpr bool lanes = LANES;
    static constexpr int W = VecOf<T>::W;
    static constexpr int STEP = lanes ? 1 : W;  // numbers of E in a B
    static constexpr T eps = sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920929e-7f);
    // below rounding for matrices of norm about 1, and far enough from underflow for its square to be exact
    static constexpr T negligible = eps * T(1e-3);
    static constexpr int64_t most_sweeps = 60;  // an eigenvalue; two are usual

    static int64_t blocks(int64_t count) { return (count + STEP - 1) / STEP; }  // B that hold `count` E
    // rows an odd number of vectors apart: at a power of two they would fall on each other in the caches
    static int64_t apart(int64_t count) { return count | 1; }
    static int64_t stride(int64_t n) { return apart(blocks(n)) * STEP; }
    static int64_t capacity(int64_t n) { return 4 * n > 512 ? 4 * n : 512; }

    int64_t n;
    E *A, *d, *e, *tau;  // A [n, stride]: on entry the matrix, then row i holds the reflector that cleared it
    E *v, *w, *p;        // stride(n) each, zeros past their end
    B* Q;                // the orthogonal factor, rows [n, stride(n) / STEP]; null: values only
    E* rotations;        // [capacity, 2]

    E number(T x) const { return E{} + x; }
    static E sqrt_of(E x) {
        if constexpr (lanes) {
            for (int k = 0; k < W; ++k) x[k] = root(x[k]);
            return x;
        } else {
            return root(x);
        }
    }
    static E size_of(E x) { return x < 0 ? -x : x; }
    static const B* row(const E* x) { return reinterpret_cast<const B*>(x); }
    static B* row(E* x) { return reinterpret_cast<B*>(x); }

    // summed in the same order for both kinds of element, as everything here is: a matrix has the same eigenvalues and
    // eigenvectors to the bit in a lane and alone
    E dot(const E* x, const E* y, int64_t count) const {
        if constexpr (lanes) {
            E sums[W] = {};
            for (int64_t k = 0; k < count; k += W)
                for (int64_t l = 0; l < W && k + l < count; ++l)
                    sums[l] = fused(x[k + l], y[k + l], sums[l]);
            for (int half = W / 2; half; half /= 2)
                for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
            return sums[0];
        } else {
            B sums = {};
            for (int64_t k = 0; k < blocks(count); ++k) sums = fused(row(x)[k], row(y)[k], sums);
            for (int half = W / 2; half; half /= 2)
                for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
            return sums[0];
        }
    }

    // rows [j, j + R) of A -= v w^T + w v^T, then p += those rows times next[j]
    template <int R>
    void update_rows(int64_t j, int64_t count, const E* next) const {
        const int64_t ld = stride(n);
        const int64_t m = blocks(count);
        B left[R], right[R], use[R];
        for (int u = 0; u < R; ++u) {
            left[u] = B{} + v[j + u];
            right[u] = B{} + w[j + u];
            use[u] = B{} + next[j + u];
        }
        for (int64_t k = 0; k < m; ++k) {
            const B vk = row(v)[k];
            const B wk = row(w)[k];
            B sum = row(p)[k];
            for (int u = 0; u < R; ++u) {
                B* a = row(A + (j + u) * ld) + k;
                const B x = *a - left[u] * wk - right[u] * vk;
                *a = x;
                sum += x * use[u];
            }
            row(p)[k] = sum;
        }
    }

    // the matrix becomes tridiagonal: d [n], e [n] between i and i + 1. Row i is cleared from the last one up.
    // The update by a reflector waits until the next one is known: one pass over A does both its uses
    void tridiagonalize(E* next) const {
        const int64_t ld = stride(n);
        for (int64_t k = 0; k < ld; ++k) v[k] = w[k] = next[k] = p[k] = E{};
        for (int64_t i = n - 1; i >= 0; --i) {
            update_rows<1>(i, i + 1, next);
            E* x = A + i * ld;
            d[i] = x[i];
            if (i == 0) break;
            const E alpha = x[i - 1];
            for (int64_t k = 0; k < i; ++k) next[k] = x[k];
            for (int64_t k = i - 1; k < ld; ++k) next[k] = E{};
            const E tail = dot(next, next, i);
            const auto none = tail <= negligible * negligible;
            const E norm = sqrt_of(fused(alpha, alpha, tail));
            const E beta = none ? alpha : alpha > 0 ? -norm : norm;
            const E t = none ? E{} : (beta - alpha) / (none ? number(1) : beta);
            const E scale = none ? E{} : 1 / (none ? number(1) : alpha - beta);
            for (int64_t k = 0; k < i - 1; ++k) next[k] *= scale;
            next[i - 1] = number(1);
            for (int64_t k = 0; k < i; ++k) x[k] = next[k];
            e[i - 1] = beta;
            tau[i] = t;
            for (int64_t k = 0; k < ld; ++k) p[k] = E{};
            int64_t j = 0;
            for (; j + 4 <= i; j += 4) update_rows<4>(j, i, next);
            for (; j < i; ++j) update_rows<1>(j, i, next);
            for (int64_t k = 0; k < i; ++k) p[k] *= t;
            for (int64_t k = i; k < ld; ++k) p[k] = E{};
            const E half = t * dot(p, next, i) / 2;
            for (int64_t k = 0; k < ld; ++k) {
                v[k] = next[k];
                w[k] = fused(-half, next[k], p[k]);
            }
        }
        e[n - 1] = E{};
    }

    // Q := the product of all reflectors. As above, one pass applies a reflector and sums up what the next one needs
    void form_q(E* y, E* sum) const {
        const int64_t ld = stride(n);
        const int64_t m = ld / STEP;
        for (int64_t k = 0; k < n * m; ++k) Q[k] = B{};
        for (int64_t i = 0; i < n; ++i) reinterpret_cast<E*>(Q + i * m)[i] = number(1);
        for (int64_t k = 0; k < ld; ++k) y[k] = E{};
        for (int64_t i = 1; i < n; ++i) {  // reflector i has been summed up in y, i + 1 is next
            const E* x = A + i * ld;
            const E* following = i + 1 < n ? x + ld : nullptr;
            for (int64_t k = 0; k < ld; ++k) sum[k] = E{};
            int64_t k = 0;
            for (; k + 4 <= i; k += 4) reflect_rows<4>(k, i, x, y, following, sum);
            for (; k < i; ++k) reflect_rows<1>(k, i, x, y, following, sum);
            if (!following) break;
            sum[i] += following[i];  // row i is that of the identity
            for (int64_t l = 0; l < ld; ++l) y[l] = tau[i + 1] * sum[l];
        }
    }

    template <int R>
    void reflect_rows(int64_t k, int64_t i, const E* x, const E* y, const E* following, E* sum) const {
        const int64_t m = stride(n) / STEP;
        B weight[R], next[R];
        for (int u = 0; u < R; ++u) {
            weight[u] = B{} + x[k + u];
            next[u] = B{} + (following ? following[k + u] : E{});
        }
        for (int64_t j = 0; j < blocks(i); ++j) {
            const B yj = row(y)[j];
            B total = row(sum)[j];
            for (int u = 0; u < R; ++u) {
                B* q = Q + (k + u) * m + j;
                const B z = *q - weight[u] * yj;
                *q = z;
                total += next[u] * z;
            }
            row(sum)[j] = total;
        }
    }

    // rotations of columns (i, i + 1), i = from - 1 ... to
    struct Sweep {
        int64_t from, to;
    };

    template <class C>
    static I flag(C condition) {  // all bits, or none
        if constexpr (lanes) {
            return condition;
        } else {
            return -int64_t(condition);
        }
    }
    static bool any(I flags) {
        if constexpr (lanes) {
            bool found = false;
            for (int k = 0; k < W; ++k) found |= flags[k] != 0;
            return found;
        } else {
            return flags != 0;
        }
    }
    static int64_t least_of(I x) {
        if constexpr (lanes) {
            int64_t low = x[0];
            for (int k = 1; k < W; ++k) low = x[k] < low ? x[k] : low;
            return low;
        } else {
            return x;
        }
    }

    // eigenvalues into d, in no order; their rotations go to Z, `count` panels of n B, apart(n) from each other. Lanes
    // go their own way: lane by lane [low, high] is the block that is swept, off where it has come to the end
    void ql(B* Z, int64_t count) const {
        I low = I{};
        Sweep sweeps[64];
        int used = 0;
        int64_t filled = 0;
        for (int64_t turn = 0; turn < most_sweeps * n; ++turn) {
            I high = I{} + element(n - 1);
            I found = I{};
            E first = E{};
            E second = E{};
            E between = number(1);
            const int64_t begin = least_of(low);
            for (int64_t i = begin; i < n - 1; ++i) {
                const I here = flag(low == element(i));
                const E beside = size_of(d[i]) + size_of(d[i + 1]);
                const I small = flag(size_of(e[i]) <= fused(number(eps / 2), beside, number(negligible)));
                const I open = here & ~small & ~found;
                first = open ? d[i] : first;
                second = open ? d[i + 1] : second;
                between = open ? e[i] : between;
                const I ends = small & ~here & ~found & flag(low < element(i));
                high = ends ? I{} + element(i) : high;
                found |= ends;
                low = (here & small) ? I{} + element(i + 1) : low;
                if constexpr (!lanes) {
                    if (found) break;
                }
            }
            const I on = flag(low < high);
            if (!any(on)) break;
            const E ratio = (second - first) / (2 * between);
            const E length = sqrt_of(fused(ratio, ratio, number(1)));
            const E shift = first - between / (ratio + (ratio < 0 ? -length : length));
            const int64_t to = least_of(on ? low : I{} + element(n - 1));
            const int64_t from = -least_of(on ? -high : I{});
            sweeps[used++] = {from, to};
            sweep(low, high, on, shift, from, to, rotations + 2 * filled);
            filled += from - to;
            if (Q && (used == 64 || filled + n > capacity(n))) {
                apply(Z, count, sweeps, used);
                filled = 0;
                used = 0;
            }
            if (!Q) {
                filled = 0;
                used = 0;
            }
        }
        if (Q) apply(Z, count, sweeps, used);
    }

    static auto element(int64_t i) {
        if constexpr (lanes) {
            return static_cast<decltype(I{}[0] + 0)>(i);
        } else {
            return i;
        }
    }

    void sweep(I low, I high, I on, E shift, int64_t from, int64_t to, E* out) const {
        E g = E{};
        E s = number(1);
        E c = number(1);
        E less = E{};
        E above = d[from];  // d[i + 1]
        for (int64_t i = from - 1; i >= to; --i, out += 2) {
            const I start = flag(high == element(i + 1));
            const I active = on & flag(high > element(i)) & flag(low <= element(i));
            g = start ? above - shift : g;
            s = start ? number(1) : s;
            c = start ? number(1) : c;
            less = start ? E{} : less;
            const E f = s * e[i];
            const E b = c * e[i];
            const E square = fused(f, f, g * g);
            const E lower = above - less;
            const I void_ = active & flag(square == 0);
            const I turn = active & ~void_;
            const E length = sqrt_of(square);
            const E inverse = 1 / (void_ ? number(1) : length);
            E sn = f * inverse;
            E cn = g * inverse;
            // nearer to a rotation than rounding left it: what is off adds up over n^2 of them
            const E half = fused(-sn, sn, fused(-cn, cn, number(1))) / 2;
            cn = fused(cn, half, cn);
            sn = fused(sn, half, sn);
            const E r = fused(d[i] - lower, sn, 2 * (cn * b));
            e[i + 1] = active ? (start ? E{} : length) : e[i + 1];
            d[i + 1] = active ? (void_ ? lower : fused(sn, r, lower)) : above;
            less = sn * r;
            s = sn;
            c = cn;
            g = fused(cn, r, -b);
            on &= ~void_;  // what is left of this lane's sweep has nothing to do
            const I last = turn & flag(low == element(i));
            above = last ? fused(-sn, r, d[i]) : d[i];
            d[i] = above;
            e[i] = last ? g : e[i];
            out[0] = turn ? cn : number(1);
            out[1] = turn ? sn : E{};
        }
    }

    // the sweeps' rotations of the columns of Z, R panels at a time
    void apply(B* Z, int64_t count, const Sweep* sweeps, int used) const {
        int64_t k = 0;
        for (; k + 4 <= count; k += 4) apply_rows<4>(Z + k * apart(n), sweeps, used);
        for (; k < count; ++k) apply_rows<1>(Z + k * apart(n), sweeps, used);
    }

    template <int R>
    void apply_rows(B* RESTRICT Z, const Sweep* sweeps, int used) const {
        const E* RESTRICT cs = rotations;
        const int64_t m = apart(n);
        for (int one = 0; one < used; ++one) {
            B x[R];
            for (int u = 0; u < R; ++u) x[u] = Z[u * m + sweeps[one].from];
            for (int64_t i = sweeps[one].from - 1; i >= sweeps[one].to; --i, cs += 2) {
                const B c = B{} + cs[0];
                const B s = B{} + cs[1];
                for (int u = 0; u < R; ++u) {
                    const B z = Z[u * m + i];
                    Z[u * m + i + 1] = s * z + c * x[u];
                    x[u] = c * z - s * x[u];
                }
            }
            for (int u = 0; u < R; ++u) Z[u * m + sweeps[one].to] = x[u];
        }
    }
};

}  // namespace REFLORA_ISA
}  // namespace reflora
