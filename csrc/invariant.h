// One table row of InvariantAdamW: Grams of factors and gradients, three geometric means, one update of each side.
#pragma once
#include "momentum.h"
#include "whiten.h"

namespace reflora {
namespace REFLORA_ISA {

// S: storage, T: type of the update; Grams and solve are in double
template <class S, class T>
struct InvariantOp {
    const int64_t* row;
    double* result;
    double* kept;  // as RowOp's
    const Job& job;
    Arena arena;
    Dense d{row[R], padded<double>(row[R])};
    Factor<S> p[2] = {factor<S>(row, 0, P), factor<S>(row, SIDE, P)};
    Factor<S> g[2] = {factor<S>(row, 0, G), factor<S>(row, SIDE, G)};
    double* second[2] = {};  // what whitens, without bias, later sums over gradients: rp apart
    bool before[2] = {};     // whether the second moments of the step before whiten
    bool sound[2] = {};      // whether the gradient is finite
    Momentum<T> averaging[2] = {};
    double* panel = nullptr;
    T* mixer[2] = {};
    T *in = nullptr, *out = nullptr;
    const double tiny = sizeof(T) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
    const double huge = sizeof(T) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;

    // false: skip
    bool run() {
        const size_t size = size_t(d.rp * d.rp);
        in = arena.take<T>(size_t(padded<float>(d.r) * CHUNK));
        out = arena.take<T>(size_t(padded<float>(d.r) * CHUNK));
        for (int side = 0; side < 2; ++side) {
            second[side] = arena.take<double>(size);
            for (size_t i = 0; i < size; ++i) second[side][i] = 0;
            mixer[side] = arena.take<T>(size_t(padded<T>(d.r) * padded<T>(d.r)));
        }
        for (int side = 0; side < 2; ++side) {
            averaging[side] = make_momentum<T>(hypers(side), double(*steps(side)) + 1, 1 / job.grad_scale);
            before[side] = job.late && known(side);
            sound[side] = before[side] ? !job.momentum || all_finite(g[side]) : sum_gradients(side);
            if (!sound[side] && !job.late) return false;
        }
        Frames found;
        if (!frames(found)) return false;
        double* K = arena.take<double>(size);
        for (int side = 0; side < 2; ++side) {
            const double* h = hypers(side);
            whiten_by(side);
            whitener(d, second[side], side ? found.of_B : found.of_A, job.damping, h[EPS], arena, K);
            round_mixer(side, K);
        }
        panel = arena.take<double>(size_t(d.rp * CHUNK));
        bool exact = true;
        for (int side = 0; side < 2; ++side) exact = update(side) && exact;
        if (kept) *kept = exact;
        result[STATUS] = sound[0] && sound[1] ? found.status : SKIPPED;
        return true;
    }

    const double* hypers(int side) const { return job.hypers + row[side ? SIDE + HYPER : HYPER] * HYPERS; }
    float* steps(int side) const { return reinterpret_cast<float*>(row[side ? SIDE + STEP : STEP]); }

    template <class Q>
    Factor<Q> first(int side) const {
        return {reinterpret_cast<Q*>(row[(side ? SIDE : 0) + M]), p[side].sr, p[side].sn, p[side].r, p[side].n};
    }

    template <class Use>
    void with_state(Use use) const {
        if (sizeof(S) == 2 && row[STATE] == F32) return use(float{});
        use(S{});
    }

    // second[side] := X X^T / n of the gradient, or of its mean; false: the gradient is not finite
    bool sum_gradients(int side) {
        const bool sums_show = sizeof(S) < 8 && !job.momentum;  // squares of narrow numbers stay in double's range
        if (!sums_show && !all_finite(g[side])) return false;
        Arena scratch = arena;
        panel = scratch.take<double>(size_t(d.rp * CHUNK));
        double* sum = second[side];
        for (int64_t k = 0; k < g[side].n; k += CHUNK) {
            const int64_t count = least(CHUNK, g[side].n - k);
            job.momentum ? pack_mean(side, k, count) : pack_gradient(side, k, count, panel);
            d.gram_add(panel, count, sum);
        }
        return finish_sum(side);
    }

