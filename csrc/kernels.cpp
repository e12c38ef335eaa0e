// One table row (or one small matrix), for one instruction set: compiled once each with REFLORA_ISA naming it.
#include "adamw.h"

namespace reflora {
namespace REFLORA_ISA {

static_assert(sizeof(void*) == 8, "the table holds 64-bit pointers");

// S: storage, T: type that the matrix S is applied in; Grams and solve are in double
template <class S, class T>
struct RowOp {
    const int64_t* row;
    double* result;
    const Job& job;
    Arena arena;
    Dense d{row[R], padded<double>(row[R])};
    Factor<S> a = factor<S>(row, 0, P), b = factor<S>(row, SIDE, P);
    Factor<S> ga = factor<S>(row, 0, G), gb = factor<S>(row, SIDE, G);
    const double tiny = sizeof(T) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
    const double top = sizeof(T) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    int64_t rp = padded<T>(row[R]);
    T *in = nullptr, *out = nullptr, *left = nullptr, *right = nullptr;

    void run() {
        for (int i = 0; i < RESULTS; ++i) result[i] = __builtin_nan("");
        result[STATUS] = PLAIN;
        if (!row[ACTIVE]) return;
        in = arena.take<T>(size_t(padded<float>(row[R]) * CHUNK));
        out = arena.take<T>(size_t(padded<float>(row[R]) * CHUNK));
        if (job.kind != REFACTOR && !(all_finite(ga) && all_finite(gb))) return skip();
        if (job.kind == ADAMW) return job.scalar ? adamw_scalar() : adamw();
        return job.scalar ? apply_scalar() : apply_full();
    }

    void skip() { result[STATUS] = SKIPPED; }

    bool scalar_norms(double& s) {  // false: skip. s = 0 where it is of no use
        const double na = factor_norm(a), nb = factor_norm(b);
        result[NORM_A] = na, result[NORM_B] = nb;
        if (!(na <= Storage<double>::max && nb <= Storage<double>::max)) return false;
        s = nb / na;
        if (sizeof(S) == 2 && usable_scale(s, tiny, top)) s = __builtin_exp2(2 * __builtin_rint(__builtin_log2(s) / 2));
        if (!usable_scale(s, tiny, top)) s = 0;
        result[SCALE] = s != 0 ? s : 1;
        return true;
    }

    void apply_scalar() {
        double s = 0;
        if (!scalar_norms(s)) return skip();
        result[STATUS] = s != 0 ? REFACTORED : DEGENERATE;
        if (s == 0) return;
        if (job.kind == PRECONDITION) scale_in_place(ga, 1 / s), scale_in_place(gb, s);
        else scale_in_place(a, root(s)), scale_in_place(b, 1 / root(s));
    }

    // Grams and S; false: a factor is not finite
    bool solved(Solution& x, bool factors) {
        const size_t size = size_t(d.rp * d.rp);
        x.S = x.S_inv = x.P = x.P_inv_T = nullptr;
        double* first = arena.take<double>(size), *second = arena.take<double>(size);
        (factors ? x.P : x.S) = first, (factors ? x.P_inv_T : x.S_inv) = second;
        for (size_t i = 0; i < size; ++i) first[i] = second[i] = 0;
        Arena scratch = arena;
        double* panel = scratch.take<double>(size_t(d.rp * CHUNK));
        Gram g[2];
        for (Gram& one : g) one.unit = scratch.take<double>(size), one.U = scratch.take<double>(size), one.E = scratch.take<double>(size);
        gram(d, a, panel, g[0]);
        gram(d, b, panel, g[1]);
        result[NORM_A] = g[0].norm, result[NORM_B] = g[1].norm;
        if (!(g[0].norm <= Storage<double>::max && g[1].norm <= Storage<double>::max)) return false;
        result[KAPPA_A] = g[0].kappa, result[KAPPA_B] = g[1].kappa;
        solve(d, g[0], g[1], job.kappa_max, tiny, top, scratch, x);
        result[STATUS] = x.status, result[SCALE] = x.c, result[BALANCE] = balance(d, g[0], g[1]);
        return true;
    }

    void apply_full() {
        Solution x;
        if (!solved(x, job.kind == REFACTOR)) return skip();
        if (job.kind == PRECONDITION) {
            round_S(x);
            apply_in_place<T, S>(ga, left, left, rp, in, out);
            apply_in_place<T, S>(gb, right, right, rp, in, out);
            return;
        }
        double* turned = arena.take<double>(size_t(d.rp * d.rp));
        double *cin = arena.take<double>(size_t(d.rp * CHUNK)), *cout = arena.take<double>(size_t(d.rp * CHUNK));
        d.transpose(x.P, turned);
        apply_in_place<double, S>(a, turned, x.P, d.rp, cin, cout);
        d.transpose(x.P_inv_T, turned);
        apply_in_place<double, S>(b, turned, x.P_inv_T, d.rp, cin, cout);
    }

