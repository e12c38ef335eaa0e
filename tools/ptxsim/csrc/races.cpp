#include "races.h"

#include <algorithm>

namespace ptxsim {

namespace {

bool in_clock(const Clock& clock, const Access& a) {
    const auto found = clock.find(a.block);
    if (found == clock.end()) return false;
    const Visible& seen = found->second;
    return seen.before > a.epoch || (seen.thread == a.thread && seen.up_to >= a.epoch);
}

// one of the two accesses that a report names
struct Actor {
    u32 pc, block, thread;
};

void add_report(Warp& w, Hazard hazard, Level level, Actor first, Actor second, Place place, bool differing) {
    Report& r = w.kernel->reports[{hazard, level, first.pc, second.pc, place.space}];
    if (!r.count || (differing && !r.differing)) {
        // the example shown is one with differing values where there is any
        r.hazard = hazard;
        r.level = level;
        r.space = place.space;
        r.pc1 = first.pc;
        r.pc2 = second.pc;
        r.block1 = first.block;
        r.block2 = second.block;
        r.thread1 = first.thread;
        r.thread2 = second.thread;
        r.epoch = w.block->epoch;
        r.address = place.address;
    }
    r.count++;
    if (!differing) return;
    r.differing++;
    r.low = std::min(r.low, place.address);
    r.high = std::max(r.high, place.address);
}

}  // namespace

void report(Warp& w, Hazard hazard, Level level, const Access& first, const Instruction& I, u32 thread, Place place,
            bool differing) {
    const Actor earlier{first.pc, first.block - w.block->launch->first_block, first.thread};
    add_report(w, hazard, level, earlier, {I.pc, w.block->index, thread}, place, differing);
}

void report_uninitialised(Warp& w, const Instruction& I, u32 thread, u32 offset) {
    const Actor reader{I.pc, w.block->index, thread};
    add_report(w, Hazard::Uninitialised, Level::Ordered, reader, reader, {offset, Space::Shared}, true);
}

void report_in_flight(Warp& w, const Instruction& I, const Copy& copy, Hazard hazard, u32 thread, u32 offset,
                      bool differing) {
    const Actor copier{copy.pc, w.block->index, copy.thread}, other{I.pc, w.block->index, thread};
    add_report(w, hazard, Level::InFlight, copier, other, {offset, Space::Shared}, differing);
}

void join(Clock& into, const Clock& from) {
    for (const auto& [number, seen] : from) {
        Visible& mine = into[number];
        mine.before = std::max(mine.before, seen.before);
        if (seen.up_to >= mine.up_to) {
            mine.thread = seen.thread;
            mine.up_to = seen.up_to;
        }
    }
}

bool visible(const Block& block, const Access& a, u32 thread) {
    return in_clock(block.clock, a) || (block.acquirer == thread && in_clock(block.acquired, a));
}

void acquire(Block& block, u32 thread, u64 address) {
    if (block.acquirer != thread) {
        block.acquired.clear();
        block.acquirer = thread;
    }
    join(block.acquired, block.launch->released[address]);
}

void release(Block& block, u32 thread, u64 address) {
    Clock mine = block.clock;
    join(mine, block.acquired);
    mine[block.number] = {block.epoch, thread, block.epoch};
    join(block.launch->released[address], mine);
}

}  // namespace ptxsim
