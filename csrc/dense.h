// r x r linear algebra on row-major matrices with padded rows: X[i * rp + j], zeros for j >= r, rp a multiple of the
// vector width. Cholesky with its inverse, products, and the polar factor.
#pragma once
#include "vec.h"

namespace reflora {
namespace REFLORA_ISA {

struct Dense {
    using T = double;
    using V = VecOf<T>::type;
    static constexpr int W = VecOf<T>::W;
    static constexpr double limit = 1e300;
    static constexpr int schulz_steps = 200;
    int64_t r, rp;

    // C (+)= P^T Q, of `count` rows of both
    template <int MR, int NV, bool ADD>
    INLINE void outer_block(const T* RESTRICT P, const T* RESTRICT Q, int64_t count, int64_t rp, int64_t i0, int64_t j0,
                          T* RESTRICT C) {
        constexpr int ROWS = NV == 1 ? 2 : 1;  // of P and Q at a time: enough sums in flight to hide the latency of one
        V acc[ROWS][MR][NV] = {};  // of this panel alone: summed in one chain, long factors lose digits
        const auto add = [&](int64_t k, int u) {
            const T* p = P + k * rp + i0;
            const T* q = Q + k * rp + j0;
            V b[NV];
            for (int v = 0; v < NV; ++v) b[v] = load<V>(q + v * W);
            for (int i = 0; i < MR; ++i)
                for (int v = 0; v < NV; ++v) acc[u][i][v] += p[i] * b[v];
        };
        int64_t k = 0;
        for (; k + ROWS <= count; k += ROWS)
            for (int u = 0; u < ROWS; ++u) add(k + u, u);
        for (; k < count; ++k) add(k, 0);
        for (int i = 0; i < MR; ++i)
            for (int v = 0; v < NV; ++v) {
                T* c = C + (i0 + i) * rp + j0 + v * W;
                const V sum = ROWS == 1 ? acc[0][i][v] : acc[0][i][v] + acc[ROWS - 1][i][v];
                store<V>(c, ADD ? load<V>(c) + sum : sum);
            }
    }

    // how many vectors of a row to take at a time where `left` remain: 4 are 2 + 2, as one alone leaves units idle
    INLINE int64_t vectors(int64_t left) { return left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3; }

    // all of C, or at least its upper triangle. Eight rows at a time (four where there are but 16 registers) keep
    // enough sums in flight to hide the latency of one; inlined into its callers they would not stay in registers
    template <bool ADD, bool UPPER>
    __attribute__((noinline)) void outer(const T* P, const T* Q, int64_t count, T* C) const {
        constexpr int MR = REGISTERS / 4;
        for (int64_t i0 = 0; i0 < r; i0 += MR) {
            int64_t j0 = UPPER ? i0 / W * W : 0;
            while (j0 < rp) {
                const int64_t taken = vectors((rp - j0) / W);
                if (taken == 3) outer_block<MR, 3, ADD>(P, Q, count, rp, i0, j0, C);
                if (taken == 2) outer_block<MR, 2, ADD>(P, Q, count, rp, i0, j0, C);
                if (taken == 1) outer_block<MR, 1, ADD>(P, Q, count, rp, i0, j0, C);
                j0 += taken * W;
            }
        }
    }

    // C += P^T P over `count` rows of P [count, rp], at least the upper triangle
    void gram_add(const T* P, int64_t count, T* C) const { outer<true, true>(P, P, count, C); }

    // C = A^T B
    void multiply_tn(const T* A, const T* B, T* C) const { outer<false, false>(A, B, r, C); }

    // C = A^T B where that is symmetric
    void symmetric_tn(const T* A, const T* B, T* C) const {
        outer<false, true>(A, B, r, C);
        mirror(C);
    }

    // the upper triangle to the lower one
    void mirror(T* C) const {
        for (int64_t i0 = 0; i0 < r; i0 += W) {
            for (int64_t j0 = 0; j0 < i0; j0 += W) turn_block(C + j0 * rp + i0, C + i0 * rp + j0);
            for (int64_t i = i0; i < least(i0 + W, r); ++i)
                for (int64_t j = i0; j < i; ++j) C[i * rp + j] = C[j * rp + i];
        }
    }

    // W x W elements, transposed
    INLINE void turn_block(const T* A, T* C, int64_t rp) {
        V v[W];
        for (int l = 0; l < W; ++l) v[l] = load<V>(A + l * rp);
        transpose_block(v);
        for (int l = 0; l < W; ++l) store<V>(C + l * rp, v[l]);
    }
    void turn_block(const T* A, T* C) const { turn_block(A, C, rp); }

    template <int MR, int NV>
    INLINE void multiply_block(const T* RESTRICT A, const T* RESTRICT B, T* RESTRICT C, int64_t r, int64_t rp,
                             int64_t j0) {
        V acc[MR][NV] = {};
        for (int64_t k = 0; k < r; ++k) {
            V b[NV];
            for (int v = 0; v < NV; ++v) b[v] = load<V>(B + k * rp + j0 + v * W);
            for (int i = 0; i < MR; ++i)
                for (int v = 0; v < NV; ++v) acc[i][v] += A[i * rp + k] * b[v];
        }
        for (int i = 0; i < MR; ++i)
            for (int v = 0; v < NV; ++v) store<V>(C + i * rp + j0 + v * W, acc[i][v]);
    }

