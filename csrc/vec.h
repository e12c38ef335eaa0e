// Fixed-width vectors and small loops over them. Only headers that define no inline functions with external linkage may
// be included by kernels.cpp: it is compiled once an instruction set, and the linker would merge such functions.
#pragma once
#include <cstddef>
#include <cstdint>

namespace reflora {
namespace REFLORA_ISA {

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))
#define RESTRICT __restrict__

// bytes of a register, and how many there are: a vector that fits into none lives in memory, whatever is done with it
#if defined(__AVX512F__)
constexpr int REGISTER = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int REGISTER = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int REGISTER = 16, REGISTERS = 32;
#else
constexpr int REGISTER = 16, REGISTERS = 16;
#endif

template <class T, int BYTES = REGISTER>
struct VecOf {
    static constexpr int W = BYTES / int(sizeof(T));
    typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

template <class V, class T>
INLINE V load(const T* p) {
    return *reinterpret_cast<const V*>(p);
}

template <class V, class T>
INLINE void store(T* p, V v) {
    *reinterpret_cast<V*>(p) = v;
}

INLINE double root(double x) { return __builtin_sqrt(x); }
INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double magnitude(double x) { return __builtin_fabs(x); }
INLINE float magnitude(float x) { return __builtin_fabsf(x); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// a b + c, rounded once where the processor can, and never left to the compiler's choice: what calls this has the same
// bits for a scalar as in a lane of a vector
#ifdef __FP_FAST_FMA
INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
INLINE double fused(double a, double b, double c) { return a * b + c; }
INLINE float fused(float a, float b, float c) { return a * b + c; }
#endif
template <class V>
INLINE V fused(V a, V b, V c) {
    for (size_t k = 0; k < sizeof(V) / sizeof(c[0]); ++k) c[k] = fused(a[k], b[k], c[k]);
    return c;
}

// r rounded up to whole 64 bytes, the widest vector, on every processor
template <class T>
INLINE int64_t padded(int64_t r) {
    constexpr int W = 64 / int(sizeof(T));
    return (r + W - 1) / W * W;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define REFLORA_SHUFFLE 1
#endif
#endif

#ifdef REFLORA_SHUFFLE
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
// as many vectors of doubles as one has elements, transposed
INLINE void transpose_block(VecOf<double, 64>::type* v) {
    VecOf<double, 64>::type a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[i + 1] = SHUFFLE(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + j] = SHUFFLE(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + j + 2] = SHUFFLE(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; ++j) {
        v[j] = SHUFFLE(b[j], b[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[j + 4] = SHUFFLE(b[j], b[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

INLINE void transpose_block(VecOf<double, 32>::type* v) {
    VecOf<double, 32>::type a[4];
    for (int i = 0; i < 4; i += 2) {
        a[i] = SHUFFLE(v[i], v[i + 1], 0, 4, 2, 6);
        a[i + 1] = SHUFFLE(v[i], v[i + 1], 1, 5, 3, 7);
    }
    for (int j = 0; j < 2; ++j) {
        v[j] = SHUFFLE(a[j], a[j + 2], 0, 1, 4, 5);
        v[j + 2] = SHUFFLE(a[j], a[j + 2], 2, 3, 6, 7);
    }
}

INLINE void transpose_block(VecOf<double, 16>::type* v) {
    const VecOf<double, 16>::type a = SHUFFLE(v[0], v[1], 0, 2);
    v[1] = SHUFFLE(v[0], v[1], 1, 3);
    v[0] = a;
}
#undef SHUFFLE
#else
template <class V>
INLINE void transpose_block(V* v) {
    for (size_t i = 0; i < sizeof(V) / sizeof(v[0][0]); ++i)
        for (size_t j = 0; j < i; ++j) {
            const auto x = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = x;
        }
}
#endif

// sum of x[i] * y[i] over n, a multiple of the vector width; four sums in flight hide the latency of one
template <class T>
INLINE T dot(const T* RESTRICT x, const T* RESTRICT y, int64_t n) {
    using V = typename VecOf<T>::type;
    constexpr int W = VecOf<T>::W;
    V sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int u = 0; u < 4; ++u) sum[u] += load<V>(x + i + u * W) * load<V>(y + i + u * W);
    for (; i < n; i += W) sum[0] += load<V>(x + i) * load<V>(y + i);
    const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    T total = 0;
    for (int l = 0; l < W; ++l) total += all[l];
    return total;
}

}  // namespace REFLORA_ISA
}  // namespace reflora
