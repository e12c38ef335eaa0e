// Storage types and strided panels: conversion to the type arithmetic runs in, and back, rounded to nearest even.
#pragma once
#include "table.h"
#include "vec.h"

namespace reflora {
namespace REFLORA_ISA {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

INLINE float as_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
INLINE float widen(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
    const uint32_t rest = uint32_t(x.bits & 0x7fffu) << 13;
    const uint32_t exponent = rest & 0x0f800000u;
    if (exponent == 0x0f800000u) return as_float(sign | rest | 0x70000000u);  // inf and nan
    if (exponent == 0) return as_float(sign | as_bits(as_float(rest | 0x38800000u) - as_float(0x38800000u)));
    return as_float(sign | (rest + 0x38000000u));
}

template <class S>
struct Storage;
template <>
struct Storage<float> {
    static constexpr double max = 3.4028234663852886e38;
};
template <>
struct Storage<double> {
    static constexpr double max = 1.7976931348623157e308;
};
template <>
struct Storage<bf16> {
    static constexpr double max = 3.3895313892515355e38;
};
template <>
struct Storage<f16> {
    static constexpr double max = 65504;
};

template <class S> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<bf16> = true;

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(double x, double* out) { *out = x; }
INLINE void narrow(double x, float* out) { *out = float(x); }
INLINE void narrow(float x, bf16* out) {
    const uint32_t bits = as_bits(x);
    out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE void narrow(float x, f16* out) {
    const uint32_t bits = as_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t a = bits & 0x7fffffffu;
    uint32_t h;
    if (a >= 0x47800000u) {
        h = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (a < 0x38800000u) {
        h = as_bits(as_float(a) + 0.5f) - 0x3f000000u;  // the sum rounds to half's denormals
    } else {
        h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    }
    out->bits = uint16_t(sign | h);
}
INLINE void narrow(double x, bf16* out) { narrow(float(x), out); }
INLINE void narrow(double x, f16* out) { narrow(float(x), out); }

// within +-limit; nan, which inf - inf in a product leaves, has no sign and becomes 0
template <class T>
INLINE T bounded(T x, T limit) {
    const T above = x > -limit ? x : -limit;  // one instruction each, as the second operand stands for nan
    const T within = above < limit ? above : limit;
    return x == x ? within : T(0);
}

// values beyond the storage range become its largest, so that nothing finite turns into inf
template <class S, class T>
INLINE void narrow_saturated(T x, S* out) { narrow(bounded(x, T(Storage<S>::max)), out); }

// one side of a table row, [r, n]; strides in elements of S
template <class S>
struct Factor {
    S* p;
    int64_t sr, sn, r, n;
    bool transposed() const { return sr == 1 && r > 1; }
    bool dense() const { return (sr == 1 && sn == r) || (sn == 1 && sr == n); }
};

template <class S>
INLINE Factor<S> factor(const int64_t* row, int side, int column) {
    const int64_t* s = row + side;
    const int strides = column == G ? G_SR : P_SR;
    return {reinterpret_cast<S*>(s[column]), s[strides], s[strides + 1], row[R], s[N]};
}

// largest |x|; +inf if any is inf or nan
template <class S>
static double largest(const Factor<S>& f) {
    double top = 0;
    bool bad = false;
    const bool along_r = f.transposed();
    const int64_t outer = along_r ? f.n : f.r;
    const int64_t inner = along_r ? f.r : f.n;
    const int64_t so = along_r ? f.sn : f.sr;
    const int64_t si = along_r ? f.sr : f.sn;
    for (int64_t o = 0; o < outer; ++o) {
        const S* p = f.p + o * so;
        auto best = widen(p[0]) * 0;
        for (int64_t i = 0; i < inner; ++i) {
            const auto a = magnitude(widen(p[i * si]));
            bad |= !(a <= decltype(a)(Storage<S>::max));
            best = a > best ? a : best;
        }
        if (best > top) top = best;
    }
    return bad ? __builtin_inf() : top;
}

template <class S>
static bool all_finite(const Factor<S>& f) { return largest(f) <= Storage<S>::max; }

// by integers, at the speed of the loads
INLINE bool run_is_finite(const float* p, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, p + i, 4);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    return top < 0x7f800000u;
}

template <>
bool all_finite<float>(const Factor<float>& f) {
    if (f.dense()) return run_is_finite(f.p, f.r * f.n);
    if (f.sn != 1) return largest(f) <= Storage<float>::max;
    bool finite = true;
    for (int64_t i = 0; i < f.r; ++i) finite &= run_is_finite(f.p + i * f.sr, f.n);
    return finite;
}

// a vector of doubles of as many stored values
template <class S>
INLINE VecOf<double>::type doubles(const S* p) {
    VecOf<double>::type v;
    for (int l = 0; l < VecOf<double>::W; ++l) v[l] = double(widen(p[l]));
    return v;
}
INLINE VecOf<double>::type doubles(const float* p) {
    typedef VecOf<float, REGISTER / 2>::type Half;
    return __builtin_convertvector(load<Half>(p), VecOf<double>::type);
}

// on its way into the cache, run by run: a processor follows a few streams by itself, not one a row
template <class S>
INLINE void prefetch(const S* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + i);
}

// columns [k0, k0 + count) of f times `scale`, transposed: panel[k * rp + i], zeros for i >= r
template <class S>
INLINE void pack(const Factor<S>& f, int64_t k0, int64_t count, int64_t rp, double scale, double* RESTRICT panel) {
    if (f.sr == 1 && f.sn == f.r && f.r == rp) {
        const S* p = f.p + k0 * f.sn;
        for (int64_t i = 0; i < count * rp; ++i) panel[i] = double(widen(p[i])) * scale;
        return;
    }
    const int64_t next = least(count, f.n - k0 - count);
    int64_t i0 = 0;
    using V = VecOf<double>::type;
    constexpr int W = VecOf<double>::W;
    for (; f.sn == 1 && i0 + W <= f.r; i0 += W) {
        for (int i = 0; i < W; ++i) prefetch(f.p + (i0 + i) * f.sr + k0 + count, next);
        int64_t k = 0;
        for (; k + W <= count; k += W) {
            V v[W];
            for (int i = 0; i < W; ++i)
                v[i] = doubles(f.p + (i0 + i) * f.sr + k0 + k) * scale;
            transpose_block(v);
            for (int l = 0; l < W; ++l) store<V>(panel + (k + l) * rp + i0, v[l]);
        }
        for (; k < count; ++k)
            for (int i = 0; i < W; ++i)
                panel[k * rp + i0 + i] = double(widen(f.p[(i0 + i) * f.sr + k0 + k])) * scale;
    }
    for (int64_t k = 0; k < count; ++k) {
        const S* p = f.p + (k0 + k) * f.sn;
        double* out = panel + k * rp;
        for (int64_t i = i0; i < f.r; ++i) out[i] = double(widen(p[i * f.sr])) * scale;
        for (int64_t i = f.r; i < rp; ++i) out[i] = 0;
    }
}

}  // namespace REFLORA_ISA
}  // namespace reflora
