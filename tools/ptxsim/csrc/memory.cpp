#include "memory.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "counters.h"

namespace ptxsim {

namespace {

// the part of an access that is in a cell
struct Part {
    u32 first, bytes;
    Part(u64 index, u64 offset, u32 size, int shift) {
        const u64 from = std::max(offset, index << shift), to = std::min(offset + size, (index + 1) << shift);
        first = u32(from - offset);
        bytes = u32(to - from);
    }
};

template <class T>
bool near(const u8* one, const u8* other) {
    T x, y;
    memcpy(&x, one, sizeof(T));
    memcpy(&y, other, sizeof(T));
    const T apart = 8 * std::numeric_limits<T>::epsilon() * std::fabs(x);
    return std::isnormal(x) && std::isnormal(y) && std::fabs(x - y) <= apart;
}

// from Triton 3.9 on all lanes that hold a sum store it; where a multiplication was fused into its first addition, each
// has rounded another product (triton issue 7264)
bool roundings_apart(const u8* one, const u8* other, u32 size) {
    return size == 4 ? near<float>(one, other) : size == 8 && near<double>(one, other);
}

}  // namespace

void fault(const Warp& w, const Instruction& I, const std::string& what, u32 lane) {
    throw Error(format("kernel %s, block %u, warp %u, lane %u: %s at %s", w.kernel->name.c_str(), w.block->index, w.id,
                       lane, what.c_str(), w.kernel->where(I.pc).c_str()));
}

Allocation& require_inside(Warp& w, const Instruction& I, u64 address, u32 size, u32 lane, const char* what) {
    Launch& launch = *w.block->launch;
    Allocation* a = launch.last;
    if (!a || !a->holds(address, size)) {
        a = find_allocation(address, size);
        if (!a) {
            const std::string near = describe_neighbours(address);
            fault(w, I, format("out of bounds: %s of %u bytes at 0x%llx, which is in no allocation%s", what, size,
                               (unsigned long long)address, near.c_str()), lane);
        }
        launch.last = a;
    }
    if (launch.options.race) a->need_shadow(w.kernel->global_shift);
    return *a;
}

void require_aligned(Warp& w, const Instruction& I, u64 address, u32 alignment, u32 lane, const char* what) {
    if (address % alignment == 0) return;
    fault(w, I, format("misaligned: %s of %u bytes at 0x%llx", what, alignment, (unsigned long long)address), lane);
}

Allocation& locate(Warp& w, const Instruction& I, u64 address, u32 size, u32 lane, const char* what) {
    Allocation& a = require_inside(w, I, address, size, lane, what);
    require_aligned(w, I, address, size, lane, what);
    return a;
}

u32 locate_shared(Warp& w, const Instruction& I, u32 address, u32 size, u32 lane, const char* what) {
    const size_t all = w.block->shared.size();
    const u32 offset = address - SHARED_BASE;
    if (address < SHARED_BASE || u64(offset) + size > all)
        fault(w, I, format("out of bounds: %s of %u bytes at shared %d of %zu", what, size, s32(offset), all), lane);
    if (offset % size) fault(w, I, format("misaligned: %s of %u bytes at shared %u", what, size, offset), lane);
    return offset;
}

void global_read(Warp& w, const Instruction& I, Allocation& from, u64 address, u32 size, u32 lane) {
    const u64 offset = address - from.begin;
    for (u64 index = offset >> from.shift; index <= (offset + size - 1) >> from.shift; index++)
        note_read<Space::Global>(w, I, from.shadow[index], w.thread(lane), address);
}

void global_write(Warp& w, const Instruction& I, Allocation& to, u64 address, u32 size, u32 lane, const void* values) {
    const u64 offset = address - to.begin;
    for (u64 index = offset >> to.shift; index <= (offset + size - 1) >> to.shift; index++) {
        const Part part(index, offset, size, to.shift);
        const bool changes = memcmp((const u8*)address + part.first, (const u8*)values + part.first, part.bytes) != 0;
        note_write<Space::Global>(w, I, to.shadow[index], w.thread(lane), address, changes);
    }
}

void shared_read(Warp& w, const Instruction& I, u32 offset, u32 size, u32 lane) {
    Block& block = *w.block;
    const int shift = w.kernel->shared_shift;
    const u32 thread = w.thread(lane);
    for (u32 index = offset >> shift; index <= (offset + size - 1) >> shift; index++) {
        Cell& cell = block.shadow[index];
        if (cell.in_flight) {
            const Copy& copy = block.copies[cell.in_flight - 1];
            const Part part(index, offset, size, shift);
            const u32 at = offset + part.first;
            const bool differing = memcmp(&block.shared[at], copy.at(at), part.bytes) != 0;
            report_in_flight(w, I, copy, Hazard::ReadAfterWrite, thread, offset, differing);
        }
        if (cell.write.block != block.number) report_uninitialised(w, I, thread, offset);
        note_read<Space::Shared>(w, I, cell, thread, offset);
    }
}

void shared_write(Warp& w, const Instruction& I, u32 offset, u32 size, u32 lane, const void* values) {
    Block& block = *w.block;
    const int shift = w.kernel->shared_shift;
    const u32 thread = w.thread(lane);
    for (u32 index = offset >> shift; index <= (offset + size - 1) >> shift; index++) {
        Cell& cell = block.shadow[index];
        const Part part(index, offset, size, shift);
        const u8* value = (const u8*)values + part.first;
        const u32 at = offset + part.first;
        if (cell.in_flight) {
            const Copy& copy = block.copies[cell.in_flight - 1];
            const bool differing = memcmp(value, copy.at(at), part.bytes) != 0;
            report_in_flight(w, I, copy, Hazard::WriteAfterWrite, thread, offset, differing);
        }
        bool changes = memcmp(&block.shared[at], value, part.bytes) != 0;
        if (changes && conflict<Space::Shared>(w, cell.write, thread, false) == Level::Lanes) {
            const u32 element = part.first / I.size * I.size;
            changes = !roundings_apart(&block.shared[offset + element], (const u8*)values + element, I.size);
        }
        note_write<Space::Shared>(w, I, cell, thread, offset, changes);
    }
}

namespace {

// a register may be wider than the element
template <class T>
inline void put(u8* registers, u32 width, u32 lane, T value) {
    if (width == sizeof(T)) {
        memcpy(registers + lane * sizeof(T), &value, sizeof(T));
        return;
    }
    const s64 wide = s64(value);
    memcpy(registers + lane * width, &wide, width);
}

template <class T>
inline void gather(const Warp& w, const Instruction& I, u32 lane, T* values) {
    for (u32 j = 0; j < I.count; j++) memcpy(&values[j], w.registers + I.ins[j] + lane * I.width, sizeof(T));
}

template <class T>
inline void scatter(const Warp& w, const Instruction& I, u32 lane, const T* values) {
    for (u32 j = 0; j < I.count; j++) put(w.registers + I.outs[j], I.width, lane, values[j]);
}

template <class T>
void find_addresses(const Warp& w, const Instruction& I, u32 mask, std::array<T, LANES>& addresses) {
    const T* base = w.lanes<T>(I.a);
    each_lane(mask, [&](u32 i) { addresses[i] = base[i] + T(I.immediate); });
}

GlobalAddresses global_addresses(Warp& w, const Instruction& I, u32 mask, u32 size) {
    GlobalAddresses addresses;
    find_addresses(w, I, mask, addresses);
    if (w.block->launch->options.counters) count_sectors(w, I, mask, addresses, size);
    return addresses;
}

SharedAddresses shared_addresses(Warp& w, const Instruction& I, u32 mask, u32 size) {
    SharedAddresses addresses;
    find_addresses(w, I, mask, addresses);
    if (w.block->launch->options.counters) count_passes(w, I, mask, addresses, size);
    return addresses;
}

template <class T>
void load_global(Warp& w, const Instruction& I, u32 mask) {
    const Options& options = w.block->launch->options;
    const u32 size = sizeof(T) * I.count;
    const auto addresses = global_addresses(w, I, mask, size);
    each_lane(mask, [&](u32 i) {
        Allocation& from = locate(w, I, addresses[i], size, i, "read");
        if (options.race) global_read(w, I, from, addresses[i], size, i);
        scatter(w, I, i, (const T*)addresses[i]);
    });
}

template <class T>
void store_global(Warp& w, const Instruction& I, u32 mask) {
    const Options& options = w.block->launch->options;
    const u32 size = sizeof(T) * I.count;
    const auto addresses = global_addresses(w, I, mask, size);
    each_lane(mask, [&](u32 i) {
        Allocation& to = locate(w, I, addresses[i], size, i, "write");
        T values[4];
        gather(w, I, i, values);
        if (options.race) global_write(w, I, to, addresses[i], size, i, values);
        memcpy((void*)addresses[i], values, size);
    });
}

template <class T>
void load_shared(Warp& w, const Instruction& I, u32 mask) {
    const Options& options = w.block->launch->options;
    const u32 size = sizeof(T) * I.count;
    const auto addresses = shared_addresses(w, I, mask, size);
    each_lane(mask, [&](u32 i) {
        const u32 offset = locate_shared(w, I, addresses[i], size, i, "read");
        if (options.race) shared_read(w, I, offset, size, i);
        scatter(w, I, i, (const T*)&w.block->shared[offset]);
    });
}

template <class T>
void store_shared(Warp& w, const Instruction& I, u32 mask) {
    const Options& options = w.block->launch->options;
    const u32 size = sizeof(T) * I.count;
    const auto addresses = shared_addresses(w, I, mask, size);
    each_lane(mask, [&](u32 i) {
        const u32 offset = locate_shared(w, I, addresses[i], size, i, "write");
        T values[4];
        gather(w, I, i, values);
        if (options.race) shared_write(w, I, offset, size, i, values);
        memcpy(&w.block->shared[offset], values, size);
    });
}

template <class T>
Function load_of(Space space) {
    return space == Space::Global ? load_global<T> : load_shared<T>;
}

template <class T>
Function store_of(Space space) {
    return space == Space::Global ? store_global<T> : store_shared<T>;
}

}  // namespace

Function load_function(Space space, u32 size, bool is_signed) {
    switch (size) {
        case 1: return is_signed ? load_of<s8>(space) : load_of<u8>(space);
        case 2: return is_signed ? load_of<s16>(space) : load_of<u16>(space);
        case 4: return is_signed ? load_of<s32>(space) : load_of<u32>(space);
        default: return load_of<u64>(space);
    }
}

Function store_function(Space space, u32 size) {
    switch (size) {
        case 1: return store_of<u8>(space);
        case 2: return store_of<u16>(space);
        case 4: return store_of<u32>(space);
        default: return store_of<u64>(space);
    }
}

void load_parameter(Warp& w, const Instruction& I, u32 mask) {
    const u8* from = w.block->launch->parameters + I.immediate;
    for (u32 j = 0; j < I.count; j++) {
        u64 value = 0;
        memcpy(&value, from + j * I.size, I.size);
        u8* to = w.registers + I.outs[j];
        each_lane(mask, [&](u32 i) { memcpy(to + i * I.width, &value, I.width); });
    }
}

}  // namespace ptxsim
