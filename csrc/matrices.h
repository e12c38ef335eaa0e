// Functions of batches of small matrices, in double: polar, geometric mean, roots, singular value decomposition.
#pragma once
#include "eigh.h"
#include "svd.h"
#include "table.h"

namespace reflora {
namespace REFLORA_ISA {

struct Matrices {
    const MatrixGroup& job;
    const Dense d;
    double* m[10];           // scratch like a matrix
    double *eigen, *values;  // dense [count, n, n] and [count, n]
    int64_t* order;
    bool* flags;
    void* rest;  // what eigh_group takes

    Matrices(const MatrixGroup& job, Arena& arena) : job(job), d{job.n, padded<double>(job.n)} {
        for (double*& one : m) one = arena.take<double>(size_t(d.rp * d.rp));
        eigen = arena.take<double>(size_t(job.count * d.r * d.r));
        values = arena.take<double>(size_t(job.count * d.r));
        order = arena.take<int64_t>(size_t(d.r));
        flags = arena.take<bool>(size_t(d.r));
        rest = arena.next;
    }

    int64_t size() const { return d.r * d.r; }
    const double* x(int64_t k) const { return job.x + k * size(); }
    double* out(int which, int64_t k) const { return job.out[which] + k * size(); }

    // dense in, scaled and padded out
    void load_scaled(const double* in, const Scale<double>& scale, double* X) const {
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.rp; ++j)
                X[i * d.rp + j] = j < d.r ? scale.down(in[i * d.r + j]) : 0;
    }
    // and back, times 2^e
    void store_result(const double* X, bool sound, int64_t e, double* result) const {
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j)
                result[i * d.r + j] = sound ? raised(X[i * d.rp + j], e) : __builtin_nan("");
    }

    void run() const {
        if (job.f == INV_ROOT) return inv_roots();
        if (job.f == SVD) return svds();
        for (int64_t k = 0; k < job.count; ++k) {
            if (job.f == POLAR) {
                polar(k);
            } else {
                mean(k);
            }
        }
    }

    // X # Y; the roots are those of X # I and of its inverse
    void mean(int64_t k) const {
        double *Ux = m[0], *Ex = m[1], *Uy = m[2], *Ey = m[3], *Q = m[4], *Y = m[5], *M = m[6], *s = m[7], *t = m[8];
        const Scale<double> scale(x(k), size());
        bool sound = load_factor(x(k), scale, Uy, Ey);
        int64_t e = scale.e;
        if (job.f == GEOMETRIC_MEAN) {
            const Scale<double> other(job.y + k * size(), size());
            sound = load_factor(job.y + k * size(), other, Ux, Ex) & sound;
            e += other.e;
        } else {
            d.identity(Ux);
            d.identity(Ex);
        }
        if (sound) {
            d.transpose(Ex, t);
            d.multiply(Uy, t, Q);  // Ly^T Lx^-T = Q H
            d.transpose(Ux, t);
            d.multiply(Ey, t, Y);  // its inverse transposed, Ly^-1 Lx
            d.polar_factor(Q, Y, true, M, order);
            if (job.f == INVSQRTM) {
                d.symmetric_tn(Ey, Q, s);  // Ly^-T Q
            } else {
                d.multiply(Q, Ux, Y);
                d.symmetric_tn(Uy, Y, s);  // Ly Q Lx^T
            }
        }
        store_result(s, sound, job.f == INVSQRTM ? -e / 2 : e / 2, out(0, k));
    }

    bool load_factor(const double* in, const Scale<double>& scale, double* U, double* E) const {
        load_scaled(in, scale, U);
        d.symmetrize(U);
        return d.cholesky(U, E) && scale.finite;
    }

