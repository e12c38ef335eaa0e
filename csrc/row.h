// One table row: refactor, precondition, S alone, or an AdamW step.
#pragma once
#include "adamw.h"
#include "damped.h"

namespace reflora {
namespace REFLORA_ISA {

static_assert(sizeof(void*) == 8, "the table holds 64-bit pointers");

// where the S of a step comes from: warm-up, computed now, kept from an earlier step
enum Source { IDENTITY, FRESH, SAVED_S };


// S: storage, T: type that the matrix S is applied in; Grams and solve are in double
template <class S, class T>
struct RowOp {
    const int64_t* row;
    double* result;
    double* kept;  // 1 where the Grams of the factors follow, from KEPT_HEADER on, as Carry left them
    const Job& job;
    Arena arena;
    Dense d{row[R], padded<double>(row[R])};
    Factor<S> a = factor<S>(row, 0, P);
    Factor<S> b = factor<S>(row, SIDE, P);
    Factor<S> ga = factor<S>(row, 0, G);
    Factor<S> gb = factor<S>(row, SIDE, G);
    static constexpr double meet = sizeof(S) == 2 ? 0.5 : 0.999;  // as reference.meet
    const double tiny = sizeof(T) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
    const double huge = sizeof(T) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    int64_t rp = padded<T>(row[R]);
    T *in = nullptr, *out = nullptr, *mixer_a = nullptr, *mixer_b = nullptr;

    void run() {
        in = arena.take<T>(size_t(padded<float>(row[R]) * CHUNK));
        out = arena.take<T>(size_t(padded<float>(row[R]) * CHUNK));
        const bool has_grads = job.kind == PRECONDITION || job.kind == ADAMW;
        if (has_grads && job.check && !(all_finite(ga) && all_finite(gb))) return skip();
        if (job.kind == ADAMW) return adamw();
        if (job.kind == SOLVE) return solve_alone();
        return job.scalar ? apply_scalar() : apply_full();
    }

    void skip() { result[STATUS] = SKIPPED; }

    MEMBER bool plain() {  // a step was taken
        result[STATUS] = PLAIN;
        return true;
    }

    bool balance_scalar(double& s) {  // false: skip. s = 0 where it is of no use
        const double na = factor_norm(a);
        const double nb = factor_norm(b);
        result[NORM_A] = na;
        result[NORM_B] = nb;
        if (!(na <= Storage<double>::max && nb <= Storage<double>::max)) return false;
        s = nb / na;
        if (sizeof(S) == 2 && useful(s, tiny, huge))
            s = __builtin_exp2(2 * __builtin_rint(__builtin_log2(s) / 2));
        if (!useful(s, tiny, huge) || !balanced_fits()) s = 0;
        result[SCALE] = s != 0 ? s : 1;
        return true;
    }

    // whether balanced factors can be stored: their norms are at most sqrt(||A|| ||B||), or sqrt(2) times that
    bool balanced_fits() const {
        return __builtin_sqrt(result[NORM_A]) * __builtin_sqrt(result[NORM_B]) <= Storage<S>::max / 2;
    }

    void apply_scalar() {
        double s = 0;
        if (!balance_scalar(s)) return skip();
        result[STATUS] = s != 0 ? REFACTORED : DEGENERATE;
        if (s == 0) return;
        if (job.kind == PRECONDITION) {
            scale_in_place(ga, 1 / s);
            scale_in_place(gb, s);
        } else {
            scale_in_place(a, root(s));
            scale_in_place(b, 1 / root(s));
        }
    }

    // as reference.shrink_weight, none for the paper's S
    std::optional<double> shrink_weight() const {
        if (!job.start) return {};
        const double steps = *reinterpret_cast<const float*>(row[COUNT]);
        const double start = double(job.start);
        return steps * steps / (steps * steps + start * start);
    }

    double kappa_max(int64_t rank) const {
        const double of_rank = job.kappa_of_rank * __builtin_sqrt(double(rank));
        return of_rank < job.kappa_max ? of_rank : job.kappa_max;
    }

    // Grams and S; false: a factor is not finite
    bool solved(Solution& x, bool factors) {
        const size_t size = size_t(d.rp * d.rp);
        x.S = x.S_inv = x.P = x.P_inv_T = nullptr;
        double* first = arena.take<double>(size);
        double* second = arena.take<double>(size);
        (factors ? x.P : x.S) = first;
        (factors ? x.P_inv_T : x.S_inv) = second;
        for (size_t i = 0; i < size; ++i) first[i] = second[i] = 0;
        Arena scratch = arena;
        double* panel = scratch.take<double>(size_t(d.rp * CHUNK));
        Gram g[2];
        for (Gram& one : g) {
            one.unit = scratch.take<double>(size);
            one.U = scratch.take<double>(size);
            one.E = scratch.take<double>(size);
        }
        if (kept && *kept) {
            for (int side = 0; side < 2; ++side) carried_gram(d, sums(side), g[side]);
        } else {
            gram(d, a, panel, g[0]);
            gram(d, b, panel, g[1]);
        }
        result[NORM_A] = g[0].norm;
        result[NORM_B] = g[1].norm;
        if (!(g[0].norm <= Storage<double>::max && g[1].norm <= Storage<double>::max)) return false;
        if (job.reg > 0) {
            damped_inverses(d, job.reg, kappa_max(d.r), tiny, huge, g[0], g[1], x);
        } else {
            const int64_t rank = factor_grams(d, a.n, b.n, shrink_weight().value_or(1), g[0], g[1]);
            solve(d, g[0], g[1], kappa_max(rank), tiny, huge, !shrink_weight(), scratch, x);
        }
        result[KAPPA_A] = g[0].kappa;
        result[KAPPA_B] = g[1].kappa;
        result[STATUS] = x.status;
        result[SCALE] = x.c;
        result[BALANCE] = imbalance(d, g[0], g[1]);
        return true;
    }

