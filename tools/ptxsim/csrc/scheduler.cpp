// Runs a warp: its fragments by turns, the one with the lowest pc first, so that they meet again.
#include <immintrin.h>

#include <algorithm>

#include "timing.h"
#include "warp.h"

namespace ptxsim {

namespace {

// the lanes whose predicate is 1; those of a register never written are 0xff, below 0
u32 true_lanes(const u8* predicates) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(predicates));
    return u32(_mm256_movemask_epi8(_mm256_cmpgt_epi8(values, _mm256_setzero_si256())));
}

class Scheduler {
public:
    Scheduler(Warp& warp, u64 quantum)
        : w(warp), k(*warp.kernel), block(*warp.block), options(block.launch->options) {
        left = quantum ? quantum : ~0ull;
        // a loop without divergence never comes back here by itself
        if (options.max_instructions) left = std::min(left, options.max_instructions + 1 - w.step);
    }

    void run() {
        while (left && !w.at_barrier) {
            if (w.fragments.empty()) {
                w.done = true;
                return;
            }
            merge();
            choose();
            run_fragment();
            if (options.max_instructions && w.step > options.max_instructions)
                throw Error(format("kernel %s: more than %llu instructions in a warp", k.name.c_str(),
                                   (unsigned long long)options.max_instructions));
        }
    }

private:
    Warp& w;
    Kernel& k;
    Block& block;
    const Options& options;
    u64 left;     // instructions
    size_t best;  // the fragment that runs
    u32 pc, active;
    u32 other;  // the lowest place from here on where another fragment is
    bool alone;

    // those at one place become one
    void merge() {
        auto& f = w.fragments;
        for (size_t i = 0; i < f.size(); i++)
            for (size_t j = i + 1; j < f.size();) {
                if (f[i].pc != f[j].pc) {
                    j++;
                    continue;
                }
                f[i].mask |= f[j].mask;
                f[i].blocked = false;
                f.erase(f.begin() + s64(j));
            }
    }

    void choose() {
        const auto& f = w.fragments;
        best = f.size();
        for (size_t i = 0; i < f.size(); i++)
            if (!f[i].blocked && (best == f.size() || f[i].pc < f[best].pc)) best = i;
        if (best == f.size()) refuse_deadlock();
        pc = f[best].pc;
        active = f[best].mask;
        alone = f.size() == 1;
        other = NONE;
        for (size_t i = 0; i < f.size(); i++)
            if (i != best && f[i].pc >= pc) other = std::min(other, f[i].pc);
    }

    [[noreturn]] void refuse_deadlock() const {
        std::string where;
        for (const Fragment& f : w.fragments) where += format(" [mask %08x at %s]", f.mask, k.where(f.pc).c_str());
        throw Error(format("kernel %s, block %u, warp %u: lanes wait for each other (a warp-wide or block-wide "
                           "instruction in divergent code):%s", k.name.c_str(), block.index, w.id, where.c_str()));
    }

    // until another fragment may have its turn
    void run_fragment() {
        bool go_on = true;
        while (go_on) {
            const Instruction& I = k.code[pc];
            u32 mask = active;
            if (I.guard != NONE) {
                const u32 guard = true_lanes(w.registers + I.guard);
                mask &= I.guard_negated ? ~guard : guard;
            }
            switch (I.kind) {
                case Kind::Plain: go_on = plain(I, mask); break;
                case Kind::WarpWide: go_on = warp_wide(I, mask); break;
                case Kind::Label: go_on = label(); break;
                case Kind::Branch: go_on = branch(I, mask); break;
                case Kind::Return: go_on = leave(I, mask); break;
                case Kind::BlockBarrier: go_on = block_barrier(I, mask); break;
            }
        }
    }

    void count(const Instruction& I, u32 mask) {
        Counters& counters = k.counters[I.pc];
        counters.times++;
        counters.lanes += u32(__builtin_popcount(mask));
        block.counts[I.cls]++;
        w.step++;
    }

    bool stop_at(u32 place) {
        w.fragments[best].pc = place;
        return false;
    }

    bool wait_here() {
        w.fragments[best].blocked = true;
        return stop_at(pc);
    }

    bool next() {
        pc++;
        return --left || stop_at(pc);
    }

    bool plain(const Instruction& I, u32 mask) {
        count(I, mask);
        if (options.timing) {
            const Counters& c = k.counters[I.pc];
            const u64 before = c.got - c.least;
            if (mask) I.run(w, I, mask);
            advance_time(w, I, double(c.got - c.least - before) + cached(I));
        } else if (mask) {
            I.run(w, I, mask);
        }
        return next();
    }

    // what a cache saves of an instruction's latency, below 0
    double cached(const Instruction& I) const {
        return I.cls == GLOBAL && options.near && w.timing.near ? double(options.near) - double(options.timing) : 0;
    }

    bool warp_wide(const Instruction& I, u32 mask) {
        u32 members = I.members;
        if (I.members_register != NONE) members = w.lanes<u32>(I.members_register)[__builtin_ctz(active)];
        const u32 wanted = members & ~w.exited;
        if (I.guard == NONE && (mask & wanted) != wanted) return wait_here();
        if ((I.cls == MMA || I.cls == SHARED) && mask != ALL_LANES)
            fault(w, I, "a warp-wide instruction without all lanes", 0);
        if (mask & ~members) fault(w, I, "a lane that is not in the member mask", u32(__builtin_ctz(mask & ~members)));
        count(I, mask);
        if (options.timing) advance_time(w, I, 0);
        if (mask) {
            I.run(w, I, mask);
            w.epoch++;
        }
        return next();
    }

    bool label() {
        if (pc >= other) return stop_at(pc);
        pc++;
        return true;
    }

    bool branch(const Instruction& I, u32 mask) {
        if (options.timing) advance_time(w, I, 0);
        count(I, mask);
        left--;
        if (mask && mask != active) {
            w.fragments[best].mask = active & ~mask;
            stop_at(pc + 1);
            w.fragments.push_back({I.target, mask, false});
            return false;
        }
        pc = mask ? I.target : pc + 1;
        return (alone && left) || stop_at(pc);
    }

    bool leave(const Instruction& I, u32 mask) {
        count(I, mask);
        w.exited |= mask;
        active &= ~mask;
        for (Fragment& f : w.fragments) f.blocked = false;
        if (!active) {
            w.fragments.erase(w.fragments.begin() + s64(best));
            return false;
        }
        w.fragments[best].mask = active;
        return stop_at(pc + 1);
    }

    bool block_barrier(const Instruction& I, u32 mask) {
        if (I.disabled || !mask) {
            pc++;
            return true;
        }
        if (mask != active) fault(w, I, "a block barrier for some lanes only", 0);
        if (mask != ~w.exited) return wait_here();
        count(I, ALL_LANES);
        w.at_barrier = true;
        w.barrier = pc;
        return stop_at(pc + 1);
    }
};

}  // namespace

void run_warp(Warp& w, u64 quantum) { Scheduler(w, quantum).run(); }

}  // namespace ptxsim
