// The C interface. Text lives until the next call that returns text in the same thread.
#include <algorithm>
#include <cstdio>

#include "json.h"
#include "parser.h"
#include "warp.h"

namespace ptxsim {

namespace {

thread_local std::string result;

const char* give(Json& json) {
    result = std::move(json.text);
    return result.c_str();
}

u32 shared_bytes(const Kernel& k, u32 dynamic) {
    u32 begin = k.static_shared;
    for (const auto& symbol : k.shared_symbols) begin = std::max(begin, symbol.second);
    return begin + dynamic;
}

void write_report(Json& json, const Kernel& k, const Report& r) {
    const Instruction &one = k.code[r.pc1], &two = k.code[r.pc2];
    const bool race = r.hazard != Hazard::Uninitialised;
    json.member("kernel", k.name);
    json.member("kind", hazard_names[int(r.hazard)]);
    json.member("level", race ? level_names[int(r.level)] : "");
    json.member("space", r.space == Space::Shared ? "shared" : "global");
    json.member("count", r.count);
    json.member("differing", r.differing);
    json.member("addr", r.address);
    json.member("low", r.low);
    json.member("high", r.high);
    json.member("epoch", r.epoch);
    json.member("block1", r.block1);
    json.member("block2", r.block2);
    json.member("thread1", r.thread1);
    json.member("thread2", r.thread2);
    json.member("line1", one.line);
    json.member("line2", two.line);
    json.member("text1", one.text);
    json.member("text2", two.text);
    json.member("loc1", k.loc(r.pc1));
    json.member("loc2", k.loc(r.pc2));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

Kernel* ps_compile(const char* text, char* error, size_t capacity) {
    auto kernel = std::make_unique<Kernel>();
    try {
        Parser(*kernel, text).run();
    } catch (const std::exception& e) {
        snprintf(error, capacity, "%s", e.what());
        return nullptr;
    }
    return kernel.release();
}

void ps_free(Kernel* k) { delete k; }
void ps_set_threads(Kernel* k, u32 threads) { k->threads = threads; }
// registers that some path reads before it writes them
u32 ps_undefined(const Kernel* k) { return k->undefined; }

// [[offset, bytes], ...]
const char* ps_parameters(const Kernel* k) {
    std::vector<std::pair<u32, u32>> all;
    for (const auto& parameter : k->parameters) all.emplace_back(parameter.second.offset, parameter.second.size);
    std::sort(all.begin(), all.end());
    Json json;
    json.array([&] {
        for (const auto& [offset, size] : all) json.array([&] { json.values(offset, size); });
    });
    return give(json);
}

// 0, or 1 with a message
int ps_launch(Kernel* k, u32 x, u32 y, u32 z, const u8* parameters, u32 dynamic_shared, const Options* options,
              char* error, size_t capacity) {
    const u32 blocks = x * y * z;
    Launch launch{k, *options, {x, y, z}, number_blocks(blocks), shared_bytes(*k, dynamic_shared), parameters, {},
                  std::mt19937_64(options->seed)};
    k->block_counts.assign(size_t(blocks) * CLASSES, 0);
    if (options->timing) {
        k->block_times.assign(size_t(blocks) * 2, 0);
        set_latencies(*k, options->timing);
    }
    try {
        run_launch(launch);
    } catch (const std::exception& e) {
        snprintf(error, capacity, "%s", e.what());
        return 1;
    }
    return 0;
}

const char* ps_reports(Kernel* k, int clear) {
    Json json;
    json.array([&] {
        for (const auto& entry : k->reports) json.object([&] { write_report(json, *k, entry.second); });
    });
    if (clear) k->reports.clear();
    return give(json);
}

// by instruction: line, class, opcode, times, lanes, got, least, bytes, source line, text
const char* ps_stats(Kernel* k, int clear) {
    Json json;
    json.array([&] {
        for (const Instruction& I : k->code) {
            const Counters& c = k->counters[I.pc];
            if (!c.times) continue;
            json.array([&] {
                json.values(I.line, class_names[I.cls], I.opcode, c.times, c.lanes, c.got, c.least, c.bytes,
                            k->loc(I.pc), I.text);
            });
        }
    });
    if (clear) k->counters.assign(k->code.size(), Counters());
    return give(json);
}

// of the last launch: instructions, [block][class]
const u64* ps_block_counts(const Kernel* k) { return k->block_counts.data(); }
// of the last launch with timing: cycles, [block][longest chain, in order]
const double* ps_times(const Kernel* k) { return k->block_times.data(); }

// of its last block, by block barrier: line, longest chain, in order, source line
const char* ps_trace(const Kernel* k) {
    Json json;
    json.array([&] {
        for (const Mark& mark : k->trace)
            json.array([&] { json.values(k->code[mark.pc].line, mark.chain, mark.in_order, k->loc(mark.pc)); });
    });
    return give(json);
}

void ps_register(u64 begin, u64 size) { add_allocation(begin, size); }
void ps_unregister(u64 begin) { remove_allocation(begin); }
void ps_set_unknown_hook(UnknownHook hook) { set_unknown_hook(hook); }

const char* ps_classes() {
    Json json;
    json.array([&] {
        for (const char* name : class_names) json.value(name);
    });
    return give(json);
}

// by block barrier: pc, line, times, source line
const char* ps_barriers(const Kernel* k) {
    Json json;
    json.array([&] {
        for (const Instruction& I : k->code)
            if (I.kind == Kind::BlockBarrier)
                json.array([&] { json.values(I.pc, I.line, k->counters[I.pc].times, k->loc(I.pc)); });
    });
    return give(json);
}

void ps_disable(Kernel* k, u32 pc, int off) { k->code[pc].disabled = off; }

}  // extern "C"
#pragma GCC visibility pop

}  // namespace ptxsim
