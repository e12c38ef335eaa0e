// Runs a launch: blocks, a few at a time; their warps by turns; block barriers.
#include <algorithm>
#include <numeric>

#include "timing.h"
#include "warp.h"

namespace ptxsim {

namespace {

u32 special_value(Special special, const Block& block, u32 warp, u32 lane) {
    const auto& grid = block.launch->grid;
    switch (special) {
        case Special::TidX: return warp * LANES + lane;
        case Special::NtidX: return block.kernel->threads;
        case Special::CtaidX: return block.coordinates[0];
        case Special::CtaidY: return block.coordinates[1];
        case Special::CtaidZ: return block.coordinates[2];
        case Special::NctaidX: return grid[0];
        case Special::NctaidY: return grid[1];
        case Special::NctaidZ: return grid[2];
        case Special::Lane: return lane;
        case Special::WarpId: return warp;
        case Special::Zero: return 0;
        case Special::One: return 1;
    }
    return 0;
}

// constants and special registers
void fill_registers(Warp& w) {
    for (const Register& r : w.kernel->registers) {
        if (r.sort == Register::Ordinary) continue;
        for (u32 i = 0; i < LANES; i++) {
            const bool constant = r.sort == Register::Constant;
            const u64 value = constant ? r.value : special_value(Special(r.value), *w.block, w.id, i);
            memcpy(w.registers + r.offset + i * r.size, &value, r.size);
        }
    }
}

std::vector<u32> shuffled(u32 count, Launch& launch) {
    std::vector<u32> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (launch.options.order == REVERSE) std::reverse(order.begin(), order.end());
    if (launch.options.order == RANDOM) std::shuffle(order.begin(), order.end(), launch.random);
    return order;
}

void pass_barrier(Block& block) {
    if (block.launch->options.timing) meet_in_time(block);
    block.epoch++;
    for (Warp& w : block.warps) {
        w.at_barrier = false;
        w.epoch++;
        for (Fragment& f : w.fragments) f.blocked = false;
    }
    if (block.acquirer == NONE) return;
    // what one thread has acquired is visible to all
    join(block.clock, block.acquired);
    block.acquired.clear();
    block.acquirer = NONE;
}

// each warp once; whether the block is done
bool run_block(Block& block) {
    Launch& launch = *block.launch;
    const Options& options = launch.options;
    for (const u32 i : shuffled(u32(block.warps.size()), launch)) {
        Warp& w = block.warps[i];
        if (w.done || w.at_barrier) continue;
        const bool vary = options.quantum && options.order == RANDOM;
        run_warp(w, vary ? 1 + launch.random() % (2 * options.quantum) : options.quantum);
    }
    u32 waiting = 0, done = 0;
    for (const Warp& w : block.warps) {
        waiting += w.at_barrier;
        done += w.done;
    }
    if (done == block.warps.size()) {
        if (options.timing) keep_time(block);
        return true;
    }
    if (waiting + done < block.warps.size()) return false;
    if (done)
        throw Error(format("kernel %s, block %u: %u warps wait at a barrier, %u have ended", block.kernel->name.c_str(),
                           block.index, waiting, done));
    pass_barrier(block);
    return false;
}

}  // namespace

Block::Block(Launch& of, u32 index)
    : launch(&of), kernel(of.kernel), number(of.first_block + index), index(index),
      coordinates{index % of.grid[0], index / of.grid[0] % of.grid[1], index / of.grid[0] / of.grid[1]},
      counts(&of.kernel->block_counts[size_t(index) * CLASSES]) {
    const Options& options = of.options;
    const u8 unwritten = options.poison ? 0xff : 0;
    const u32 count = kernel->threads / LANES;
    const size_t bytes = kernel->register_bytes;
    registers.reset(static_cast<u8*>(aligned_alloc(64, std::max<size_t>(bytes * count, 64))));
    memset(registers.get(), unwritten, bytes * count);
    shared.assign(of.shared_bytes, unwritten);
    if (options.race) shadow.resize((of.shared_bytes >> kernel->shared_shift) + 2);
    if (options.timing) kernel->trace.clear();
    warps.resize(count);
    for (u32 i = 0; i < count; i++) {
        Warp& w = warps[i];
        w.registers = registers.get() + bytes * i;
        w.block = this;
        w.kernel = kernel;
        w.id = i;
        w.fragments = {{0, ALL_LANES, false}};
        fill_registers(w);
        if (!options.timing) continue;
        w.timing.chain.resize(bytes / LANES + 1);
        w.timing.in_order.resize(bytes / LANES + 1);
    }
}

void run_launch(Launch& launch) {
    const u32 blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    const u32 resident = std::max(launch.options.resident, 1u);
    const std::vector<u32> order = shuffled(blocks, launch);
    std::vector<std::unique_ptr<Block>> live;
    u32 next = 0;
    while (next < blocks || !live.empty()) {
        while (live.size() < resident && next < blocks)
            live.push_back(std::make_unique<Block>(launch, order[next++]));
        for (size_t i = 0; i < live.size();) {
            if (run_block(*live[i])) live.erase(live.begin() + s64(i));
            else i++;
        }
    }
}

}  // namespace ptxsim