    // from sums of products in second[side] to the Gram over n; false: not finite
    bool finish_sum(int side) {
        double* sum = second[side];
        d.mirror(sum);
        double trace = 0;
        for (int64_t i = 0; i < d.r; ++i) trace += sum[i * d.rp + i];
        if (!(trace < d.limit)) return false;
        const double unscale = job.momentum ? 1 : 1 / job.grad_scale;
        const double by = unscale / double(g[side].n) * unscale;
        for (int64_t i = 0; i < d.r * d.rp; ++i) sum[i] *= by;
        return true;
    }

    double* state(int side) const { return reinterpret_cast<double*>(row[(side ? SIDE : 0) + Column::V]); }
    double bias(double beta, double count) const { return 1 - __builtin_pow(beta, count); }

    // whether the state's second moments tell something
    bool known(int side) const {
        double trace = 0;
        for (int64_t i = 0; i < d.r; ++i) trace += bounded(state(side)[i * d.r + i], Storage<double>::max);
        return trace > 0;
    }

    void pack_gradient(int side, int64_t k, int64_t count, double* into) {
        pack(g[side], k, count, d.rp, 1, into);
        for (int64_t i = 0; sizeof(S) == 8 && i < count * d.rp; ++i)
            if (magnitude(into[i]) <= Storage<double>::max) into[i] = bounded(into[i], double(MOST<T>));
    }

    void pack_mean(int side, int64_t k, int64_t count) {
        const bool right = p[side].transposed();
        with_state([&](auto like) {
            average_block(averaging[side], g[side], first<decltype(like)>(side), right, k, count, in);
        });
        spread_mean(right, count);
    }

    // a block of the mean gradient in `in` to the panel
    void spread_mean(bool right, int64_t count) {
        for (int64_t j = 0; j < count; ++j)
            for (int64_t i = 0; i < d.rp; ++i)
                panel[j * d.rp + i] = i >= d.r ? 0 : double(right ? in[j * d.r + i] : in[i * CHUNK + j]);
    }

    // of the step's metric, and what is reported of the factors; false: one is not finite
    bool frames(Frames& found) {
        const size_t size = size_t(d.rp * d.rp);
        found = {nullptr, nullptr, REFACTORED};
        const bool identity = job.metric == IDENTITY_METRIC;
        if (identity) {
            for (int side = 0; side < 2; ++side) result[side ? NORM_B : NORM_A] = factor_norm(p[side]);
            return finite_norms();
        }
        found.of_A = arena.take<double>(size);
        found.of_B = arena.take<double>(size);
        for (size_t i = 0; i < size; ++i) found.of_A[i] = found.of_B[i] = 0;
        Arena scratch = arena;
        double* own_panel = scratch.take<double>(size_t(d.rp * CHUNK));
        Gram gram_of[2];
        for (int side = 0; side < 2; ++side) {
            Gram& one = gram_of[side];
            one.unit = scratch.take<double>(size);
            one.U = scratch.take<double>(size);
            one.E = scratch.take<double>(size);
            if (kept && *kept) {
                carried_gram(d, kept_sums(d, kept, side), one);
            } else {
                gram(d, p[side], own_panel, one);
            }
            result[side ? NORM_B : NORM_A] = one.norm;
        }
        if (!finite_norms()) return false;
        result[BALANCE] = imbalance(d, gram_of[0], gram_of[1]);
        found.status = balanced(gram_of, scratch, found) ? found.status : scaled(gram_of, found);
        result[KAPPA_A] = gram_of[0].kappa;
        result[KAPPA_B] = gram_of[1].kappa;
        return true;
    }

    bool finite_norms() {
        const double a = result[NORM_A];
        const double b = result[NORM_B];
        const double c = b / a;
        result[SCALE] = useful(c, tiny, huge) ? c : 1;
        return a <= Storage<double>::max && b <= Storage<double>::max;
    }

