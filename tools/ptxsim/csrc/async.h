// cp.async: copies to shared memory that are there once their thread has waited for them.
#pragma once
#include "warp.h"

namespace ptxsim {

// what register b says
enum Source : u8 { WHOLE_SOURCE, SOURCE_SIZE, IGNORE_SOURCE };

void copy_async(Warp& w, const Instruction& I, u32 mask);
void commit_group(Warp& w, const Instruction& I, u32 mask);
// immediate: groups that may still be under way
void wait_group(Warp& w, const Instruction& I, u32 mask);
void wait_all(Warp& w, const Instruction& I, u32 mask);

}  // namespace ptxsim
