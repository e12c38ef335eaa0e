// Matrices that lie across the lanes of a warp: ldmatrix, stmatrix, mma.
#pragma once
#include <string>

#include "warp.h"

namespace ptxsim {

// 8 x 8 matrices of 16-bit elements; count: matrices, variant: 1 transposed
void load_matrix(Warp& w, const Instruction& I, u32 mask);
void store_matrix(Warp& w, const Instruction& I, u32 mask);

enum class Element : u8 { F64, F16, BF16, TF32 };

struct Mma {
    Element element;
    u32 rows, depth;  // columns: 8
    u32 a, b, c;  // registers of a lane
    u32 bytes;    // of a register
    Function run;
};
// by the instruction's name, null where there is none
const Mma* find_mma(const std::string& opcode);

}  // namespace ptxsim
