// cvt, one lane.
#pragma once
#include <limits>

#include "floats.h"

namespace ptxsim {

template <class D>
struct Cast {
    template <class S>
    static D f(S x) { return D(x); }
};
// keeps the bits of N, then extends to D
template <class D, class N>
struct Narrow {
    template <class S>
    static D f(S x) { return D(N(x)); }
};

struct HalfToFloat {
    static float f(u16 x) { return canonical(from_half(x)); }
};
struct BfloatToFloat {
    static float f(u16 x) { return canonical(from_bfloat(x)); }
};
struct HalfToDouble {
    static double f(u16 x) { return double(from_half(x)); }
};
struct BfloatToDouble {
    static double f(u16 x) { return double(from_bfloat(x)); }
};
struct ToHalf {
    static u16 f(float x) { return to_half(x); }
    static u16 f(double x) { return to_half(to_odd(x)); }
};
struct ToBfloat {
    static u16 f(float x) { return to_bfloat(x); }
    static u16 f(double x) { return to_bfloat(to_odd(x)); }
};
template <class To>
struct ToPair {
    static u32 f(float high, float low) { return u32(To::f(high)) << 16 | To::f(low); }
};
struct FloatToDouble {
    static double f(float x) { return double(x); }
};
struct DoubleToFloat {
    static float f(double x) { return canonical(float(x)); }
};

struct Floor {
    template <class T>
    static T f(T x) { return std::floor(x); }
};
struct Ceil {
    template <class T>
    static T f(T x) { return std::ceil(x); }
};
struct Truncate {
    template <class T>
    static T f(T x) { return std::trunc(x); }
};
struct Nearest {
    template <class T>
    static T f(T x) { return std::nearbyint(x); }
};

// to a whole number, at most and at least what its type holds
template <class Rounding, class D>
struct ToInt {
    template <class S>
    static D f(S x) {
        using Limits = std::numeric_limits<D>;
        constexpr int bits = 8 * sizeof(D);
        if (x != x) return sizeof(S) == 4 && sizeof(D) < 8 ? D(0) : D(u64(1) << (bits - 1));
        const double rounded = double(Rounding::f(x));
        const double least = std::is_signed_v<D> ? -std::ldexp(1.0, bits - 1) : 0.0;
        const double past = std::ldexp(1.0, std::is_signed_v<D> ? bits - 1 : bits);
        if (rounded < least) return Limits::min();
        if (rounded >= past) return Limits::max();
        return D(rounded);
    }
};

}  // namespace ptxsim
