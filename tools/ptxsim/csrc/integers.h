// Whole numbers and bits, one lane. Overflow wraps (-fwrapv).
#pragma once
#include <algorithm>

#include "types.h"

namespace ptxsim {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

struct Identity {
    template <class T>
    static T f(T a) { return a; }
};
struct Select {
    template <class T>
    static T f(T a, T b, u8 which) { return which ? a : b; }
};
struct AddInt {
    template <class T>
    static T f(T a, T b) { return T(a + b); }
};
struct SubInt {
    template <class T>
    static T f(T a, T b) { return T(a - b); }
};
struct NegInt {
    template <class T>
    static T f(T a) { return T(-a); }
};
struct AbsInt {
    template <class T>
    static T f(T a) { return T(a < 0 ? -a : a); }
};
struct MinInt {
    template <class T>
    static T f(T a, T b) { return a < b ? a : b; }
};
struct MaxInt {
    template <class T>
    static T f(T a, T b) { return a > b ? a : b; }
};
struct MinRelu {
    static s32 f(s32 a, s32 b) { return std::max(std::min(a, b), 0); }
};
struct MaxRelu {
    static s32 f(s32 a, s32 b) { return std::max(std::max(a, b), 0); }
};

// the low half of a product; 64 bits, because two u16 would be multiplied as int
struct MulLow {
    template <class T>
    static T f(T a, T b) { return T(u64(Unsigned<T>(a)) * u64(Unsigned<T>(b))); }
};
struct MadLow {
    template <class T>
    static T f(T a, T b, T c) { return T(u64(Unsigned<T>(a)) * u64(Unsigned<T>(b)) + u64(Unsigned<T>(c))); }
};
template <class W>
struct MulHigh {
    template <class T>
    static T f(T a, T b) { return T((W(a) * W(b)) >> (8 * sizeof(T))); }
};
template <class W>
struct MulWide {
    template <class T>
    static W f(T a, T b) { return W(a) * W(b); }
};
template <class W>
struct MadWide {
    template <class T>
    static W f(T a, T b, W c) { return W(a) * W(b) + c; }
};

struct DivInt {
    template <class T>
    static T f(T a, T b) {
        if (b == 0) return T(-1);
        if (std::is_signed_v<T> && b == T(-1)) return T(-a);  // x86 traps at the least number
        return T(a / b);
    }
};
struct RemInt {
    template <class T>
    static T f(T a, T b) {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == T(-1)) return 0;
        return T(a % b);
    }
};

struct And {
    template <class T>
    static T f(T a, T b) { return a & b; }
};
struct Or {
    template <class T>
    static T f(T a, T b) { return a | b; }
};
struct Xor {
    template <class T>
    static T f(T a, T b) { return a ^ b; }
};
struct Not {
    template <class T>
    static T f(T a) { return T(~a); }
};
struct NotPredicate {
    static u8 f(u8 a) { return a ^ 1; }
};

struct ShiftLeft {
    template <class T>
    static T f(T a, u32 n) { return n >= 8 * sizeof(T) ? T(0) : T(a << n); }
};
struct ShiftRight {
    template <class T>
    static T f(T a, u32 n) {
        constexpr u32 bits = 8 * sizeof(T);
        if (std::is_signed_v<T>) return T(a >> (n >= bits ? bits - 1 : n));
        return n >= bits ? T(0) : T(a >> n);
    }
};
struct FunnelLeft {
    static u32 f(u32 low, u32 high, u32 n) {
        n &= 31;
        return n ? (high << n) | (low >> (32 - n)) : high;
    }
};
struct FunnelRight {
    static u32 f(u32 low, u32 high, u32 n) {
        n &= 31;
        return n ? (high << (32 - n)) | (low >> n) : low;
    }
};

// a field of bits; a signed one continues its highest bit
struct Extract {
    template <class T>
    static T f(T a, u32 position, u32 length) {
        using U = Unsigned<T>;
        constexpr u32 bits = 8 * sizeof(T);
        position &= 255;
        length &= 255;
        if (length == 0) return 0;
        const u32 highest = std::min(position + length - 1, bits - 1);
        const bool sign = std::is_signed_v<T> && (U(a) >> highest & 1);
        U field = position >= bits ? 0 : U(a) >> position;
        if (length < bits) field &= (U(1) << length) - 1;
        const u32 have = position >= bits ? 0 : std::min(length, bits - position);
        if (sign && have < bits) field |= ~U(0) << have;
        return T(field);
    }
};

struct CountOnes {
    static u32 f(u32 a) { return u32(__builtin_popcount(a)); }
    static u32 f(u64 a) { return u32(__builtin_popcountll(a)); }
};
struct LeadingZeros {
    static u32 f(u32 a) { return a ? u32(__builtin_clz(a)) : 32; }
    static u32 f(u64 a) { return a ? u32(__builtin_clzll(a)) : 64; }
};
struct Reverse {
    static u32 f(u32 a) {
        u32 r = 0;
        for (u32 i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
        return r;
    }
};
// four bytes out of eight, or their signs
struct Permute {
    static u32 f(u32 a, u32 b, u32 selector) {
        const u64 all = u64(b) << 32 | a;
        u32 r = 0;
        for (u32 i = 0; i < 4; i++) {
            const u32 choice = selector >> (4 * i) & 15;
            u8 byte = u8(all >> (8 * (choice & 7)));
            if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
            r |= u32(byte) << (8 * i);
        }
        return r;
    }
};

}  // namespace ptxsim
