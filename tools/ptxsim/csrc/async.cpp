#include "async.h"

#include "counters.h"
#include "memory.h"

namespace ptxsim {

namespace {

u32 keep(Block& block, const Copy& copy) {
    if (block.free_copies.empty()) {
        block.copies.push_back(copy);
        return u32(block.copies.size()) - 1;
    }
    const u32 entry = block.free_copies.back();
    block.free_copies.pop_back();
    block.copies[entry] = copy;
    return entry;
}

// f(cell, offset) for the cells that a copy writes: whole ones, they have at most 4 bytes
template <class F>
void each_cell(Block& block, const Copy& copy, F f) {
    const int shift = block.kernel->shared_shift;
    for (u32 at = copy.shared; at < copy.shared + copy.size; at += 1u << shift) f(block.shadow[at >> shift], at);
}

bool changes(const Block& block, const u8* old, const Copy& copy, u32 at) {
    return memcmp(old, copy.at(at), size_t(1) << block.kernel->shared_shift) != 0;
}

// its bytes may be written at any time from here on
void note_issue(Warp& w, const Instruction& I, u32 entry) {
    Block& block = *w.block;
    const Copy& copy = block.copies[entry];
    each_cell(block, copy, [&](Cell& cell, u32 at) {
        if (cell.in_flight) {
            const Copy& other = block.copies[cell.in_flight - 1];
            const bool differing = changes(block, other.at(at), copy, at);
            report_in_flight(w, I, other, Hazard::WriteAfterWrite, copy.thread, copy.shared, differing);
        }
        const bool differing = changes(block, &block.shared[at], copy, at);
        check_write<Space::Shared>(w, I, cell, copy.thread, copy.shared, differing, false);
        cell.in_flight = entry + 1;
    });
}

void finish(Warp& w, u32 entry) {
    Block& block = *w.block;
    const Copy& copy = block.copies[entry];
    const Instruction& I = w.kernel->code[copy.pc];
    if (block.launch->options.race)
        each_cell(block, copy, [&](Cell& cell, u32 at) {
            record_write(w, I, cell, copy.thread, changes(block, &block.shared[at], copy, at), false);
            if (cell.in_flight == entry + 1) cell.in_flight = 0;
        });
    memcpy(&block.shared[copy.shared], copy.data.data(), copy.size);
    block.free_copies.push_back(entry);
}

// a lane's copies of the groups before one
void finish_before(Warp& w, u32 lane, u32 group) {
    std::deque<u32>& pending = w.copies[lane];
    while (!pending.empty() && w.block->copies[pending.front()].group < group) {
        finish(w, pending.front());
        pending.pop_front();
    }
}

u32 source_bytes(Warp& w, const Instruction& I, u32 lane) {
    if (I.variant == WHOLE_SOURCE) return I.size;
    if (I.variant == IGNORE_SOURCE) return w.lanes<u8>(I.b)[lane] ? 0 : I.size;
    const u32 size = w.lanes<u32>(I.b)[lane];
    if (size > I.size) fault(w, I, format("a source of %u bytes for %u", size, I.size), lane);
    return size;
}

}  // namespace

// a: source, c: destination; what the source does not fill is zeros
void copy_async(Warp& w, const Instruction& I, u32 mask) {
    Block& block = *w.block;
    const Options& options = block.launch->options;
    const u32* to = w.lanes<u32>(I.c);
    const u64* from = w.lanes<u64>(I.a);
    GlobalAddresses asked{};
    u32 asking = 0;
    each_lane(mask, [&](u32 i) {
        const u32 size = source_bytes(w, I, i);
        Copy copy{I.pc, 0, u16(w.thread(i)), I.size, w.groups[i], {}};
        copy.shared = locate_shared(w, I, to[i] + u32(I.second_immediate), I.size, i, "asynchronous write");
        if (size) {
            const u64 source = from[i] + u64(I.immediate);
            Allocation& a = require_inside(w, I, source, size, i, "asynchronous read");
            require_aligned(w, I, source, I.size, i, "asynchronous read");
            if (options.race) global_read(w, I, a, source, size, i);
            memcpy(copy.data.data(), (const void*)source, size);
            asked[i] = source;
            asking |= 1u << i;
        }
        const u32 entry = keep(block, copy);
        w.copies[i].push_back(entry);
        if (options.race) note_issue(w, I, entry);
    });
    if (options.counters) count_sectors(w, I, asking, asked, I.size);
}

void commit_group(Warp& w, const Instruction&, u32 mask) {
    each_lane(mask, [&](u32 i) { w.groups[i]++; });
}

void wait_group(Warp& w, const Instruction& I, u32 mask) {
    each_lane(mask, [&](u32 i) {
        if (w.groups[i] > I.immediate) finish_before(w, i, w.groups[i] - u32(I.immediate));
    });
}

void wait_all(Warp& w, const Instruction&, u32 mask) {
    each_lane(mask, [&](u32 i) { finish_before(w, i, w.groups[i] + 1); });
}

}  // namespace ptxsim
