// What crosses from reflora/backends/cpp_backend.py; the table's columns are made from reflora/columns.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "columns.h"

namespace reflora {

// reflora/constants.py's STORAGE_DTYPES
enum DType { F32, F64, BF16, F16 };
enum Kind { REFACTOR, PRECONDITION, SOLVE, ADAMW, INVARIANT };
// reflora/constants.py's METRICS
enum Metric { REFLORA_METRIC, SCALED_METRIC, IDENTITY_METRIC };
enum Function { POLAR, GEOMETRIC_MEAN, SQRTM, INVSQRTM, SVD, INV_ROOT };

struct Job {
    Kind kind;
    bool scalar;
    double kappa_max, kappa_of_rank;  // a factor is degenerate past either, the second times sqrt(r)
    // steps after which a Gram counts half in S, which then comes without its scale c; 0: the paper's S. With `scalar`
    // and a start, an AdamW step balances a row from the step on in which its norms cross
    int64_t start;
    // ADAMW only
    int64_t warmup_steps, interval;
    double reg;  // 0, or what (A A^T + reg I)^-1 and (B^T B + reg I)^-1, in place of S and S^-1, are damped by
    // INVARIANT only; momentum: second moments are those of the mean gradient; late: those of the step before whiten
    Metric metric;
    bool momentum, late;
    double damping;
    // both
    const double* hypers;
    double grad_scale;
    bool check, found_inf, stochastic;
    uint64_t seed;
    double* kept;  // Grams of the factors as the last step left them, kept_doubles(r) a row; null: not carried
};

// a function of `count` matrices x (and y) [count, n, n]; out: matrices, but S [count, n] second of SVD.
// INV_ROOT: (X + shift I)^(-1/root), X known to 4 sqrt(n) units of its largest eigenvalue
struct MatrixGroup {
    Function f;
    const double *x, *y;
    double* out[3];
    int64_t count, n;
    double root, shift, unit;
};

// every instruction set has its own copy of these, chosen once by dispatch.cpp
struct Kernels {
    // one table row; kept: its own part of job.kept; work holds work_bytes(r) bytes, 64-byte aligned
    void (*row)(const int64_t* row, double* result, double* kept, const Job& job, void* work);
    size_t (*work_bytes)(int64_t r);
    int64_t (*kept_doubles)(int64_t r);
    // work holds matrices_bytes
    void (*matrices)(const MatrixGroup& job, void* work);
    size_t (*matrices_bytes)(int64_t count, int64_t n);
    // eigenvalues w [count, n] and, where V is not null, eigenvectors of x [count, n, n], all of `type`, F32 or F64;
    // count at most eigh_count, work holds eigh_bytes
    void (*eigh)(DType type, const void* x, void* w, void* V, int64_t count, int64_t n, void* work);
    int64_t (*eigh_count)(DType type);
    size_t (*eigh_bytes)(DType type, int64_t n);
};

}  // namespace reflora
