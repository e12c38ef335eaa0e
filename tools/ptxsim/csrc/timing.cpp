#include "timing.h"

#include <algorithm>

#include "matrix.h"
#include "parser.h"

namespace ptxsim {

namespace {

constexpr double BARRIER_CYCLES = 12, BRANCH_CYCLES = 8;

// cycles: until the result can be used, and how long a scheduler's share of the unit is taken
struct Cost {
    u32 latency, issue;
};

// a piece of an instruction's name; the first that fits counts
struct Named {
    const char* piece;
    Cost cost;
};

Cost by_name(const std::string& opcode, Cost otherwise, std::initializer_list<Named> named) {
    for (const Named& one : named)
        if (opcode.find(one.piece) != std::string::npos) return one.cost;
    return otherwise;
}

// guesses in the neighbourhood of what is known of an H100
Cost cost_of(const Instruction& I, u32 global_latency) {
    const std::string& o = I.opcode;
    switch (I.cls) {
        case FP64:
            return by_name(o, {8, 2}, {{"div.rn", {120, 40}}, {"sqrt.rn", {110, 36}}, {"rcp.approx", {24, 4}},
                                       {"max.", {14, 5}}, {"min.", {14, 5}}});
        case FP32:
            return by_name(o, {4, 1}, {{"div.full", {24, 4}}, {"div.rn", {60, 12}}, {"sqrt.rn", {50, 10}},
                                       {"approx", {18, 4}}});
        case INT:
            return by_name(o, {4, 2}, {{"mul.lo.s64", {12, 6}}, {"mad.lo.s64", {12, 6}}, {"div", {60, 24}},
                                       {"rem", {60, 24}}, {"64", {8, 4}}});
        case CVT:
            return by_name(o, {6, 2}, {{"u64.u32", {4, 1}}, {"u32.u64", {4, 1}}, {"s64.s32", {4, 1}},
                                       {"f64", {14, 8}}});
        case MOV: return by_name(o, {2, 1}, {{"b64", {2, 0}}});
        case MMA:
            if (I.mma->element == Element::F64) return {40, 64 * I.mma->depth * I.mma->rows / 256};
            return {40, 16};
        case SHUFFLE: return {24, 2};
        case SHARED: return {29, 2};
        case GLOBAL: return {global_latency, 2};
        case ATOMIC: return {700, 2};
        case CONTROL: return {0, I.kind == Kind::Label ? 0u : 1u};
        case PARAM: return {20, 1};
        default: return {4, 1};
    }
}

struct Times {
    double chain = 0, in_order = 0;
};

Times latest(const Block& block) {
    Times t;
    for (const Warp& w : block.warps) {
        t.chain = std::max({t.chain, w.timing.control, w.timing.most});
        t.in_order = std::max(t.in_order, w.timing.last);
    }
    return t;
}

}  // namespace

void set_latencies(Kernel& k, u32 global_latency) {
    for (Instruction& I : k.code) {
        const Cost cost = cost_of(I, global_latency);
        I.latency = u16(cost.latency);
        I.issue = u16(cost.issue);
    }
}

void advance_time(Warp& w, const Instruction& I, double extra) {
    Timing& t = w.timing;
    float chain = float(t.control), in_order = float(t.last);
    for (const u32 slot : I.read_slots) {
        chain = std::max(chain, t.chain[slot]);
        in_order = std::max(in_order, t.in_order[slot]);
    }
    for (const u32 slot : I.written_slots) {
        t.chain[slot] = float(chain + I.latency + extra);
        t.in_order[slot] = float(in_order + I.latency + extra);
    }
    t.last = in_order + I.issue + extra;
    t.most = std::max(t.most, double(chain));
    if (I.kind != Kind::Branch) return;
    t.control = std::max(t.control, double(chain)) + BRANCH_CYCLES;
    t.last += BRANCH_CYCLES;
}

void meet_in_time(Block& block) {
    const Times t = latest(block);
    for (Warp& w : block.warps) {
        w.timing.control = w.timing.most = t.chain + BARRIER_CYCLES;
        w.timing.last = t.in_order + BARRIER_CYCLES;
    }
    block.kernel->trace.push_back({block.warps[0].barrier, t.chain + BARRIER_CYCLES, t.in_order + BARRIER_CYCLES});
}

void keep_time(Block& block) {
    const Times t = latest(block);
    block.kernel->block_times[2 * block.index] = t.chain;
    block.kernel->block_times[2 * block.index + 1] = t.in_order;
}

}  // namespace ptxsim