    // S^-1 for A and S for B, rounded to the type they are applied in
    void round_S(const Solution& x) {
        left = arena.take<T>(size_t(rp * rp)), right = arena.take<T>(size_t(rp * rp));
        for (int64_t i = 0; i < rp * rp; ++i) left[i] = right[i] = 0;
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j)
                left[i * rp + j] = T(x.S_inv[i * d.rp + j]), right[i * rp + j] = T(x.S[i * d.rp + j]);
    }

    void adamw() {
        double move = 1;  // what A's moments are multiplied by; B's by its inverse
        float* phase = reinterpret_cast<float*>(row[PHASE]);
        // zeros: this layer has had no S yet, so it is due now
        const bool due = job.source == FRESH || (job.source == SAVED_S && *reinterpret_cast<const T*>(row[SAVED]) == 0);
        if (due) {
            Solution x;
            if (!solved(x, false)) return skip();
            const bool identity = x.status == DEGENERATE && x.c == 1;
            if (!identity) round_S(x);
            if (job.keep) keep(identity);
            move = change_phase(phase, identity, x.c);
        } else {
            if (!(all_finite(a) && all_finite(b))) return skip();
            if (job.source == SAVED_S) recall(), result[STATUS] = REFACTORED;
            else if (*phase != 0) {
                double s = 0;
                scalar_norms(s);
                move = change_phase(phase, true, s != 0 ? s : 1);
            }
        }
        const double scale = 1 / job.grad_scale;
        update_side<T, S>(row, 0, left, left, rp, next_update(0, scale, 1, move), in, out);
        update_side<T, S>(row, SIDE, right, right, rp, next_update(SIDE, scale, 1, 1 / move), in, out);
    }

    double change_phase(float* phase, bool identity, double c) {
        const bool was_identity = *phase == 0;
        *phase = identity ? 0.0f : 1.0f;
        return was_identity == identity ? 1 : identity ? c : 1 / c;
    }

    void keep(bool identity) {
        T* saved = reinterpret_cast<T*>(row[SAVED]);
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) {
                saved[i * d.r + j] = identity ? T(i == j) : right[i * rp + j];
                saved[(d.r + i) * d.r + j] = identity ? T(i == j) : left[i * rp + j];
            }
    }

    void recall() {
        const T* saved = reinterpret_cast<const T*>(row[SAVED]);
        left = arena.take<T>(size_t(rp * rp)), right = arena.take<T>(size_t(rp * rp));
        for (int64_t i = 0; i < rp * rp; ++i) left[i] = right[i] = 0;
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j)
                right[i * rp + j] = saved[i * d.r + j], left[i * rp + j] = saved[(d.r + i) * d.r + j];
    }

    Update<T> next_update(int side, double grad, double param, double move) {
        float* step = reinterpret_cast<float*>(row[side + STEP]);
        *step += 1;
        return make_update<T>(job.hypers + row[side + HYPER] * HYPERS, *step, grad, param, move);
    }

    void adamw_scalar() {
        double s = 1;
        if (!scalar_norms(s)) return skip();
        result[STATUS] = s != 0 ? REFACTORED : DEGENERATE;
        const double by = job.scalar_before && s != 0 ? root(s) : 1, scale = 1 / job.grad_scale;
        update_side<T, S>(row, 0, nullptr, nullptr, rp, next_update(0, scale / by, by, 1 / by), in, out);
        update_side<T, S>(row, SIDE, nullptr, nullptr, rp, next_update(SIDE, scale * by, 1 / by, by), in, out);
        if (!job.scalar_after || !scalar_norms(s) || s == 0) return;
        scale_side(0, root(s));
        scale_side(SIDE, 1 / root(s));
    }

    void scale_side(int side, double by) {
        Factor<S> f = factor<S>(row, side, P);
        scale_in_place(f, by);
        const bool amsgrad = (job.hypers + row[side + HYPER] * HYPERS)[AMSGRAD] != 0;
        for (int column = M; column <= (amsgrad ? X : V); ++column) {
            f.p = reinterpret_cast<S*>(row[side + column]);
            scale_in_place(f, column == M ? 1 / by : 1 / (by * by));
        }
    }
};

template <class S, class T>
static void run_row(const int64_t* row, double* result, const Job& job, void* work) {
    Arena arena{static_cast<char*>(work)};
    RowOp<S, T>{row, result, job, arena}.run();
}

static void row(const int64_t* row, double* result, const Job& job, void* work) {
    switch (row[DTYPE]) {
        case F32: return run_row<float, float>(row, result, job, work);
        case F64: return run_row<double, double>(row, result, job, work);
        case BF16: return run_row<bf16, float>(row, result, job, work);
        case F16: return run_row<f16, float>(row, result, job, work);
    }
}

static size_t work_bytes(int64_t r) { return bytes_for(r); }

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
const Kernels kernels = {row, work_bytes, matrix};

}  // namespace REFLORA_ISA
}  // namespace reflora
