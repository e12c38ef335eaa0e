// Live memory that kernels may touch, and its shadow: who accessed which bytes last.
#pragma once
#include <cstdlib>
#include <memory>

#include "types.h"

namespace ptxsim {

struct Access {
    u32 block;       // number of a block, counted over all launches; 0: none
    u32 epoch;       // block barriers before it
    u32 warp_epoch;  // warp-wide instructions before it
    u32 step;        // instructions of the warp before it
    u32 pc;
    u16 thread;
    bool changes;  // a write of another value than was there
    bool atomic;
};

// the accesses of one piece of memory
struct Cell {
    Access write, read, earlier_read;
    bool several;   // other lanes of the warp of `read` have read it too
    u32 in_flight;  // 1 + index of the asynchronous copy that will write it; 0: none
};

struct Freed {
    void operator()(void* p) const { free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Freed>;

struct Allocation {
    u64 begin, size;
    Buffer<Cell> shadow;
    int shift = -1;  // log2 of the bytes of a cell

    bool holds(u64 address, u64 bytes) const { return address >= begin && address + bytes <= begin + size; }
    // cells of at most 2^wanted bytes
    void need_shadow(int wanted) {
        if (!shadow || shift > wanted) make_shadow(wanted);
    }
    void make_shadow(int wanted);
};

void add_allocation(u64 begin, u64 size);
void remove_allocation(u64 begin);
// the allocation that holds all these bytes, or null
Allocation* find_allocation(u64 address, u64 bytes);
// asked about an address that is in no allocation; may add one
using UnknownHook = void (*)(u64);
void set_unknown_hook(UnknownHook hook);
// the neighbours of an address, for a message
std::string describe_neighbours(u64 address);
// the first of this many new numbers of blocks
u32 number_blocks(u32 count);

}  // namespace ptxsim
