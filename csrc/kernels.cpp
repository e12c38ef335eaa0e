// One table row (or one small matrix), for one instruction set: compiled once each with REFLORA_ISA naming it.
#include "row.h"

namespace reflora {
namespace REFLORA_ISA {

template <class S, class T>
static void run_row(const int64_t* row, double* result, double* kept, const Job& job, void* work) {
    Arena arena{static_cast<char*>(work)};
    RowOp<S, T>{row, result, kept, job, arena}.run();
}

static void row(const int64_t* row, double* result, double* kept, const Job& job, void* work) {
    switch (row[DTYPE]) {
        case F32: return run_row<float, float>(row, result, kept, job, work);
        case F64: return run_row<double, double>(row, result, kept, job, work);
        case BF16: return run_row<bf16, float>(row, result, kept, job, work);
        case F16: return run_row<f16, float>(row, result, kept, job, work);
    }
}

static size_t work_bytes(int64_t r) { return bytes_for(r); }

static int64_t kept_doubles(int64_t r) { return KEPT_HEADER + 2 * padded<double>(r) * padded<double>(r); }

// dense in, padded out, and back
static void spread(const Dense& d, const double* in, double* out) {
    for (int64_t i = 0; i < d.r; ++i)
        for (int64_t j = 0; j < d.rp; ++j) out[i * d.rp + j] = j < d.r ? in[i * d.r + j] : 0;
}

static void gather(const Dense& d, const double* in, double* out) {
    for (int64_t i = 0; i < d.r; ++i)
        for (int64_t j = 0; j < d.r; ++j) out[i * d.r + j] = in[i * d.rp + j];
}

static bool factorize(const Dense& d, const double* x, double* U, double* E) {
    spread(d, x, U);
    d.symmetrize(U);
    return d.cholesky(U, E);
}

static void matrix(Function f, const double* x, const double* y, double* result, double* result2, int64_t n, void* work) {
    const Dense d{n, padded<double>(n)};
    Arena arena{static_cast<char*>(work)};
    const size_t size = size_t(d.rp * d.rp);
    double* m[9];
    for (double*& one : m) one = arena.take<double>(size);
    int64_t* order = arena.take<int64_t>(size_t(n));
    double *Ux = m[0], *Ex = m[1], *Uy = m[2], *Ey = m[3], *Q = m[4], *Y = m[5], *M = m[6], *s = m[7], *t = m[8];
    if (f == POLAR) {
        spread(d, x, Q), spread(d, x, s);
        if (d.largest(Q) == 0) d.identity(Q);
        else d.polar(Q, Y, false, M, order);
        d.transpose(Q, t), d.matmul(t, s, M), d.symmetrize(M);
        return gather(d, Q, result), gather(d, M, result2);
    }
    bool ok;
    if (f == GEOMETRIC_MEAN) ok = factorize(d, x, Ux, Ex) & factorize(d, y, Uy, Ey);
    else ok = factorize(d, x, Uy, Ey), d.identity(Ux), d.identity(Ex);
    if (!ok) {
        for (int64_t i = 0; i < n * n; ++i) result[i] = __builtin_nan("");
        return;
    }
    d.transpose(Ex, t), d.matmul(Uy, t, Q);  // Ly^T Lx^-T = Q H
    d.transpose(Ux, t), d.matmul(Ey, t, Y);  // its inverse transposed, Ly^-1 Lx
    d.polar(Q, Y, true, M, order);
    if (f == INVSQRTM) d.transpose(Ey, t), d.matmul(t, Q, s);  // Ly^-T Q
    else d.transpose(Ux, t), d.transpose(Q, Y), d.matmul(t, Y, M), d.matmul(M, Uy, s);  // Lx Q^T Ly^T
    d.symmetrize(s);
    gather(d, s, result);
}

extern const Kernels kernels;
const Kernels kernels = {row, work_bytes, kept_doubles, matrix};

}  // namespace REFLORA_ISA
}  // namespace reflora