    template <int MR>
    INLINE void multiply_rows(const T* A, const T* B, T* C, int64_t r, int64_t rp) {
        constexpr int NV = REGISTERS == 32 ? 4 : 3;
        int64_t j0 = 0;
        for (; REGISTERS == 32 && j0 + NV * W <= rp; j0 += NV * W) multiply_block<MR, NV>(A, B, C, r, rp, j0);
        while (j0 < rp) {
            const int64_t taken = vectors((rp - j0) / W);
            if (taken == 3) multiply_block<MR, 3>(A, B, C, r, rp, j0);
            if (taken == 2) multiply_block<MR, 2>(A, B, C, r, rp, j0);
            if (taken == 1) multiply_block<MR, 1>(A, B, C, r, rp, j0);
            j0 += taken * W;
        }
    }

    // C = A B
    void multiply(const T* A, const T* B, T* C) const {
        int64_t i = 0;
        for (; i + 4 <= r; i += 4) multiply_rows<4>(A + i * rp, B, C + i * rp, r, rp);
        for (; i < r; ++i) multiply_rows<1>(A + i * rp, B, C + i * rp, r, rp);
    }

    void transpose(const T* RESTRICT A, T* RESTRICT C) const {
        const int64_t whole = r / W * W;
        for (int64_t i0 = 0; i0 < whole; i0 += W)
            for (int64_t j0 = 0; j0 < whole; j0 += W) turn_block(A + j0 * rp + i0, C + i0 * rp + j0);
        for (int64_t i = 0; i < r; ++i) {
            for (int64_t j = i < whole ? whole : 0; j < r; ++j) C[i * rp + j] = A[j * rp + i];
            for (int64_t j = r; j < rp; ++j) C[i * rp + j] = 0;
        }
    }

    void identity(T* C) const {
        for (int64_t i = 0; i < r * rp; ++i) C[i] = 0;
        for (int64_t i = 0; i < r; ++i) C[i * rp + i] = 1;
    }

    T norm(const T* A) const { return root(dot(A, A, r * rp)); }

    // U := L^T of U = L L^T, and E := L^-1. False where a pivot is not positive (or nan): not positive definite
    bool cholesky(T* RESTRICT U, T* RESTRICT E) const {
        identity(E);
        for (int64_t j = 0; j < r; ++j) {
            const T pivot = U[j * rp + j];
            if (!(pivot > 0 && pivot < limit)) return false;
            const T s = 1 / root(pivot);
            const int64_t first = j / W * W;
            for (int64_t k = first; k < rp; k += W)
                store<V>(U + j * rp + k, load<V>(U + j * rp + k) * s);
            for (int64_t k = 0; k < j; ++k) U[j * rp + k] = 0;
            for (int64_t k = 0; k <= first; k += W)
                store<V>(E + j * rp + k, load<V>(E + j * rp + k) * s);
            for (int64_t i = j + 1; i < r; ++i) {
                const T f = U[j * rp + i];
                for (int64_t k = i / W * W; k < rp; k += W)
                    store<V>(U + i * rp + k, load<V>(U + i * rp + k) - f * load<V>(U + j * rp + k));
                for (int64_t k = 0; k <= first; k += W)
                    store<V>(E + i * rp + k, load<V>(E + i * rp + k) - f * load<V>(E + j * rp + k));
            }
        }
        return true;
    }

    // M := M^-1 up to order: entry (i, j) of M is entry (i, order[j]) of the inverse. Gauss-Jordan with partial
    // pivoting; a pivot that vanishes is replaced by one at rounding level, so that singular matrices come out finite
    void invert(T* RESTRICT M, int64_t* RESTRICT order) const {
        const T floor = norm(M) * 1e-18;
        for (int64_t i = 0; i < r; ++i) order[i] = i;
        for (int64_t k = 0; k < r; ++k) {
            int64_t p = k;
            T best = magnitude(M[k * rp + k]);
            for (int64_t i = k + 1; i < r; ++i) {
                const T a = magnitude(M[i * rp + k]);
                if (a > best) {
                    best = a;
                    p = i;
                }
            }
            if (p != k) {
                const int64_t o = order[k];
                order[k] = order[p];
                order[p] = o;
                for (int64_t j = 0; j < rp; j += W) {
                    const V t = load<V>(M + k * rp + j);
                    store<V>(M + k * rp + j, load<V>(M + p * rp + j));
                    store<V>(M + p * rp + j, t);
                }
            }
            T pivot = M[k * rp + k];
            if (magnitude(pivot) < floor) pivot = pivot < 0 ? -floor : floor;
            eliminate(M, k, 1 / pivot);
        }
    }

