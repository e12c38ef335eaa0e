// Memory as a lane sees it: bounds, alignment, shadow; loads and stores.
#pragma once
#include "races.h"

namespace ptxsim {

// faults where the bytes are in no allocation, or their address is no multiple of the alignment
Allocation& require_inside(Warp& w, const Instruction& I, u64 address, u32 size, u32 lane, const char* what);
void require_aligned(Warp& w, const Instruction& I, u64 address, u32 alignment, u32 lane, const char* what);
// both; the alignment is the size
Allocation& locate(Warp& w, const Instruction& I, u64 address, u32 size, u32 lane, const char* what);
// both; the offset in shared memory
u32 locate_shared(Warp& w, const Instruction& I, u32 address, u32 size, u32 lane, const char* what);

// what a lane reads, or is about to write, noted for the race checks
void global_read(Warp& w, const Instruction& I, Allocation& from, u64 address, u32 size, u32 lane);
void global_write(Warp& w, const Instruction& I, Allocation& to, u64 address, u32 size, u32 lane, const void* values);
void shared_read(Warp& w, const Instruction& I, u32 offset, u32 size, u32 lane);
void shared_write(Warp& w, const Instruction& I, u32 offset, u32 size, u32 lane, const void* values);

// by the size of an element; a load of a signed type extends the sign
Function load_function(Space space, u32 size, bool is_signed);
Function store_function(Space space, u32 size);
void load_parameter(Warp& w, const Instruction& I, u32 mask);

}  // namespace ptxsim
