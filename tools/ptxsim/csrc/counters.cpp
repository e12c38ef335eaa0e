#include "counters.h"

#include <algorithm>

namespace ptxsim {

namespace {

constexpr u32 SECTOR = 32, BANKS = 32, WORD = 4;

// sorts, and leaves each value once
template <class T>
u32 distinct(T* values, u32 count) {
    std::sort(values, values + count);
    return u32(std::unique(values, values + count) - values);
}

}  // namespace

void count_sectors(Warp& w, const Instruction& I, u32 mask, const GlobalAddresses& addresses, u32 size) {
    u64 sectors[LANES], asked[LANES];
    u32 lanes = 0;
    each_lane(mask, [&](u32 i) {
        sectors[lanes] = addresses[i] / SECTOR;
        asked[lanes++] = addresses[i];
    });
    Counters& counters = w.kernel->counters[I.pc];
    const u32 count = distinct(sectors, lanes);
    counters.got += count;
    if (w.block->launch->options.near) {
        w.timing.near = true;
        for (u32 j = 0; j < count; j++) w.timing.near &= !w.block->touched.insert(sectors[j]).second;
    }
    const u64 bytes = u64(distinct(asked, lanes)) * size;  // lanes that ask for the same bytes need them once
    counters.least += (bytes + SECTOR - 1) / SECTOR;
    counters.bytes += bytes;
}

void count_passes(Warp& w, const Instruction& I, u32 mask, const SharedAddresses& addresses, u32 size) {
    // 128 bytes a pass: 32 lanes of 4 bytes, 16 of 8, 8 of 16
    const u32 together = size <= 4 ? 32 : size == 8 ? 16 : 8;
    Counters& counters = w.kernel->counters[I.pc];
    for (u32 first = 0; first < LANES; first += together) {
        u32 words[4 * LANES];
        u32 count = 0;
        for (u32 i = first; i < first + together; i++) {
            if (!(mask >> i & 1)) continue;
            for (u32 byte = 0; byte < std::max(size, WORD); byte += WORD) words[count++] = (addresses[i] + byte) / WORD;
        }
        if (!count) continue;
        count = distinct(words, count);
        u8 in_bank[BANKS] = {};
        u8 most = 0;
        for (u32 j = 0; j < count; j++) most = std::max(most, ++in_bank[words[j] % BANKS]);
        counters.got += most;
        counters.least += 1;
    }
    counters.bytes += u64(__builtin_popcount(mask)) * size;
}

}  // namespace ptxsim
