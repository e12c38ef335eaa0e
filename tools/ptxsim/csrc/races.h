// Which accesses nothing orders, by the shadow of each piece of memory.
#pragma once
#include "warp.h"

namespace ptxsim {

struct Place {
    u64 address;
    Space space;
};

// whether a block may rely on having seen another's access
bool visible(const Block& block, const Access& a, u32 thread);
void report(Warp& w, Hazard hazard, Level level, const Access& first, const Instruction& I, u32 thread, Place place,
            bool differing);
// both in shared memory; the second: an access to what an asynchronous copy is about to write
void report_uninitialised(Warp& w, const Instruction& I, u32 thread, u32 offset);
void report_in_flight(Warp& w, const Instruction& I, const Copy& copy, Hazard hazard, u32 thread, u32 offset,
                      bool differing);

// what an atomic that acquires sees from here on, and what one that releases shows
void acquire(Block& block, u32 thread, u64 address);
void release(Block& block, u32 thread, u64 address);

inline u32 warp_of(const Access& a) { return a.thread / LANES; }

// in this block, since its last barrier
inline bool is_recent(const Warp& w, const Access& a) {
    return a.block == w.block->number && a.epoch == w.block->epoch;
}

// what stands between an earlier access and one now, Ordered where something orders them
template <Space space>
inline Level conflict(const Warp& w, const Access& a, u32 thread, bool atomic) {
    const Block& block = *w.block;
    if (a.block == block.number) {
        if (a.thread == thread || a.epoch != block.epoch || (atomic && a.atomic)) return Level::Ordered;
        if (warp_of(a) != w.id) return Level::Warps;
        if (a.step == w.step) return Level::Lanes;
        return a.warp_epoch == w.epoch ? Level::Lockstep : Level::Ordered;
    }
    if (space == Space::Shared || a.block < block.launch->first_block || (atomic && a.atomic)) return Level::Ordered;
    return visible(block, a, thread) ? Level::Ordered : Level::Blocks;
}

template <Space space>
inline void note_read(Warp& w, const Instruction& I, Cell& cell, u32 thread, u64 address) {
    const Level level = conflict<space>(w, cell.write, thread, false);
    if (level != Level::Ordered)
        report(w, Hazard::ReadAfterWrite, level, cell.write, I, thread, {address, space}, cell.write.changes);
    const Access& read = cell.read;
    if (is_recent(w, read) && warp_of(read) == w.id) {
        if (read.warp_epoch != w.epoch) cell.several = false;
        if (read.thread != thread) cell.several = true;
    } else {
        cell.earlier_read = read;
        cell.several = false;
    }
    cell.read = {w.block->number, w.block->epoch, w.epoch, w.step, I.pc, u16(thread), false, false};
}

// a write after a read
template <Space space>
inline void check_read(Warp& w, const Instruction& I, const Access& read, bool several, u32 thread, u64 address,
                       bool changes) {
    Level level = conflict<space>(w, read, thread, false);
    // the thread's own read hides those of other lanes
    if (level == Level::Ordered && several && is_recent(w, read) && warp_of(read) == w.id &&
        read.warp_epoch == w.epoch && read.step != w.step)
        level = Level::Lockstep;
    if (level != Level::Ordered && level != Level::Lanes)
        report(w, Hazard::WriteAfterRead, level, read, I, thread, {address, space}, changes);
}

// the two halves of a write: an asynchronous copy is checked when it is issued, recorded when it is waited for.
// changes: whether the value becomes another
template <Space space>
inline void check_write(Warp& w, const Instruction& I, const Cell& cell, u32 thread, u64 address, bool changes,
                        bool atomic) {
    const Level level = conflict<space>(w, cell.write, thread, atomic);
    if (level != Level::Ordered && (level != Level::Lanes || changes))
        report(w, Hazard::WriteAfterWrite, level, cell.write, I, thread, {address, space}, changes);
    check_read<space>(w, I, cell.read, cell.several, thread, address, changes);
    check_read<space>(w, I, cell.earlier_read, false, thread, address, changes);
}

inline void record_write(Warp& w, const Instruction& I, Cell& cell, u32 thread, bool changes, bool atomic) {
    // a change stays one until the next barrier, whatever is written over it
    const bool changed = changes || (is_recent(w, cell.write) && cell.write.changes);
    cell.write = {w.block->number, w.block->epoch, w.epoch, w.step, I.pc, u16(thread), changed, atomic};
}

template <Space space>
inline void note_write(Warp& w, const Instruction& I, Cell& cell, u32 thread, u64 address, bool changes,
                       bool atomic = false) {
    check_write<space>(w, I, cell, thread, address, changes, atomic);
    record_write(w, I, cell, thread, changes, atomic);
}

}  // namespace ptxsim
