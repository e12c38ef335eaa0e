// A kernel after parsing: instructions, registers, what its runs leave behind.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace ptxsim {

enum Class : u8 {
    FP64, FP32, FP16, INT, CVT, MOV, MMA, SHUFFLE, SHARED, GLOBAL, ATOMIC, BARRIER, CONTROL, PREDICATE, PARAM, CLASSES
};
extern const char* const class_names[CLASSES];

enum class Kind : u8 { Plain, WarpWide, Label, Branch, Return, BlockBarrier };
enum class Space : u8 { Global, Shared };

struct Warp;
struct Instruction;
struct Mma;
// runs an instruction for the lanes of a mask
using Function = void (*)(Warp&, const Instruction&, u32 mask);

// registers: numbers while parsing, then byte offsets in the register file of a warp
struct Instruction {
    Function run = nullptr;
    u32 d = NONE, a = NONE, b = NONE, c = NONE;
    u32 guard = NONE;
    bool guard_negated = false;
    Kind kind = Kind::Plain;
    Class cls = INT;
    Space space = Space::Global;
    u8 count = 1;    // registers of a vector, matrices of ldmatrix, rows of mma
    u8 size = 0;     // bytes of an element in memory
    u8 width = 0;    // bytes of a register
    u8 variant = 0;  // what the function makes of it
    bool acquire = false, release = false;
    bool disabled = false;  // a barrier that was taken out
    const Mma* mma = nullptr;
    u32 target = 0;
    s64 immediate = 0, second_immediate = 0;
    u32 members = ALL_LANES, members_register = NONE;
    u16 latency = 4, issue = 1;  // cycles
    u32 pc = 0, line = 0, loc = 0;
    std::vector<u32> outs, ins;  // registers of vectors, beside d to c
    std::vector<u32> read_slots, written_slots;  // for the timing
    std::string text, opcode;
};

// f(register) for everything an instruction reads; f may change it
template <class I, class F>
void each_read(I& instruction, F f) {
    for (auto* r : {&instruction.guard, &instruction.a, &instruction.b, &instruction.c, &instruction.members_register})
        if (*r != NONE) f(*r);
    for (auto& r : instruction.ins) f(r);
}

template <class I, class F>
void each_written(I& instruction, F f) {
    if (instruction.d != NONE) f(instruction.d);
    for (auto& r : instruction.outs) f(r);
}

enum class Hazard : u8 { ReadAfterWrite, WriteAfterRead, WriteAfterWrite, Uninitialised };
enum class Level : u8 { Blocks, Warps, Lockstep, Lanes, InFlight, Ordered };
extern const char* const hazard_names[];
extern const char* const level_names[];

struct Report {
    Hazard hazard;
    Level level;
    Space space;
    u32 pc1, pc2, block1, block2, thread1, thread2, epoch;
    u64 address;
    u64 count = 0, differing = 0;
    u64 low = ~0ull, high = 0;  // addresses of differing values
};

struct Counters {
    u64 times = 0, lanes = 0;
    u64 got = 0, least = 0;  // sectors of global memory, passes of shared memory
    u64 bytes = 0;
};

struct Options {
    u32 race = 1, counters = 1;
    u32 order = 0, seed = 0;  // order: an Order
    u32 quantum = 0;          // instructions before another warp has its turn, 0: until a barrier
    u32 resident = 1;         // blocks at a time
    u32 poison = 1;
    u32 timing = 0;  // cycles of a load from global memory, 0: no timing
    u32 near = 0;    // of one from where the block has been before, which a cache has; 0: no caches
    u64 max_instructions = 0;
};
enum Order : u32 { FORWARD, REVERSE, RANDOM };

enum class Special : u8 { TidX, NtidX, CtaidX, CtaidY, CtaidZ, NctaidX, NctaidY, NctaidZ, Lane, WarpId, Zero, One };

struct Register {
    enum Sort : u8 { Ordinary, Constant, Special } sort;
    u32 size;           // bytes
    u64 value = 0;      // of a constant; which special one
    u32 offset = NONE;  // in the register file; NONE: never used
};

struct Parameter {
    u32 offset, size;
};

// cycles at a block barrier, by the longest chain of dependences and in the order of the PTX
struct Mark {
    u32 pc;
    double chain, in_order;
};

struct Kernel {
    std::string name;
    std::vector<Instruction> code;
    std::vector<Register> registers;
    std::map<std::string, Parameter> parameters;
    u32 parameter_bytes = 0;
    std::vector<std::string> locs;  // source lines
    std::map<std::string, u64> globals;
    std::vector<std::unique_ptr<u8[]>> global_data;
    std::map<std::string, u32> shared_symbols;
    u32 static_shared = 0;
    u32 register_bytes = 0;  // of a warp
    u32 threads = 0;
    u32 undefined = 0;  // registers that some path reads before it writes them
    int global_shift = 2, shared_shift = 2;  // log2 of the bytes of a shadow cell

    // of all launches
    std::vector<Counters> counters;
    std::map<std::tuple<Hazard, Level, u32, u32, Space>, Report> reports;
    // of the last one
    std::vector<u64> block_counts;    // [block][class]
    std::vector<double> block_times;  // [block][2]
    std::vector<Mark> trace;          // of its last block

    Kernel() = default;
    Kernel(const Kernel&) = delete;
    ~Kernel();
    const std::string& loc(u32 pc) const { return locs[code[pc].loc]; }
    std::string where(u32 pc) const;
};

}  // namespace ptxsim
