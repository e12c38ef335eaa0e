#include "allocations.h"

#include <map>
#include <mutex>

namespace ptxsim {

namespace {

// never destroyed: tensors may outlive it
auto& allocations = *new std::map<u64, std::unique_ptr<Allocation>>;
std::mutex guard;
u32 next_block = 1;
constexpr u32 LAST_BLOCK = 0xf0000000;

UnknownHook unknown_hook = nullptr;

Allocation* search(u64 address, u64 bytes) {
    std::lock_guard<std::mutex> lock(guard);
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return nullptr;
    Allocation* found = std::prev(after)->second.get();
    return found->holds(address, bytes) ? found : nullptr;
}

}  // namespace

void add_allocation(u64 begin, u64 size) {
    if (!size) return;
    std::lock_guard<std::mutex> lock(guard);
    auto place = allocations.lower_bound(begin);
    if (place != allocations.end() && place->first == begin && place->second->size == size) return;
    // what another allocator has freed without a word may lie there still
    if (place != allocations.begin() && std::prev(place)->second->holds(begin, 1)) --place;
    while (place != allocations.end() && place->first < begin + size) place = allocations.erase(place);
    allocations[begin].reset(new Allocation{begin, size, nullptr});
}

void remove_allocation(u64 begin) {
    std::lock_guard<std::mutex> lock(guard);
    allocations.erase(begin);
}

Allocation* find_allocation(u64 address, u64 bytes) {
    Allocation* found = search(address, bytes);
    if (found || !unknown_hook) return found;
    unknown_hook(address);
    return search(address, bytes);
}

std::string describe_neighbours(u64 address) {
    std::lock_guard<std::mutex> lock(guard);
    std::string text;
    const auto after = allocations.upper_bound(address);
    if (after != allocations.begin()) {
        const Allocation& a = *std::prev(after)->second;
        text += format("; %lld bytes past the end of [0x%llx, +%llu)", (long long)(address - a.begin - a.size),
                       (unsigned long long)a.begin, (unsigned long long)a.size);
    }
    if (after != allocations.end()) {
        const Allocation& a = *after->second;
        text += format("; %lld bytes before [0x%llx, +%llu)", (long long)(a.begin - address),
                       (unsigned long long)a.begin, (unsigned long long)a.size);
    }
    return text;
}

void Allocation::make_shadow(int wanted) {
    shift = wanted;
    // zeros without touching the pages
    shadow.reset(static_cast<Cell*>(calloc(((size + 8) >> shift) + 2, sizeof(Cell))));
    if (!shadow) throw Error("out of memory for a shadow");
}

u32 number_blocks(u32 count) {
    if (next_block > LAST_BLOCK) {
        std::lock_guard<std::mutex> lock(guard);
        for (auto& entry : allocations) entry.second->shadow.reset();
        next_block = 1;
    }
    const u32 first = next_block;
    next_block += count;
    return first;
}

void set_unknown_hook(UnknownHook hook) { unknown_hook = hook; }

}  // namespace ptxsim