    // P = P_B and P^-T = P_A of S; false: another metric, or a factor is 0
    bool balanced(Gram* gram_of, Arena scratch, Frames& found) {
        if (job.metric != REFLORA_METRIC || !gram_of[0].usable || !gram_of[1].usable) return false;
        const int64_t rank = factor_grams(d, p[0].n, p[1].n, 1, gram_of[0], gram_of[1]);
        const double of_rank = job.kappa_of_rank * root(double(rank));
        Solution x{DEGENERATE, 1, 1, nullptr, nullptr, found.of_B, found.of_A};
        solve(d, gram_of[0], gram_of[1], of_rank < job.kappa_max ? of_rank : job.kappa_max, tiny, huge, true, scratch, x);
        found.status = x.status;
        return true;
    }

    int scaled(Gram* gram_of, Frames& found) {
        const bool a = inverse_root(d, gram_of[0], p[0].n, job.kappa_max, job.kappa_of_rank, found.of_B);
        const bool b = inverse_root(d, gram_of[1], p[1].n, job.kappa_max, job.kappa_of_rank, found.of_A);
        return a && b ? REFACTORED : DEGENERATE;
    }

    // second[side] := what whitens, without bias
    void whiten_by(int side) {
        if (!before[side]) {
            if (sound[side]) return average_second(side);
            for (int64_t i = 0; i < d.r * d.rp; ++i) second[side][i] = 0;
            return;
        }
        const double by = job.momentum ? 1 : 1 / bias(hypers(side)[BETA2], double(*steps(side)));
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j)
                second[side][i * d.rp + j] = by * bounded(state(side)[i * d.r + j], Storage<double>::max);
    }

    // the state's second moments take part, and second[side], the Gram of this step, becomes theirs without bias
    void average_second(int side) {
        const double* h = hypers(side);
        const double count = double(*steps(side)) + 1;
        const double square = bias(h[BETA1], count) * bias(h[BETA1], count);
        const double by = 1 / bias(h[BETA2], count);
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) {
                double& now = second[side][i * d.rp + j];
                double& own = state(side)[i * d.r + j];
                if (job.momentum) {
                    own = now = now / square;
                } else {
                    const double old = bounded(own, Storage<double>::max);
                    own = h[BETA2] * old + (1 - h[BETA2]) * now;
                    now = own * by;
                }
            }
    }

    // the state's second moments, in which this step takes no part, stay as they are without bias
    void hold_second(int side) {
        const double beta = hypers(side)[BETA2];
        const double count = double(*steps(side)) + 1;
        const double by = job.momentum || count < 2 ? 1 : bias(beta, count) / bias(beta, count - 1);
        for (int64_t i = 0; i < d.r * d.r; ++i) state(side)[i] = by * bounded(state(side)[i], Storage<double>::max);
    }

    void round_mixer(int side, const double* K) {
        const int64_t rp = padded<T>(d.r);
        for (int64_t i = 0; i < rp * rp; ++i) mixer[side][i] = 0;
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) mixer[side][i * rp + j] = T(bounded(K[i * d.rp + j], double(huge)));
    }

    // false: the Gram of the factor cannot be carried
    bool update(int side) {
        const float taken = *steps(side);
        Carry carry{d, panel, kept ? kept_sums(d, kept, side) : nullptr};
        for (int64_t i = 0; kept && i < d.rp * d.rp; ++i) carry.sums[i] = 0;
        for (int64_t i = 0; before[side] && i < d.rp * d.rp; ++i) second[side][i] = 0;
        const bool right = p[side].transposed();
        with_weights<S>(row, side ? SIDE : 0, job, int64_t(taken), [&](auto like, const auto& weights) {
            const auto done = [&](int64_t k, int64_t count) {
                if (kept) carry.add(p[side], k, count);
                if (!before[side]) return;
                job.momentum ? spread_mean(right, count) : pack_gradient(side, k, count, panel);
                d.gram_add(panel, count, second[side]);
            };
            const auto of = first<decltype(like)>(side);
            move_side(p[side], g[side], of, mixer[side], padded<T>(d.r), averaging[side], weights, in, out, done);
        });
        if (before[side]) {
            sound[side] = finish_sum(side) && sound[side];
            sound[side] ? average_second(side) : hold_second(side);
        }
        *steps(side) = taken + 1;
        return carry.exact;
    }
};

}  // namespace REFLORA_ISA
}  // namespace reflora
