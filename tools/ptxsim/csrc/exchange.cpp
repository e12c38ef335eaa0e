#include "exchange.h"

#include <algorithm>
#include <map>

#include "integers.h"

namespace ptxsim {

namespace {

// the lane that a lane reads from, and whether it is in range
struct Source {
    u32 lane;
    bool in_range;
};

Source source_of(u8 variant, u32 lane, u32 offset, u32 clamp) {
    const u32 segment = clamp >> 8 & 31, limit = clamp & 31;
    offset &= 31;
    const u32 first = lane & segment, last = first | (limit & ~segment);
    switch (variant) {
        case SHUFFLE_BFLY: return {lane ^ offset, (lane ^ offset) <= last};
        case SHUFFLE_IDX: {
            const u32 from = first | (offset & ~segment);
            return {from, from <= last};
        }
        case SHUFFLE_UP: return {lane - offset, s32(lane - offset) >= s32(last)};
        default: return {lane + offset, lane + offset <= last};
    }
}

template <class F, class T>
void redux(Warp& w, const Instruction& I, u32 mask) {
    const T* a = w.lanes<T>(I.a);
    T all = a[__builtin_ctz(mask)];
    each_lane(mask & (mask - 1), [&](u32 i) { all = F::f(all, a[i]); });
    T* d = w.lanes<T>(I.d);
    each_lane(mask, [&](u32 i) { d[i] = all; });
}

}  // namespace

void shuffle(Warp& w, const Instruction& I, u32 mask) {
    const u32 *a = w.lanes<u32>(I.a), *offset = w.lanes<u32>(I.b), *clamp = w.lanes<u32>(I.c);
    u32 values[LANES];
    bool in_range[LANES];
    each_lane(mask, [&](u32 i) {
        const Source from = source_of(I.variant, i, offset[i], clamp[i]);
        const u32 lane = from.in_range ? from.lane : i;
        if (!(mask >> lane & 1)) fault(w, I, format("shuffle from inactive lane %u", lane), i);
        values[i] = a[lane];
        in_range[i] = from.in_range;
    });
    u32* d = w.lanes<u32>(I.d);
    each_lane(mask, [&](u32 i) { d[i] = values[i]; });
    if (I.outs.empty()) return;
    u8* predicate = w.lanes<u8>(I.outs[0]);
    each_lane(mask, [&](u32 i) { predicate[i] = in_range[i]; });
}

void vote(Warp& w, const Instruction& I, u32 mask) {
    const u8* a = w.lanes<u8>(I.a);
    u32 ballot = 0;
    each_lane(mask, [&](u32 i) { ballot |= u32(a[i] != 0) << i; });
    if (I.variant == VOTE_BALLOT) {
        u32* d = w.lanes<u32>(I.d);
        each_lane(mask, [&](u32 i) { d[i] = ballot; });
        return;
    }
    const bool any = ballot != 0, all = ballot == mask;
    const u8 result = I.variant == VOTE_ANY ? any : I.variant == VOTE_ALL ? all : all || !any;
    u8* d = w.lanes<u8>(I.d);
    each_lane(mask, [&](u32 i) { d[i] = result; });
}

// the scheduler does it
void warp_barrier(Warp&, const Instruction&, u32) {}

Function redux_function(const std::string& opcode) {
    static const std::map<std::string, Function> functions = {
        {"redux.sync.max.s32", redux<MaxInt, s32>}, {"redux.sync.min.s32", redux<MinInt, s32>},
        {"redux.sync.add.s32", redux<AddInt, s32>}, {"redux.sync.max.u32", redux<MaxInt, u32>},
        {"redux.sync.min.u32", redux<MinInt, u32>}, {"redux.sync.add.u32", redux<AddInt, u32>},
        {"redux.sync.and.b32", redux<And, u32>},    {"redux.sync.or.b32", redux<Or, u32>},
        {"redux.sync.xor.b32", redux<Xor, u32>},
    };
    const auto found = functions.find(opcode);
    return found == functions.end() ? nullptr : found->second;
}

void pack(Warp& w, const Instruction& I, u32 mask) {
    const u32 parts = u32(I.ins.size()), total = I.width * parts;
    each_lane(mask, [&](u32 i) {
        u8 value[8];
        for (u32 j = 0; j < parts; j++) memcpy(value + j * I.width, w.registers + I.ins[j] + i * I.width, I.width);
        memcpy(w.registers + I.d + i * total, value, total);
    });
}

void unpack(Warp& w, const Instruction& I, u32 mask) {
    const u32 parts = u32(I.outs.size()), total = I.width * parts;
    each_lane(mask, [&](u32 i) {
        u8 value[8];
        memcpy(value, w.registers + I.a + i * total, total);
        for (u32 j = 0; j < parts; j++) memcpy(w.registers + I.outs[j] + i * I.width, value + j * I.width, I.width);
    });
}

}  // namespace ptxsim