    void apply_full() {
        Solution x;
        if (!solved(x, job.kind == REFACTOR) || (job.kind == REFACTOR && !balanced_fits())) return skip();
        if (job.kind == PRECONDITION) {
            round_S(x);
            apply_in_place<T, S>(ga, mixer_a, mixer_a, rp, in, out);
            apply_in_place<T, S>(gb, mixer_b, mixer_b, rp, in, out);
            return;
        }
        double* turned = arena.take<double>(size_t(d.rp * d.rp));
        double* cin = arena.take<double>(size_t(d.rp * CHUNK));
        double* cout = arena.take<double>(size_t(d.rp * CHUNK));
        d.transpose(x.P, turned);
        apply_in_place<double, S>(a, turned, x.P, d.rp, cin, cout);
        d.transpose(x.P_inv_T, turned);
        apply_in_place<double, S>(b, turned, x.P_inv_T, d.rp, cin, cout);
    }

    void solve_alone() {
        Solution x;
        const bool found = solved(x, false);
        if (found) {
            round_S(x);
        } else {
            skip();
        }
        store_saved(!found);
    }

    // S^-1 for A and S for B, rounded to the type they are applied in
    void round_S(const Solution& x) {
        mixer_a = arena.take<T>(size_t(rp * rp));
        mixer_b = arena.take<T>(size_t(rp * rp));
        for (int64_t i = 0; i < rp * rp; ++i) mixer_a[i] = mixer_b[i] = 0;
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) {
                mixer_a[i * rp + j] = T(x.S_inv[i * d.rp + j]);
                mixer_b[i * rp + j] = T(x.S[i * d.rp + j]);
            }
    }

    // where S comes from follows from the number of steps that this row has taken part in
    void adamw() {
        float* count = reinterpret_cast<float*>(row[COUNT]);
        const int64_t steps = int64_t(*count);
        const int64_t since = steps - job.warmup_steps;
        const bool next_is_fresh = since + 1 >= 0 && (since + 1) % job.interval == 0;
        const bool before = steps == 0 && job.warmup_steps == 0 && job.start == 0;
        const Source source = job.scalar || since < 0 ? IDENTITY : since % job.interval == 0 ? FRESH : SAVED_S;
        const bool refactors = job.scalar && (before || next_is_fresh || job.start);
        const bool done = refactors ? scalar_step(before, next_is_fresh) : step(source, next_is_fresh);
        if (!done) return skip();
        // S is entered from where both factors are there to make it
        const bool empty = result[NORM_A] == 0 || result[NORM_B] == 0;
        *count = job.start && !job.scalar && empty ? 1 : *count + 1;
    }

    bool step(Source source, bool next_is_fresh) {  // false: skip
        double move = 1;  // what A's moments are multiplied by; B's by its inverse
        // zeros: a layer that has had no S yet is due now
        if (source == FRESH || (source == SAVED_S && *reinterpret_cast<const T*>(row[SAVED]) == 0)) {
            Solution x;
            if (!solved(x, false)) return false;
            const bool identity = job.reg == 0 && x.status == DEGENERATE && x.scale == 1;
            if (!identity) round_S(x);
            if (job.interval > 1) store_saved(identity);
            move = change_phase(identity || job.start || job.reg > 0, x.c);
        } else {
            if (!(all_finite(a) && all_finite(b))) return false;
            if (source == SAVED_S) {
                load_saved();
                result[STATUS] = REFACTORED;
            } else {
                move = enter_identity();
            }
        }
        const double unscale = 1 / job.grad_scale;
        Carry carry{d, nullptr, nullptr};
        const bool carried = kept && next_is_fresh;  // only a fresh S reads them
        if (carried) carry.panel = arena.take<double>(size_t(d.rp * CHUNK));
        update(0, mixer_a, unscale, 1, move, carried ? &carry : nullptr);
        update(SIDE, mixer_b, unscale, 1, 1 / move, carried ? &carry : nullptr);
        if (kept) *kept = carried && carry.exact;
        return true;
    }

    // what A's moments are to be multiplied by; RefLoRA-S leaves a layer that it balances one
    double change_phase(bool identity, double c) {
        float* phase = reinterpret_cast<float*>(row[PHASE]);
        const bool was_identity = *phase != float(REFACTORED_UNITS);
        if (!(job.scalar && was_identity)) *phase = identity ? 0.0f : float(REFACTORED_UNITS);
        return was_identity == identity ? 1 : identity ? c : 1 / c;
    }

