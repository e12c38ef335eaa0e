// Frames of a metric and second moments whitened in them: reference.frames and reference.whitener.
#pragma once
#include "solve.h"

namespace reflora {
namespace REFLORA_ISA {

// P_A and P_B of the metrics P P^T, of A's and of B's step; both null for I
struct Frames {
    double *of_A, *of_B;
    int status;
};

// out := P with P P^T = (X X^T)^-1 for the X [r, n] of a Gram. False: a multiple of I of the same size stands in
INLINE bool inverse_root(const Dense& d, Gram& g, int64_t n, double kappa_max, double kappa_of_rank, double* out) {
    int64_t rank = 0;
    for (int64_t i = 0; g.usable && i < d.r; ++i) rank += g.unit[i * d.rp + i] != 0;
    g.kappa = __builtin_inf();
    if (g.usable) factor_gram(d, g, g, n, rank, 1, g);
    const double size = g.usable ? root(double(rank)) / g.norm : 1;
    const double of_rank = kappa_of_rank * root(double(rank));
    if (!(g.kappa <= (of_rank < kappa_max ? of_rank : kappa_max))) {
        form_scaled_identity(d, out, size);
        return false;
    }
    d.transpose(g.E, out);
    for (int64_t i = 0; i < d.r * d.rp; ++i) out[i] /= g.norm;
    return true;
}

// K := P C^(-1/2) P^T with C = P^T V P + (damping tr(P^T V P) / r + eps^2) I; P null: I. K := 0 where V tells nothing
INLINE void whitener(const Dense& d, const double* V, const double* P, double damping, double eps, Arena scratch,
                     double* K) {
    const size_t size = size_t(d.rp * d.rp);
    double* U = scratch.take<double>(size);
    double* E = scratch.take<double>(size);
    double* X = scratch.take<double>(size);
    double* Y = scratch.take<double>(size);
    double* M = scratch.take<double>(size);
    int64_t* order = scratch.take<int64_t>(size_t(d.r));
    for (size_t i = 0; i < size; ++i) K[i] = 0;
    if (P) {
        d.multiply(V, P, X);
        d.symmetric_tn(P, X, U);
    } else {
        for (int64_t i = 0; i < d.r * d.rp; ++i) U[i] = V[i];
        d.symmetrize(U);
    }
    double mean = 0;
    for (int64_t i = 0; i < d.r; ++i) mean += U[i * d.rp + i] / double(d.r);
    const double whole = mean + eps * eps;
    if (!(mean > 0 && whole < d.limit)) return;
    const double share = 1 / whole;
    for (int64_t i = 0; i < d.r * d.rp; ++i) U[i] *= share;
    for (int64_t i = 0; i < d.r; ++i) U[i * d.rp + i] += (damping * mean + eps * eps) / whole;
    if (d.cholesky(U, E)) {
        for (int64_t i = 0; i < d.r * d.rp; ++i) Y[i] = E[i];
        d.polar_factor(U, Y, true, M, order);
        d.symmetric_tn(U, E, Y);  // L^T = Q H gives C^(-1/2) = H^-1 = Q^T L^-1
    } else {  // second moments from elsewhere may not be positive: their mean has to do
        d.identity(Y);
    }
    if (P) {
        d.transpose(P, M);
        d.multiply(Y, M, X);
        d.symmetric_tn(M, X, K);
    } else {
        for (int64_t i = 0; i < d.r * d.rp; ++i) K[i] = Y[i];
    }
    const double by = 1 / root(whole);
    for (int64_t i = 0; i < d.r * d.rp; ++i) K[i] *= by;
    if (d.largest(K) < d.limit) return;
    for (int64_t i = 0; i < d.r * d.rp; ++i) K[i] = 0;
}

}  // namespace REFLORA_ISA
}  // namespace reflora
