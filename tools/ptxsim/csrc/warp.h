// The state of a launch: warps and their fragments, blocks, what each block knows of others.
#pragma once
#include <array>
#include <deque>
#include <random>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "allocations.h"
#include "program.h"

namespace ptxsim {

constexpr u32 SHARED_BASE = 1024;  // address of the first byte: small numbers are faults

// what is visible of another block: every access before an epoch, and one thread's up to an epoch
struct Visible {
    u32 before = 0;
    u32 thread = NONE, up_to = 0;
};
using Clock = std::unordered_map<u32, Visible>;  // by the number of a block
void join(Clock& into, const Clock& from);

// lanes at one place of the code
struct Fragment {
    u32 pc;
    u32 mask;
    bool blocked;
};

// a cp.async that its thread has not waited for
struct Copy {
    u32 pc;
    u32 shared;  // offset
    u16 thread;
    u8 size;
    u32 group;
    std::array<u8, 16> data;

    // what it will put at an offset in shared memory
    const u8* at(u32 offset) const { return &data[offset - shared]; }
};

struct Block;
struct Launch;

struct Timing {
    std::vector<float> chain, in_order;  // when a slot of the register file is ready
    double control = 0, last = 0, most = 0;
    bool near = false;  // whether the block had been where the last access of global memory went
};

struct Warp {
    u8* registers;
    Block* block;
    Kernel* kernel;
    u32 id;
    std::vector<Fragment> fragments;
    u32 exited = 0;
    u32 epoch = 0, step = 0;
    bool at_barrier = false, done = false;
    u32 barrier = 0;  // pc of the one that it waits at
    // of each lane: groups of asynchronous copies committed, copies not waited for (entries of the block's)
    std::array<u32, LANES> groups{};
    std::array<std::deque<u32>, LANES> copies;
    Timing timing;

    template <class T>
    T* lanes(u32 offset) const {
        return reinterpret_cast<T*>(registers + offset);
    }
    u32 thread(u32 lane) const { return id * LANES + lane; }
};

struct Block {
    Launch* launch;
    Kernel* kernel;
    u32 number, index;  // over all launches, in this one
    u32 coordinates[3];
    u32 epoch = 0;
    std::vector<Warp> warps;
    Buffer<u8> registers;
    std::vector<u8> shared;
    std::vector<Cell> shadow;  // of shared memory
    std::vector<Copy> copies;
    std::vector<u32> free_copies;  // entries of it
    u64* counts;  // instructions by class
    std::unordered_set<u64> touched;  // sectors of global memory, for Options::near
    Clock clock, acquired;  // of all its threads; of one thread, since the last barrier
    u32 acquirer = NONE;    // that thread

    Block(Launch& of, u32 index);
};

struct Launch {
    Kernel* kernel;
    Options options;
    std::array<u32, 3> grid;
    u32 first_block;  // number
    u32 shared_bytes;
    const u8* parameters;
    std::unordered_map<u64, Clock> released;  // by address of an atomic
    std::mt19937_64 random;
    Allocation* last = nullptr;  // where the last access was
};

[[noreturn]] void fault(const Warp& w, const Instruction& I, const std::string& what, u32 lane);

// until it waits at a block barrier, ends, or has done `quantum` instructions
void run_warp(Warp& w, u64 quantum);
void run_launch(Launch& launch);

}  // namespace ptxsim
