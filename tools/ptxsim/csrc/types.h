// Short names of types, bits, text.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if !defined(__AVX2__) || !defined(__F16C__) || !defined(__FMA__)
#error "the emulator needs an x86-64 processor with AVX2, FMA and F16C"
#endif

namespace ptxsim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr u32 LANES = 32;
constexpr u32 NONE = ~0u;
constexpr u32 ALL_LANES = ~0u;

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// printf to a string
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...);

template <class T, class S>
inline T bit_cast(S from) {
    static_assert(sizeof(T) == sizeof(S), "other widths");
    T to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class F>
inline void each_lane(u32 mask, F f) {
    for (; mask; mask &= mask - 1) f(u32(__builtin_ctz(mask)));
}

inline u32 round_up(u32 value, u32 unit) { return (value + unit - 1) / unit * unit; }

}  // namespace ptxsim
