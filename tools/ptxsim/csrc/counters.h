// What an access costs: sectors of global memory, passes of shared memory, each beside the least that would do.
#pragma once
#include <array>

#include "warp.h"

namespace ptxsim {

using GlobalAddresses = std::array<u64, LANES>;
using SharedAddresses = std::array<u32, LANES>;

// size: bytes that each lane of the mask asks for
void count_sectors(Warp& w, const Instruction& I, u32 mask, const GlobalAddresses& addresses, u32 size);
void count_passes(Warp& w, const Instruction& I, u32 mask, const SharedAddresses& addresses, u32 size);

}  // namespace ptxsim
