#include "atomics.h"

#include <algorithm>
#include <map>

#include "memory.h"

namespace ptxsim {

namespace {

template <class T>
T combine_bits(u8 variant, T old, T x) {
    using U = std::conditional_t<sizeof(T) == 4, u32, u64>;
    const U a = bit_cast<U>(old), b = bit_cast<U>(x);
    if (variant == ATOMIC_AND) return bit_cast<T>(U(a & b));
    if (variant == ATOMIC_OR) return bit_cast<T>(U(a | b));
    return bit_cast<T>(U(a ^ b));
}

template <class T>
T combine(u8 variant, T old, T x, T replacement) {
    switch (variant) {
        case ATOMIC_ADD: return T(old + x);
        case ATOMIC_EXCHANGE: return x;
        case ATOMIC_MAX: return std::max(old, x);
        case ATOMIC_MIN: return std::min(old, x);
        case ATOMIC_CAS: return memcmp(&old, &x, sizeof(T)) == 0 ? replacement : old;
        default: return combine_bits(variant, old, x);
    }
}

u8* locate_atomic(Warp& w, const Instruction& I, u32 size, u32 lane) {
    Block& block = *w.block;
    if (I.space == Space::Shared) {
        const u32 address = w.lanes<u32>(I.a)[lane] + u32(I.immediate);
        return &block.shared[locate_shared(w, I, address, size, lane, "atomic")];
    }
    const u64 address = w.lanes<u64>(I.a)[lane] + u64(I.immediate);
    Allocation& a = locate(w, I, address, size, lane, "atomic");
    if (block.launch->options.race) {
        const u32 thread = w.thread(lane);
        if (I.acquire) acquire(block, thread, address);
        const u64 offset = address - a.begin;
        for (u64 index = offset >> a.shift; index <= (offset + size - 1) >> a.shift; index++)
            note_write<Space::Global>(w, I, a.shadow[index], thread, address, true, true);
        if (I.release) release(block, thread, address);
    }
    return (u8*)address;
}

template <class T>
void atomic(Warp& w, const Instruction& I, u32 mask) {
    each_lane(mask, [&](u32 i) {
        u8* at = locate_atomic(w, I, sizeof(T), i);
        T old;
        memcpy(&old, at, sizeof(T));
        const T replacement = I.c == NONE ? T(0) : w.lanes<T>(I.c)[i];
        const T value = combine(I.variant, old, w.lanes<T>(I.b)[i], replacement);
        memcpy(at, &value, sizeof(T));
        if (I.d != NONE) w.lanes<T>(I.d)[i] = old;
    });
}

}  // namespace

Function atomic_function(const std::string& type) {
    static const std::map<std::string, Function> functions = {
        {"u32", atomic<u32>}, {"b32", atomic<u32>}, {"s32", atomic<s32>},   {"u64", atomic<u64>},
        {"b64", atomic<u64>}, {"s64", atomic<s64>}, {"f32", atomic<float>}, {"f64", atomic<double>},
    };
    const auto found = functions.find(type);
    return found == functions.end() ? nullptr : found->second;
}

}  // namespace ptxsim
