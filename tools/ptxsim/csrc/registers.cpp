// Registers to places in the register file: liveness over the blocks of the code, then one interval a register.
#include <algorithm>
#include <queue>

#include "parser.h"

namespace ptxsim {

namespace {

class Bits {
public:
    explicit Bits(size_t count) : words((count + 63) / 64) {}
    bool has(u32 i) const { return words[i / 64] >> (i % 64) & 1; }
    void add(u32 i) { words[i / 64] |= u64(1) << (i % 64); }
    template <class F>
    void each(F f) const {
        for (size_t x = 0; x < words.size(); x++)
            for (u64 rest = words[x]; rest; rest &= rest - 1) f(u32(x * 64) + u32(__builtin_ctzll(rest)));
    }
    std::vector<u64> words;
};

// code without a jump or a label inside
struct Straight {
    u32 begin, end;
    std::vector<u32> next;
    Bits in, out, used, defined;
    Straight(u32 begin, size_t registers)
        : begin(begin), end(begin), in(registers), out(registers), used(registers), defined(registers) {}
};

std::vector<Straight> straight_parts(const Kernel& k) {
    const u32 count = u32(k.code.size());
    std::vector<bool> first(count + 1);
    first[0] = true;
    for (u32 i = 0; i < count; i++) {
        const Instruction& I = k.code[i];
        if (I.kind == Kind::Label) first[i] = true;
        if (I.kind == Kind::Branch || I.kind == Kind::Return) first[i + 1] = true;
        if (I.kind == Kind::Branch) first[I.target] = true;
    }
    std::vector<Straight> parts;
    std::vector<u32> part_of(count);
    for (u32 i = 0; i < count; i++) {
        if (first[i]) parts.emplace_back(i, k.registers.size());
        part_of[i] = u32(parts.size()) - 1;
        parts.back().end = i + 1;
    }
    for (u32 p = 0; p < parts.size(); p++) {
        const Instruction& last = k.code[parts[p].end - 1];
        const bool leaves = last.kind == Kind::Branch || last.kind == Kind::Return;
        if (last.kind == Kind::Branch) parts[p].next.push_back(part_of[last.target]);
        if ((!leaves || last.guard != NONE) && p + 1 < parts.size()) parts[p].next.push_back(p + 1);
    }
    return parts;
}

void find_live(const Kernel& k, std::vector<Straight>& parts) {
    for (Straight& part : parts)
        for (u32 i = part.begin; i < part.end; i++) {
            const auto use = [&](u32 r) {
                if (!part.defined.has(r)) part.used.add(r);
            };
            const Instruction& I = k.code[i];
            each_read(I, use);
            // a guarded write may leave the old value in place
            if (I.guard != NONE) each_written(I, use);
            else each_written(I, [&](u32 r) { part.defined.add(r); });
        }
    for (bool changed = true; changed;) {
        changed = false;
        for (auto part = parts.rbegin(); part != parts.rend(); ++part)
            for (size_t x = 0; x < part->in.words.size(); x++) {
                u64 out = 0;
                for (const u32 next : part->next) out |= parts[next].in.words[x];
                const u64 in = part->used.words[x] | (out & ~part->defined.words[x]);
                changed |= out != part->out.words[x] || in != part->in.words[x];
                part->out.words[x] = out;
                part->in.words[x] = in;
            }
    }
}

// first and last instruction; parts of the code that a register lives through are covered whole
struct Interval {
    u32 first = NONE, last = 0;
    void cover(u32 i) {
        first = std::min(first, i);
        last = std::max(last, i);
    }
};

std::vector<Interval> intervals(const Kernel& k, const std::vector<Straight>& parts) {
    std::vector<Interval> of(k.registers.size());
    for (const Straight& part : parts) {
        part.in.each([&](u32 r) { of[r].cover(part.begin); });
        part.out.each([&](u32 r) { of[r].cover(part.end - 1); });
        for (u32 i = part.begin; i < part.end; i++) {
            const auto cover = [&](u32 r) { of[r].cover(i); };
            each_read(k.code[i], cover);
            each_written(k.code[i], cover);
        }
    }
    return of;
}

// offsets for all that are used; constants and special registers keep theirs to the end
void assign_offsets(Kernel& k, const std::vector<Interval>& of) {
    u32 top = 0;
    const auto fresh = [&](u32 size) {
        const u32 offset = top;
        top += LANES * std::max(size, 2u);
        return offset;
    };
    std::vector<u32> order;
    for (u32 r = 0; r < k.registers.size(); r++) {
        if (k.registers[r].sort != Register::Ordinary) k.registers[r].offset = fresh(k.registers[r].size);
        else if (of[r].first != NONE) order.push_back(r);
    }
    std::stable_sort(order.begin(), order.end(), [&](u32 a, u32 b) { return of[a].first < of[b].first; });
    using Ending = std::pair<u32, u32>;  // last instruction, register
    std::priority_queue<Ending, std::vector<Ending>, std::greater<Ending>> live;
    std::vector<u32> freed[9];  // by bytes of a lane
    for (const u32 r : order) {
        while (!live.empty() && live.top().first < of[r].first) {
            const Register& ended = k.registers[live.top().second];
            freed[ended.size].push_back(ended.offset);
            live.pop();
        }
        Register& mine = k.registers[r];
        std::vector<u32>& free = freed[mine.size];
        if (free.empty()) {
            mine.offset = fresh(mine.size);
        } else {
            mine.offset = free.back();
            free.pop_back();
        }
        live.push({of[r].last, r});
    }
    k.register_bytes = round_up(top, 64);
}

}  // namespace

void place_registers(Kernel& k) {
    std::vector<Straight> parts = straight_parts(k);
    find_live(k, parts);
    parts[0].in.each([&](u32 r) { k.undefined += k.registers[r].sort == Register::Ordinary; });
    assign_offsets(k, intervals(k, parts));
    for (Instruction& I : k.code) {
        each_read(I, [&](u32& r) { I.read_slots.push_back((r = k.registers[r].offset) / LANES); });
        each_written(I, [&](u32& r) { I.written_slots.push_back((r = k.registers[r].offset) / LANES); });
    }
}

}  // namespace ptxsim
