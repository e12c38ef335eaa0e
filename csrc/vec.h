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

// sum of x[i] * y[i] over n, a multiple of the vector width
template <class T>
INLINE T dot(const T* RESTRICT x, const T* RESTRICT y, int64_t n) {
    using V = typename VecOf<T>::type;
    V sum = {};
    for (int64_t i = 0; i < n; i += VecOf<T>::W)
        sum += load<V>(x + i) * load<V>(y + i);
    T total = 0;
    for (int i = 0; i < VecOf<T>::W; ++i) total += sum[i];
    return total;
}

}  // namespace REFLORA_ISA
}  // namespace reflora