    // the same where S is I from here on; c is not rounded as sqrt(s) is for 16-bit factors
    double enter_identity() {
        double s = 0;
        if (*reinterpret_cast<float*>(row[PHASE]) == float(REFACTORED_UNITS)) balance_scalar(s);
        return change_phase(true, s != 0 ? result[NORM_B] / result[NORM_A] : 1);
    }

    void store_saved(bool identity) {
        T* saved = reinterpret_cast<T*>(row[SAVED]);
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) {
                saved[i * d.r + j] = identity ? T(i == j) : mixer_b[i * rp + j];
                saved[(d.r + i) * d.r + j] = identity ? T(i == j) : mixer_a[i * rp + j];
            }
    }

    void load_saved() {
        const T* saved = reinterpret_cast<const T*>(row[SAVED]);
        mixer_a = arena.take<T>(size_t(rp * rp));
        mixer_b = arena.take<T>(size_t(rp * rp));
        for (int64_t i = 0; i < rp * rp; ++i) mixer_a[i] = mixer_b[i] = 0;
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) {
                mixer_b[i * rp + j] = saved[i * d.r + j];
                mixer_a[i * rp + j] = saved[(d.r + i) * d.r + j];
            }
    }

    double* sums(int side) { return kept_sums(d, kept, side); }

    const double* hypers(int side) { return job.hypers + row[side + HYPER] * HYPERS; }

    // one side's step; mixer null: I
    void update(int side, const T* mixer, double g_factor, double p_factor, double m_factor, Carry* carry) {
        float* steps = reinterpret_cast<float*>(row[side + STEP]);
        const float taken = *steps;
        *steps = taken + 1;
        const Update<T> u = make_update<T>(hypers(side), *steps, g_factor, p_factor, m_factor);
        if (carry) {
            carry->sums = sums(side);
            for (int64_t i = 0; i < d.rp * d.rp; ++i) carry->sums[i] = 0;
        }
        with_weights<S>(row, side, job, int64_t(taken), [&](auto moment, const auto& weights) {
            using Q = decltype(moment);
            if (carry) {
                update_side<true, Q, T, S>(row, side, mixer, mixer, rp, u, weights, carry, in, out);
            } else {
                update_side<false, Q, T, S>(row, side, mixer, mixer, rp, u, weights, carry, in, out);
            }
        });
    }

    bool scalar_step(bool before, bool after) {  // false: skip
        double s = 1;
        if (!balance_scalar(s)) return false;
        result[STATUS] = s != 0 ? REFACTORED : DEGENERATE;
        const double root_s = before && s != 0 ? root(s) : 1;
        const double unscale = 1 / job.grad_scale;
        const double move = enter_identity();
        const double old_a = result[NORM_A];
        const double old_b = result[NORM_B];
        update(0, nullptr, unscale / root_s, root_s, move / root_s, nullptr);
        update(SIDE, nullptr, unscale * root_s, 1 / root_s, root_s / move, nullptr);
        if (!(after || job.start)) return true;
        const double old_s = result[SCALE];
        const bool finite = balance_scalar(s);
        const bool balances = !job.start || (finite && met(old_a, old_b) && after);
        // what is reported is of the factors that the step has found
        result[SCALE] = old_s;
        result[NORM_A] = old_a;
        result[NORM_B] = old_b;
        if (!finite) return true;
        if (!balances) return plain();
        if (s == 0) return true;
        scale_side(0, root(s));
        scale_side(SIDE, 1 / root(s));
        return true;
    }

    // whether RefLoRA-S balances this row: from the step on in which its norms, old and new, have met
    bool met(double old_a, double old_b) const {
        const double new_a = result[NORM_A];
        const double new_b = result[NORM_B];
        const bool equal = old_a < old_b ? old_a >= meet * old_b : old_b >= meet * old_a;
        float* phase = reinterpret_cast<float*>(row[PHASE]);
        if (equal || (old_b <= old_a && new_b >= new_a) || (old_b >= old_a && new_b <= new_a)) *phase = float(BALANCED);
        return *phase == float(BALANCED);
    }

    void scale_side(int side, double turn) {
        const Factor<S>& f = side ? b : a;
        if (row[side + W]) {
            scale_master(f, reinterpret_cast<float*>(row[side + W]), turn);
        } else {
            scale_in_place(f, turn);
        }
        if (row[STATE] == F32) {
            scale_moments<float>(side, turn);
        } else {
            scale_moments<S>(side, turn);
        }
    }

    template <class Q>
    void scale_moments(int side, double turn) {
        Factor<Q> f = factor<Q>(row, side, P);
        const bool amsgrad = hypers(side)[AMSGRAD] != 0;
        for (int column = M; column <= (amsgrad ? X : V); ++column) {
            f.p = reinterpret_cast<Q*>(row[side + column]);
            scale_in_place(f, column == M ? 1 / turn : 1 / (turn * turn));
        }
    }
};

}  // namespace REFLORA_ISA
}  // namespace reflora
