// From two factors to S = (A A^T)^-1 # (B^T B): Grams over their traces, Cholesky, one polar factor
// (docs/mathematics.md).
#pragma once
#include "arena.h"
#include "dense.h"
#include "storage.h"

namespace reflora {
namespace REFLORA_ISA {

INLINE double power_of_two(int e) {
    const uint64_t bits = uint64_t(e + 1023) << 52;
    double x;
    __builtin_memcpy(&x, &bits, 8);
    return x;
}

INLINE int exponent_of(double x) {  // x normal, > 0: x = m 2^e, 1 <= m < 2, clamped so that 2^-e is normal
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    const int e = int(bits >> 52) - 1023;
    return e > 1000 ? 1000 : e < -1000 ? -1000 : e;
}

struct Gram {
    double norm;    // Frobenius norm of the factor; 0, inf or nan if that is what it is
    double kappa;   // ||L||_F ||L^-1||_F, inf where the Gram is numerically singular
    bool usable;    // finite, and not 0
    double* unit;   // the Gram over its trace
    double *U, *E;  // L^T, L^-1
};

// S and S^-1 are computed where out.S is given, P and P^-T (S = P P^T) where out.P is
struct Solution {
    int status;
    double c, scale;  // ||B|| / ||A||, and what S is scaled by: c or 1
    double *S, *S_inv, *P, *P_inv_T;
};

constexpr int64_t CHUNK = 64;
constexpr int64_t KEPT_HEADER = 8;  // doubles before the Grams that a row carries to its next step
constexpr int MATRICES = 18;

INLINE size_t bytes_for(int64_t r) {
    const size_t rp = size_t(padded<float>(r));
    return (MATRICES * rp * rp + 4 * rp * CHUNK) * 8 + (rp + 64) * 8;
}

// sum of (x * scale)^2 over n elements, in double
template <class S>
INLINE double sum_of_squares(const S* p, int64_t stride, int64_t n, double scale) {
    using V = VecOf<double>::type;
    constexpr int W = VecOf<double>::W;
    V sum[32 / W] = {};
    int64_t i = 0;
    for (; stride == 1 && i + 32 <= n; i += 32)
        for (int u = 0; u < 32 / W; ++u) {
            const V x = doubles(p + i + W * u) * scale;
            sum[u] += x * x;
        }
    double rest = 0;
    for (; i < n; ++i) {
        const double x = double(widen(p[i * stride])) * scale;
        rest += x * x;
    }
    double all[32];
    for (int u = 0; u < 32 / W; ++u) store<V>(all + W * u, sum[u]);
    for (int l = 0; l < 8; ++l)
        rest += (all[l] + all[8 + l]) + (all[16 + l] + all[24 + l]);
    return rest;
}

// Frobenius norm: 0, inf or nan if that is what the factor holds
template <class S>
static double factor_norm(const Factor<S>& f) {
    double scale = 1;
    if (sizeof(S) == 8) {  // narrower squares cannot leave the range of double
        const double top = largest(f);
        if (!(top > 0) || top > Storage<S>::max) return top;
        scale = power_of_two(-exponent_of(top < 1e-300 ? 1e-300 : top));
    }
    if (f.dense()) return root(sum_of_squares(f.p, 1, f.r * f.n, scale)) / scale;
    const bool along_r = f.transposed();
    const int64_t outer = along_r ? f.n : f.r;
    const int64_t inner = along_r ? f.r : f.n;
    const int64_t so = along_r ? f.sn : f.sr;
    const int64_t si = along_r ? f.sr : f.sn;
    double sum = 0;
    for (int64_t o = 0; o < outer; ++o) sum += sum_of_squares(f.p + o * so, si, inner, scale);
    return root(sum) / scale;
}

// from the sums over all blocks in out.unit, of a factor times `scale`: its norm, and the Gram over its trace
INLINE void finish_gram(const Dense& d, double scale, Gram& out) {
    out.kappa = __builtin_inf();
    d.mirror(out.unit);
    double trace = 0;
    for (int64_t i = 0; i < d.r; ++i) trace += out.unit[i * d.rp + i];
    out.norm = root(trace) / scale;
    out.usable = trace > 0 && trace < d.limit;
    if (!out.usable) return;
    for (int64_t i = 0; i < d.r * d.rp; ++i) out.unit[i] /= trace;
}

INLINE bool absent(const Dense& d, const Gram& a, const Gram& b, int64_t i) {
    return a.unit[i * d.rp + i] == 0 && b.unit[i * d.rp + i] == 0;
}

// how many of the r ranks are not 0 in both factors
INLINE int64_t present(const Dense& d, const Gram& a, const Gram& b) {
    int64_t count = 0;
    for (int64_t i = 0; i < d.r; ++i) count += !absent(d, a, b, i);
    return count;
}

// Cholesky factors and condition of a Gram of n columns, which is shrunk towards I / rank (reference.shrink_weight).
// Ranks that are absent have that diagonal, and no part in kappa
INLINE void factor_gram(const Dense& d, const Gram& a, const Gram& b, int64_t n, int64_t rank, double weight,
                        Gram& out) {
    for (int64_t i = 0; i < d.r * d.rp; ++i) out.U[i] = weight * out.unit[i];
    const double each = 1 / double(rank);
    const double count = double(d.r - rank);
    for (int64_t i = 0; i < d.r; ++i) {
        double& diagonal = out.U[i * d.rp + i];
        diagonal = rank < d.r && absent(d, a, b, i) ? each : diagonal + (1 - weight) * each;
    }
    if (n < rank || !d.cholesky(out.U, out.E)) return;
    out.kappa = d.norm(out.U) * d.norm(out.E);
    if (count > 0) out.kappa = root(out.kappa * out.kappa / (1 + count * each) - count * double(rank));
    if (out.kappa != out.kappa) out.kappa = __builtin_inf();
}

// after gram() of both sides, of na and nb columns; returns the number of ranks that are present
INLINE int64_t factor_grams(const Dense& d, int64_t na, int64_t nb, double weight, Gram& a, Gram& b) {
    const int64_t rank = a.usable && b.usable ? present(d, a, b) : d.r;
    if (a.usable) factor_gram(d, a, b, na, rank, weight, a);
    if (b.usable) factor_gram(d, a, b, nb, rank, weight, b);
    return rank;
}

template <class S>
static void gram(const Dense& d, const Factor<S>& f, double* panel, Gram& out) {
    double scale = 1;
    for (int64_t i = 0; i < d.rp * d.rp; ++i) out.unit[i] = 0;
    if (sizeof(S) == 8) {  // products of narrower types are exact in double and cannot leave its range
        const double top = largest(f);
        out.norm = top;
        out.kappa = __builtin_inf();
        out.usable = false;
        if (!(top > 0) || top > Storage<S>::max) return;
        scale = power_of_two(-exponent_of(top < 1e-300 ? 1e-300 : top));
    }
    for (int64_t k = 0; k < f.n; k += CHUNK) {
        const int64_t count = least(CHUNK, f.n - k);
        pack(f, k, count, d.rp, scale, panel);
        d.gram_add(panel, count, out.unit);
    }
    finish_gram(d, scale, out);
}

// whether products and sums of these values and of the same values over the power of two of the largest have the same
// digits: then nothing is rounded at the ends of double's range
INLINE bool free_to_scale(const double* x, int64_t n) {
    const double low = power_of_two(-200);
    const double high = power_of_two(200);
    int64_t outside = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double a = magnitude(x[i]);
        outside |= int64_t(!((a >= low && a <= high) || a == 0));
    }
    return outside == 0;
}

// the sums of gram(), block by block in its order, while the blocks of a new factor are in cache. float64 goes
// unscaled, its largest element is not known yet: `exact` says that the Gram over its trace will come out the same
struct Carry {
    const Dense& d;
    double *panel, *sums;
    bool exact = true;

