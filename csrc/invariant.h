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
    const Job& job;
    Arena arena;
    Dense d{row[R], padded<double>(row[R])};
    Factor<S> p[2] = {factor<S>(row, 0, P), factor<S>(row, SIDE, P)};
    Factor<S> g[2] = {factor<S>(row, 0, G), factor<S>(row, SIDE, G)};
    double* second[2] = {};  // of this step, without bias: rp apart
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
            mixer[side] = arena.take<T>(size_t(padded<T>(d.r) * padded<T>(d.r)));
        }
        for (int side = 0; side < 2; ++side)
            if (!sum_gradients(side)) return false;
        Frames found;
        if (!frames(found)) return false;
        double* K = arena.take<double>(size);
        for (int side = 0; side < 2; ++side) {
            const double* h = hypers(side);
            average_second(side);
            whitener(d, second[side], side ? found.of_B : found.of_A, job.damping, h[EPS], arena, K);
            round_mixer(side, K);
        }
        for (int side = 0; side < 2; ++side) update(side);
        result[STATUS] = found.status;
        return true;
    }

    const double* hypers(int side) const { return job.hypers + row[side ? SIDE + HYPER : HYPER] * HYPERS; }
    float* steps(int side) const { return reinterpret_cast<float*>(row[side ? SIDE + STEP : STEP]); }

    Momentum<T> momentum(int side) const {
        return make_momentum<T>(hypers(side), double(*steps(side)) + 1, 1 / job.grad_scale);
    }

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
        double* panel = scratch.take<double>(size_t(d.rp * CHUNK));
        double* sum = second[side];
        for (int64_t i = 0; i < d.rp * d.rp; ++i) sum[i] = 0;
        for (int64_t k = 0; k < g[side].n; k += CHUNK) {
            const int64_t count = least(CHUNK, g[side].n - k);
            if (job.momentum) {
                pack_mean(side, k, count, panel);
            } else {
                pack(g[side], k, count, d.rp, 1, panel);
                for (int64_t i = 0; sizeof(S) == 8 && i < count * d.rp; ++i) panel[i] = bounded(panel[i], double(MOST<T>));
            }
            d.gram_add(panel, count, sum);
        }
        d.mirror(sum);
        double trace = 0;
        for (int64_t i = 0; i < d.r; ++i) trace += sum[i * d.rp + i];
        if (!(trace < d.limit)) return false;
        const double unscale = job.momentum ? 1 : 1 / job.grad_scale;
        const double by = unscale / double(g[side].n) * unscale;
        for (int64_t i = 0; i < d.r * d.rp; ++i) sum[i] *= by;
        return true;
    }

    void pack_mean(int side, int64_t k, int64_t count, double* panel) {
        const bool right = p[side].transposed();
        with_state([&](auto like) {
            average_block(momentum(side), g[side], first<decltype(like)>(side), right, k, count, in);
        });
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
        double* panel = scratch.take<double>(size_t(d.rp * CHUNK));
        Gram gram_of[2];
        for (int side = 0; side < 2; ++side) {
            Gram& one = gram_of[side];
            one.unit = scratch.take<double>(size);
            one.U = scratch.take<double>(size);
            one.E = scratch.take<double>(size);
            gram(d, p[side], panel, one);
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

    // the state's second moments take part, and second[side] becomes theirs without bias
    void average_second(int side) {
        const double* h = hypers(side);
        double* V = reinterpret_cast<double*>(row[(side ? SIDE : 0) + Column::V]);
        const double count = double(*steps(side)) + 1;
        const double bias1 = 1 - __builtin_pow(h[BETA1], count);
        const double bias2 = 1 - __builtin_pow(h[BETA2], count);
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) {
                double& now = second[side][i * d.rp + j];
                double& kept = V[i * d.r + j];
                if (job.momentum) {
                    kept = now = now / (bias1 * bias1);
                } else {
                    const double old = bounded(kept, Storage<double>::max);
                    kept = old + (1 - h[BETA2]) * (now - old);
                    now = kept / bias2;
                }
            }
    }

    void round_mixer(int side, const double* K) {
        const int64_t rp = padded<T>(d.r);
        for (int64_t i = 0; i < rp * rp; ++i) mixer[side][i] = 0;
        for (int64_t i = 0; i < d.r; ++i)
            for (int64_t j = 0; j < d.r; ++j) mixer[side][i * rp + j] = T(bounded(K[i * d.rp + j], double(huge)));
    }

    void update(int side) {
        const Momentum<T> u = momentum(side);
        const float taken = *steps(side);
        *steps(side) = taken + 1;
        with_weights<S>(row, side ? SIDE : 0, job, int64_t(taken), [&](auto like, const auto& weights) {
            move_side(p[side], g[side], first<decltype(like)>(side), mixer[side], padded<T>(d.r), u, weights, in, out);
        });
    }
};

}  // namespace REFLORA_ISA
}  // namespace reflora