    // Newton and Newton-Schulz, unless X is too near to a singular matrix for its inverse: then by its singular vectors
    void polar(int64_t k) const {
        double *Q = m[0], *Y = m[1], *M = m[2], *X = m[3], *t = m[4];
        const Scale<double> scale(x(k), size());
        load_scaled(x(k), scale, X);
        load_scaled(x(k), scale, Q);
        const double norm = d.norm(X);
        if (norm == 0) {
            d.identity(Q);
        } else {
            d.polar_factor(Q, Y, false, M, order);
        }
        d.multiply_tn(Q, X, M);  // H where Q is the polar factor
        d.square(Q, Y);
        d.away_from_identity(Y, 1);
        double skew = 0;
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < i; ++j) {
                const double apart = M[i * d.rp + j] - M[j * d.rp + i];
                skew += apart * apart / 2;
            }
        const double rounding = 1e-15 * root(double(d.r)) * 4;
        if (!(root(skew) <= rounding * norm && d.norm(Y) <= rounding * root(double(d.r)))) {
            decompose(k, 1);
            double *U = m[5], *Vt = m[6];
            d.multiply_tn(U, Vt, Q);
            for (int64_t i = 0; i < d.r; ++i)
                for (int64_t j = 0; j < d.rp; ++j) t[i * d.rp + j] = Vt[i * d.rp + j] * values[i];
            d.multiply_tn(Vt, t, M);
        }
        d.symmetrize(M);
        store_result(Q, scale.finite, 0, out(0, k));
        store_result(M, scale.finite, scale.e, out(1, k));
    }

    // singular vectors of `count` scaled matrices from number `first` on: rows of m[5] (U) and m[6] (V), values in
    // `values`, of the last of them; the others only through `then`
    template <class Then>
    void decompose(int64_t first, int64_t count, const Then& then) const {
        double *X = m[7], *t = m[8];
        for (int64_t k = 0; k < count; ++k) {
            const Scale<double> scale(x(first + k), size());
            load_scaled(x(first + k), scale, X);
            d.square(X, t);
            for (int64_t i = 0; i < d.r; ++i)
                for (int64_t j = 0; j < d.r; ++j)
                    eigen[k * size() + i * d.r + j] = t[i * d.rp + j];
        }
        eigh_group(eigen, values, eigen, count, d.r, rest);
        for (int64_t k = 0; k < count; ++k) {
            const Scale<double> scale(x(first + k), size());
            load_scaled(x(first + k), scale, X);
            Svd{d}.run(X, eigen + k * size(), m[5], m[6], values, t, m[9], flags);
            then(first + k, scale);
        }
    }
    void decompose(int64_t first, int64_t count) const {
        decompose(first, count, [](int64_t, const Scale<double>&) {});
    }

    // S descending; the first largest component of each row of V^T positive
    void svds() const {
        decompose(0, job.count, [&](int64_t k, const Scale<double>& scale) {
            const double *U = m[5], *Vt = m[6];
            const double nan = __builtin_nan("");
            ascending(values, 1, d.r, order);
            for (int64_t j = 0; j < d.r; ++j) {
                const int64_t from = order[d.r - 1 - j];
                double top = 0;
                double sign = 1;
                for (int64_t i = 0; i < d.r; ++i) {
                    const double z = Vt[from * d.rp + i];
                    if (magnitude(z) > top) {
                        top = magnitude(z);
                        sign = z < 0 ? -1 : 1;
                    }
                }
                sign = scale.finite ? sign : nan;
                job.out[1][k * d.r + j] = scale.up(values[from]);
                for (int64_t i = 0; i < d.r; ++i) {
                    out(0, k)[i * d.r + j] = sign * U[from * d.rp + i] + 0.0;
                    out(2, k)[j * d.r + i] = sign * Vt[from * d.rp + i] + 0.0;
                }
            }
        });
    }

    // V diag((w + shift)^(-1/root)) V^T; eigenvalues below zero by no more than rounding are zero
    void inv_roots() const {
        double *B = m[0], *t = m[1], *A = m[2];
        eigh_group(job.x, values, eigen, job.count, d.r, rest);
        for (int64_t k = 0; k < job.count; ++k) {
            const double* w = values + k * d.r;
            const double* V = eigen + k * size();
            const double low = magnitude(w[0]);
            const double high = magnitude(w[d.r - 1]);
            const double rounding = job.unit * 4 * root(double(d.r)) * (low > high ? low : high);
            bool sound = true;
            for (int64_t j = 0; j < d.r; ++j) {
                const double shifted = (w[j] < 0 && w[j] >= -rounding ? 0 : w[j]) + job.shift;
                sound &= shifted > 0;
                const double power = __builtin_pow(shifted, -1 / job.root);
                for (int64_t i = 0; i < d.rp; ++i) {
                    B[j * d.rp + i] = i < d.r ? V[i * d.r + j] : 0;
                    t[j * d.rp + i] = power * B[j * d.rp + i];
                }
            }
            d.symmetric_tn(B, t, A);
            store_result(A, sound, 0, out(0, k));
        }
    }
};

static void matrices(const MatrixGroup& job, void* work) {
    Arena arena{static_cast<char*>(work)};
    Matrices(job, arena).run();
}

static size_t matrices_bytes(int64_t count, int64_t n) {
    MatrixGroup job{};
    job.count = count;
    job.n = n;
    Arena arena{reinterpret_cast<char*>(64)};
    Matrices(job, arena);
    return size_t(reinterpret_cast<uintptr_t>(arena.next)) + eigh_group_bytes<double>(n);
}

}  // namespace REFLORA_ISA
}  // namespace reflora
