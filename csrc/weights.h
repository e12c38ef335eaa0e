// How an update reads and stores a parameter: to nearest, beside float32 master weights, or with stochastic rounding.
#pragma once
#include "storage.h"

namespace reflora {
namespace REFLORA_ISA {

// run(o, e, step): the weights of a run that begins at offset o; its elements are number e, e + step, ... of the side,
// (i, k) being number i + r * k. read, write: the element at offset o of the run, its i-th
struct Nearest {
    Nearest run(int64_t, int64_t, int64_t) const { return *this; }
    template <class T, class S>
    MEMBER T read(const S* p, int64_t o) const { return T(widen(p[o])); }
    template <class T, class S>
    MEMBER void write(T x, S* p, int64_t o, int64_t) const { narrow_saturated(x, p + o); }
};

struct Master {
    float* w;
    Master run(int64_t o, int64_t, int64_t) const { return {w + o}; }
    // a stored parameter that is not w rounded has been written by somebody: it counts
    template <class T, class S>
    MEMBER T read(const S* p, int64_t o) const {
        S rounded;
        narrow(w[o], &rounded);
        const float stored = widen(p[o]);
        return widen(rounded) == stored ? w[o] : stored;
    }
    template <class T, class S>
    MEMBER void write(T x, S* p, int64_t o, int64_t) const {
        const float kept = bounded(x, T(Storage<S>::max));
        w[o] = kept;
        narrow(kept, p + o);
    }
};

INLINE uint64_t mix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

INLINE uint32_t fmix32(uint32_t h) {
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}

// the bits depend on seed, row, side, step and element alone: every backend draws the same
struct Stochastic {
    uint32_t low, high, first, step;
    Stochastic run(int64_t, int64_t e, int64_t s) const { return {low, high, uint32_t(e), uint32_t(s)}; }
    template <class T>
    MEMBER T read(const bf16* p, int64_t o) const { return widen(p[o]); }
    MEMBER void write(float x, bf16* p, int64_t o, int64_t i) const {
        const uint32_t h = fmix32(fmix32((first + step * uint32_t(i)) ^ low) + high);
        // the largest bfloat16 has no digits below it to carry over into inf
        p[o].bits = uint16_t((as_bits(bounded(x, float(Storage<bf16>::max))) + (h >> 16)) >> 16);
    }
};

INLINE Stochastic stochastic(uint64_t seed, int64_t tag, int side, int64_t steps) {
    const uint64_t key = mix64(mix64(mix64(seed) + 2 * uint64_t(tag) + (side ? 1 : 0)) + uint64_t(steps));
    return {uint32_t(key), uint32_t(key >> 32), 0, 1};
}

// use(Q{}, weights) for the type Q of a side's moments and the way its weights are kept; taken: steps before this one
template <class S, class Use>
INLINE void with_weights(const int64_t* row, int side, const Job& job, int64_t taken, Use use) {
    if constexpr (sizeof(S) == 2) {
        const auto typed = [&](const auto& weights) {
            return row[STATE] == F32 ? use(float{}, weights) : use(S{}, weights);
        };
        if (row[side + W]) return typed(Master{reinterpret_cast<float*>(row[side + W])});
        if constexpr (is_bf16<S>) {
            if (job.stochastic) return typed(stochastic(job.seed, row[TAG], side, taken));
        }
        typed(Nearest{});
    } else {
        use(S{}, Nearest{});
    }
}

}  // namespace REFLORA_ISA
}  // namespace reflora