    void eliminate(T* RESTRICT M, int64_t k, T inverse) const {
        switch (rp / W) {
            case 1: return eliminate_as<1>(M, k, inverse);
            case 2: return eliminate_as<2>(M, k, inverse);
            case 4: return eliminate_as<4>(M, k, inverse);
            default: return eliminate_as<0>(M, k, inverse);
        }
    }

    template <int NV>
    INLINE void eliminate_as(T* RESTRICT M, int64_t k, T inverse, int64_t r, int64_t rp) {
        V pivot_row[NV ? NV : 1];
        M[k * rp + k] = 1;
        for (int64_t j = 0; j < rp; j += W)
            store<V>(M + k * rp + j, load<V>(M + k * rp + j) * inverse);
        for (int v = 0; v < NV; ++v) pivot_row[v] = load<V>(M + k * rp + v * W);
        for (int64_t i = 0; i < r; ++i) {
            if (i == k) continue;
            const T f = M[i * rp + k];
            M[i * rp + k] = 0;
            if (NV) {
                for (int v = 0; v < NV; ++v)
                    store<V>(M + i * rp + v * W, load<V>(M + i * rp + v * W) - f * pivot_row[v]);
            } else {
                for (int64_t j = 0; j < rp; j += W)
                    store<V>(M + i * rp + j, load<V>(M + i * rp + j) - f * load<V>(M + k * rp + j));
            }
        }
    }
    template <int NV>
    void eliminate_as(T* M, int64_t k, T inverse) const { eliminate_as<NV>(M, k, inverse, r, rp); }

    void combine(T* RESTRICT X, const T* RESTRICT Y, T a, T b) const {
        for (int64_t i = 0; i < r * rp; i += W)
            store<V>(X + i, a * load<V>(X + i) + b * load<V>(Y + i));
    }

    // Y := X^T X
    void square(const T* X, T* Y) const { symmetric_tn(X, X, Y); }

    void away_from_identity(T* X, T factor) const {
        for (int64_t i = 0; i < r * rp; i += W) store<V>(X + i, factor * load<V>(X + i));
        for (int64_t i = 0; i < r; ++i) X[i * rp + i] -= 1;
    }

    // X := orthogonal polar factor of X. Y = X^-T where known, else scratch as M is; order: r integers. One step of
    // Higham's scaled Newton iteration takes the root of the condition number; the cubic Newton-Schulz steps that
    // follow, scaled as by Chen and Chow for singular values in [low, 1], are products of matrices only
    void polar_factor(T* X, T* Y, bool known, T* M, int64_t* order) const {
        if (!known) {
            for (int64_t i = 0; i < r * rp; i += W) store<V>(M + i, load<V>(X + i));
            invert(M, order);
            for (int64_t j = 0; j < r; ++j) {
                T* y = Y + order[j] * rp;
                for (int64_t i = 0; i < r; ++i) y[i] = M[i * rp + j];
                for (int64_t i = r; i < rp; ++i) y[i] = 0;
            }
        }
        const T z = root(norm(Y) / norm(X));
        combine(X, Y, z / 2, 1 / (2 * z));
        square(X, Y);
        T scale = 1 / root(norm(Y));
        T low = scale;
        for (int step = 0; step < schulz_steps; ++step) {
            away_from_identity(Y, scale * scale);
            const T away = norm(Y);
            low = low > 1 - away ? low : 1 - away;  // the better bound near the end, where 1 must map to 1
            const T s = 3 / (1 + low + low * low);
            const T t = root(s);
            multiply(X, Y, M);
            combine(X, M, t * (3 - s) / 2 * scale, -t * s / 2 * scale);
            if (!(away > 1e-8)) return;  // quadratic: what is left is below rounding; nan leaves too
            low = t * low * (3 - s * low * low) / 2;
            low = low < 1 ? low : 1;
            square(X, Y);
            scale = 1;
        }
    }

    // X := X (3 I - X^T X) / 2: nearer to an orthogonal matrix, if X is near to one. Y, M: scratch like X
    void orthogonalise(T* X, T* Y, T* M) const {
        square(X, Y);
        away_from_identity(Y, 1);
        multiply(X, Y, M);
        combine(X, M, 1, -0.5);
    }

    void symmetrize(T* C) const {
        for (int64_t i = 0; i < r; ++i)
            for (int64_t j = 0; j < i; ++j)
                C[i * rp + j] = C[j * rp + i] = (C[i * rp + j] + C[j * rp + i]) / 2;
    }

    T largest(const T* A) const {  // inf where anything is not finite
        constexpr int64_t infinite = 0x7ff0000000000000;
        int64_t top = 0;
        for (int64_t i = 0; i < r * rp; ++i) {  // magnitudes order as integers do
            int64_t bits;
            __builtin_memcpy(&bits, A + i, 8);
            bits &= 0x7fffffffffffffff;
            top = bits > top ? bits : top;
        }
        top = top < infinite ? top : infinite;
        T found;
        __builtin_memcpy(&found, &top, 8);
        return found;
    }
};

}  // namespace REFLORA_ISA
}  // namespace reflora