    template <class S>
    void add(const Factor<S>& f, int64_t k, int64_t count) {
        pack(f, k, count, d.rp, 1, panel);
        if (sizeof(S) == 8) exact = free_to_scale(panel, count * d.rp) && exact;
        d.gram_add(panel, count, sums);
    }
};

// where Carry leaves the sums of a row's first or second factor
INLINE double* kept_sums(const Dense& d, double* kept, int side) { return kept + KEPT_HEADER + (side ? d.rp * d.rp : 0); }

// the Gram of a factor from what Carry left
INLINE void carried_gram(const Dense& d, const double* sums, Gram& out) {
    for (int64_t i = 0; i < d.rp * d.rp; ++i) out.unit[i] = sums[i];
    finish_gram(d, 1, out);
}

// ||Ga - Gb||_F / ||Ga||_F of the Grams themselves, from those over their traces
static double imbalance(const Dense& d, const Gram& a, const Gram& b) {
    if (!(a.norm > 0)) return __builtin_inf();
    const double ratio = (b.norm / a.norm) * (b.norm / a.norm);
    double between = 0;
    double size = 0;
    for (int64_t i = 0; i < d.r * d.rp; ++i) {
        const double x = a.unit[i];
        const double y = x - ratio * b.unit[i];
        between += y * y;
        size += x * x;
    }
    return root(between / size);
}

INLINE bool useful(double c, double tiny, double huge) {
    return c >= tiny && c <= huge && 1 / c >= tiny && 1 / c <= huge;
}

static void form_scaled_identity(const Dense& d, double* out, double value) {
    d.identity(out);
    for (int64_t i = 0; i < d.r; ++i) out[i * d.rp + i] = value;
}

// X := Q of N = Lb^T La = Q H; N: where it is kept, or null. Y, M, tmp: scratch; order: r integers
INLINE void polar_of_pair(const Dense& d, const Gram& a, const Gram& b, double* X, double* Y, double* M, double* tmp,
                          int64_t* order, double* N) {
    d.transpose(a.U, tmp);
    d.multiply(b.U, tmp, X);
    if (N) {
        for (int64_t i = 0; i < d.rp * d.rp; ++i)
            N[i] = i < d.r * d.rp ? X[i] : 0;
    }
    d.transpose(a.E, tmp);
    d.multiply(b.E, tmp, Y);  // N^-T = Lb^-1 La^-T
    d.polar_factor(X, Y, true, M, order);
}

// S = scale Lb Q La^-1 and S^-1 = Lb^-T Q La^T / scale; false: the type that they are applied in is too narrow
INLINE bool form_s(const Dense& d, const Gram& a, const Gram& b, const double* Q, double* Y, double huge, Solution& out) {
    d.multiply(Q, a.E, Y);
    d.symmetric_tn(b.U, Y, out.S);
    d.multiply(Q, a.U, Y);
    d.symmetric_tn(b.E, Y, out.S_inv);
    for (int64_t i = 0; i < d.r * d.rp; ++i) {
        out.S[i] *= out.scale;
        out.S_inv[i] /= out.scale;
    }
    return d.largest(out.S) <= huge && d.largest(out.S_inv) <= huge;
}

// P = sqrt(scale) La^-T C and P^-T = La C^-T / sqrt(scale) with H = Q^T N = C C^T, N being in out.P_inv_T. False:
// H is not positive definite, or the type too narrow
INLINE bool form_p(const Dense& d, const Gram& a, const double* Q, double* Y, double* M, double* tmp, double huge,
                   Solution& out) {
    d.symmetric_tn(Q, out.P_inv_T, Y);
    if (!d.cholesky(Y, M)) return false;
    const double half = root(out.scale);
    d.transpose(Y, tmp);
    d.multiply_tn(a.E, tmp, out.P);
    d.transpose(M, tmp);
    d.multiply_tn(a.U, tmp, out.P_inv_T);
    for (int64_t i = 0; i < d.r * d.rp; ++i) {
        out.P[i] *= half;
        out.P_inv_T[i] /= half;
    }
    return d.largest(out.P) <= huge && d.largest(out.P_inv_T) <= huge;
}

// tiny, huge: the normal range of the type that S is applied in
static void solve(const Dense& d, const Gram& a, const Gram& b, double kappa_max, double tiny, double huge, bool scaled,
                  Arena arena, Solution& out) {
    const size_t size = size_t(d.rp * d.rp);
    out.status = DEGENERATE;
    out.c = b.norm / a.norm;
    if (!useful(out.c, tiny, huge)) {
        out.c = 1;
    } else if (a.kappa <= kappa_max && b.kappa <= kappa_max) {
        out.status = REFACTORED;
    }
    out.scale = scaled ? out.c : 1;
    if (out.status == REFACTORED) {
        double* X = arena.take<double>(size);
        double* Y = arena.take<double>(size);
        double* M = arena.take<double>(size);
        double* tmp = arena.take<double>(size);
        int64_t* order = arena.take<int64_t>(size_t(d.r));
        polar_of_pair(d, a, b, X, Y, M, tmp, order, out.P ? out.P_inv_T : nullptr);
        if (out.S && !form_s(d, a, b, X, Y, huge, out)) out.status = DEGENERATE;
        if (out.P && !form_p(d, a, X, Y, M, tmp, huge, out)) out.status = DEGENERATE;
    }
    if (out.status == REFACTORED) return;
    if (out.S) {
        form_scaled_identity(d, out.S, out.scale);
        form_scaled_identity(d, out.S_inv, 1 / out.scale);
    }
    if (out.P) {
        form_scaled_identity(d, out.P, root(out.scale));
        form_scaled_identity(d, out.P_inv_T, 1 / root(out.scale));
    }
}

}  // namespace REFLORA_ISA
}  // namespace reflora
