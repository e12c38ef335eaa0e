// Floats, one lane. A float32 result that is NaN has the one pattern that NVIDIA's units give; a float64 one has one
// pattern too, so that lanes which add the same numbers in another order agree.
#pragma once
#include <immintrin.h>

#include <cmath>

#include "types.h"

namespace ptxsim {

inline float canonical(float x) { return x != x ? bit_cast<float>(0x7fffffffu) : x; }
inline double canonical(double x) { return x != x ? bit_cast<double>(0x7ff8000000000000ull) : x; }
// subnormals to zero
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline double flush(double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }

inline float from_half(u16 x) { return _cvtsh_ss(x); }
inline u16 to_half(float x) { return x != x ? u16(0x7fff) : u16(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
inline float from_bfloat(u16 x) { return bit_cast<float>(u32(x) << 16); }
inline u16 to_bfloat(float x) {
    if (x != x) return 0x7fff;
    const u32 bits = bit_cast<u32>(x);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// to float32 with an odd last bit where it is not exact: rounding that once more rounds as from float64
inline float to_odd(double x) {
    const float near = float(x);
    if (x != x || double(near) == x || std::isinf(x)) return near;
    u32 bits = bit_cast<u32>(near);
    if (std::fabs(double(near)) > std::fabs(x)) bits -= 1;
    return bit_cast<float>(bits | 1);
}

struct Add {
    template <class T>
    static T f(T a, T b) { return canonical(a + b); }
};
struct Sub {
    template <class T>
    static T f(T a, T b) { return canonical(a - b); }
};
struct Mul {
    template <class T>
    static T f(T a, T b) { return canonical(a * b); }
};
struct Div {
    template <class T>
    static T f(T a, T b) { return canonical(a / b); }
};
struct Fma {
    static float f(float a, float b, float c) { return canonical(__builtin_fmaf(a, b, c)); }
    static double f(double a, double b, double c) { return canonical(__builtin_fma(a, b, c)); }
};

struct Neg {
    template <class T>
    static T f(T a) { return canonical(-a); }
};
struct Abs {
    template <class T>
    static T f(T a) { return canonical(std::fabs(a)); }
};
struct AbsFlush {
    static float f(float a) { return canonical(flush(std::fabs(a))); }
};
// one or two 16-bit floats: the sign bits alone
template <u32 signs>
struct NegBits {
    template <class T>
    static T f(T a) { return a ^ T(signs); }
};
template <u32 signs>
struct AbsBits {
    template <class T>
    static T f(T a) { return a & T(~signs); }
};
// PTX takes the sign of the first operand
struct CopySign {
    template <class T>
    static T f(T sign, T magnitude) { return std::copysign(magnitude, sign); }
};

// a NaN gives way to a number, -0 is below 0
struct Min {
    template <class T>
    static T f(T a, T b) {
        T x = a < b ? a : (b < a ? b : (std::signbit(a) ? a : b));
        x = a != a ? b : x;
        x = b != b ? a : x;
        return canonical(x);
    }
};
struct Max {
    template <class T>
    static T f(T a, T b) {
        T x = a > b ? a : (b > a ? b : (std::signbit(a) ? b : a));
        x = a != a ? b : x;
        x = b != b ? a : x;
        return canonical(x);
    }
};
template <class M>
struct OrNan {
    static float f(float a, float b) { return a != a || b != b ? bit_cast<float>(0x7fffffffu) : M::f(a, b); }
};

// "approx" instructions are rounded correctly here
struct Sqrt {
    template <class T>
    static T f(T a) { return canonical(std::sqrt(a)); }
};
struct Rsqrt {
    static float f(float a) { return canonical(float(1.0 / std::sqrt(double(a)))); }
};
struct Rcp {
    template <class T>
    static T f(T a) { return canonical(T(1) / a); }
};
struct Exp2 {
    static float f(float a) { return canonical(float(std::exp2(double(a)))); }
};
struct Log2 {
    static float f(float a) { return canonical(float(std::log2(double(a)))); }
};
template <class F>
struct Flush {
    static float f(float a) { return canonical(flush(F::f(flush(a)))); }
};
// the upper half only: 20 bits of mantissa
struct RcpUpper {
    static double upper(double x) { return bit_cast<double>(bit_cast<u64>(x) & 0xffffffff00000000); }
    static double f(double a) { return a != a ? canonical(a) : upper(flush(1.0 / flush(upper(a)))); }
};

}  // namespace ptxsim
