// A rough time of a block in cycles: the longest chain of dependences, and issue in the order of the PTX.
#pragma once
#include "warp.h"

namespace ptxsim {

// extra: cycles beyond the instruction's own, such as further passes of shared memory
void advance_time(Warp& w, const Instruction& I, double extra);
// all warps go on when the last has come to a barrier
void meet_in_time(Block& block);
void keep_time(Block& block);

}  // namespace ptxsim
