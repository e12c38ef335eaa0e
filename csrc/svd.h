// Singular value decomposition by one-sided Jacobi: accurate for every X, however singular.
#pragma once
#include "dense.h"

namespace reflora {
namespace REFLORA_ISA {

struct Svd {
    const Dense& d;
    using V = Dense::V;
    static constexpr int W = Dense::W;
    static constexpr double nothing = 1e-270;  // squared norm of a column that counts as zero, X being about 1
    static constexpr int most_sweeps = 40;     // 3 or 4 are usual

    struct Dots {
        double pp, pq, qq;
    };
    Dots dots(const double* RESTRICT p, const double* RESTRICT q) const {
        V pp = {}, pq = {}, qq = {};
        for (int64_t k = 0; k < d.rp; k += W) {
            const V x = load<V>(p + k);
            const V y = load<V>(q + k);
            pp += x * x;
            pq += x * y;
            qq += y * y;
        }
        Dots sum{};
        for (int l = 0; l < W; ++l) {
            sum.pp += pp[l];
            sum.pq += pq[l];
            sum.qq += qq[l];
        }
        return sum;
    }

    void rotate(double* RESTRICT p, double* RESTRICT q, double c, double s) const {
        for (int64_t k = 0; k < d.rp; k += W) {
            const V x = load<V>(p + k);
            const V y = load<V>(q + k);
            store<V>(p + k, c * x - s * y);
            store<V>(q + k, s * x + c * y);
        }
    }

    // rows of G (columns of X V) are made orthogonal, and rows of Y (columns of V) go along
    void orthogonal_columns(double* G, double* Y) const {
        const double tolerance = 1.1e-16 * root(double(d.r < 4 ? 4 : d.r));
        bool rotated = true;
        for (int sweep = 0; rotated && sweep < most_sweeps; ++sweep) {
            rotated = false;
            for (int64_t p = 0; p < d.r; ++p)
                for (int64_t q = p + 1; q < d.r; ++q) {
                    double* gp = G + p * d.rp;
                    double* gq = G + q * d.rp;
                    const Dots a = dots(gp, gq);
                    const double most = tolerance * root(a.pp) * root(a.qq);
                    if (!(a.pp > nothing && a.qq > nothing && magnitude(a.pq) > most)) continue;
                    const double z = (a.qq - a.pp) / (2 * a.pq);
                    const double t = (z < 0 ? -1 : 1) / (magnitude(z) + root(1 + z * z));
                    const double c = 1 / root(1 + t * t);
                    rotate(gp, gq, c, c * t);
                    rotate(Y + p * d.rp, Y + q * d.rp, c, c * t);
                    rotated = true;
                }
        }
    }

    // rows of U where `missing` are made unit vectors orthogonal to all others: of e_1 ... e_n the one that is farthest
    // from their span, twice orthogonalised
    void complete(double* U, bool* missing) const {
        for (int64_t j = 0; j < d.r; ++j) {
            if (!missing[j]) continue;
            double* u = U + j * d.rp;
            int64_t best = 0;
            double least = 2;
            for (int64_t k = 0; k < d.r; ++k) {
                double mass = 0;
                for (int64_t i = 0; i < d.r; ++i)
                    mass += missing[i] ? 0 : U[i * d.rp + k] * U[i * d.rp + k];
                if (mass < least) {
                    least = mass;
                    best = k;
                }
            }
            for (int64_t k = 0; k < d.rp; ++k) u[k] = k == best;
            for (int pass = 0; pass < 2; ++pass) {
                for (int64_t i = 0; i < d.r; ++i) {
                    const double* other = U + i * d.rp;
                    const double along = missing[i] ? 0 : dot(u, other, d.rp);
                    for (int64_t k = 0; k < d.rp; ++k) u[k] -= along * other[k];
                }
                const double norm = root(dot(u, u, d.rp));
                for (int64_t k = 0; k < d.rp; ++k) u[k] /= norm;
            }
            missing[j] = false;
        }
    }

    // X = U diag(S) V^T; U and V as rows of G and Y, in any order. start: eigenvectors of X^T X [r, r], the largest
    // last; with them few sweeps are left. t, M: scratch like X; flags: r of them
    void run(const double* X, const double* start, double* G, double* Y, double* S, double* t, double* M,
             bool* flags) const {
        for (int64_t j = 0; j < d.r; ++j)
            for (int64_t i = 0; i < d.rp; ++i)
                Y[j * d.rp + i] = i < d.r ? start[i * d.r + d.r - 1 - j] : 0;
        d.transpose(X, t);
        d.multiply(Y, t, G);
        orthogonal_columns(G, Y);
        for (int64_t j = 0; j < d.r; ++j) {
            double* g = G + j * d.rp;
            const double square = dot(g, g, d.rp);
            flags[j] = !(square > nothing);
            S[j] = flags[j] ? 0 : root(square);
            for (int64_t k = 0; k < d.rp; ++k) g[k] = flags[j] ? 0 : g[k] / S[j];
        }
        complete(G, flags);
        // columns at rounding level, and V of many rotations, are orthogonal to a few digits less
        d.orthogonalise(G, t, M);
        d.orthogonalise(Y, t, M);
    }
};

}  // namespace REFLORA_ISA
}  // namespace reflora
