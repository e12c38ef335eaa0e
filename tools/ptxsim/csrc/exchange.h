// Instructions by which the lanes of a warp exchange values.
#pragma once
#include <string>

#include "warp.h"

namespace ptxsim {

enum Shuffle : u8 { SHUFFLE_BFLY, SHUFFLE_IDX, SHUFFLE_UP, SHUFFLE_DOWN };
enum Vote : u8 { VOTE_ANY, VOTE_ALL, VOTE_BALLOT, VOTE_UNI };

void shuffle(Warp& w, const Instruction& I, u32 mask);
void vote(Warp& w, const Instruction& I, u32 mask);
void warp_barrier(Warp& w, const Instruction& I, u32 mask);
// by the instruction's name, null where there is none
Function redux_function(const std::string& opcode);

// {parts} to one register, one register to {parts}
void pack(Warp& w, const Instruction& I, u32 mask);
void unpack(Warp& w, const Instruction& I, u32 mask);

}  // namespace ptxsim
