// The parser: instructions that access memory.
#include <algorithm>
#include <set>

#include "async.h"
#include "atomics.h"
#include "matrix.h"
#include "memory.h"
#include "parser.h"

namespace ptxsim {

using std::string;

namespace {

void at_most(int& shift, u32 size) { shift = std::min(shift, size == 1 ? 0 : size == 2 ? 1 : 2); }

}  // namespace

void Parser::load_store(Statement& s) {
    // of no consequence here: all accesses are weak, caches are not modelled
    static const std::set<string> hints = {"weak", "nc", "cs", "cg", "ca", "wb", "wt", "cta",
                                           "L1::evict_last", "L1::evict_first", "L1::no_allocate",
                                           "L1::evict_unchanged", "L1::evict_normal", "L2::evict_first",
                                           "L2::evict_last"};
    Instruction& I = s.I;
    const bool load = s.parts[0] == "ld";
    const string space = s.parts.size() > 1 ? s.parts[1] : "", type = s.parts.back();
    if (space != "param" && space != "global" && space != "shared") refuse("not implemented: " + s.opcode);
    for (size_t i = 2; i + 1 < s.parts.size(); i++) {
        if (s.parts[i] == "v2" || s.parts[i] == "v4") I.count = u8(s.parts[i][1] - '0');
        else if (!hints.count(s.parts[i])) refuse("modifier ." + s.parts[i] + " is not implemented");
    }
    need_operands(s, 2);
    I.size = u8(type_size(type));
    need(I.size, "type");
    const auto names = in_braces(s.operands[load ? 0 : 1]);
    need(names.size() == I.count, "vector length");
    I.width = u8(width_of(names[0], I.size));
    for (const string& name : names) need(width_of(name, I.size) == I.width, "registers of different widths");
    need(I.width >= I.size, "register narrower than the access");
    if (load) destinations(I, names, I.width);
    else sources(I, names, I.width);
    if (space == "param") return load_parameter(s);
    I.space = space == "global" ? Space::Global : Space::Shared;
    I.cls = I.space == Space::Global ? GLOBAL : SHARED;
    I.a = address(s.operands[load ? 1 : 0], I.space, I.immediate);
    I.run = load ? load_function(I.space, I.size, type[0] == 's') : store_function(I.space, I.size);
    at_most(I.space == Space::Global ? k.global_shift : k.shared_shift, I.size);
    push(s);
}

void Parser::load_parameter(Statement& s) {
    need(s.parts[0] == "ld", "a parameter is stored to");
    const Sum sum = split_sum(inside(s.operands[1]));
    const auto parameter = k.parameters.find(sum.base);
    need(parameter != k.parameters.end(), "unknown parameter");
    s.I.immediate = parameter->second.offset + sum.offset;
    s.I.run = ptxsim::load_parameter;
    s.I.cls = PARAM;
    push(s);
}

void Parser::matrix(Statement& s) {
    Instruction& I = s.I;
    const bool load = s.parts[0] == "ldmatrix";
    allow(s, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16"});
    need_operands(s, 2);
    for (const string& part : s.parts) {
        if (part == "x2" || part == "x4") I.count = u8(part[1] - '0');
        if (part == "trans") I.variant = 1;
    }
    if (I.variant) at_most(k.shared_shift, 2);
    const auto names = in_braces(s.operands[load ? 0 : 1]);
    need(names.size() == I.count, "vector length");
    if (load) destinations(I, names, 4);
    else sources(I, names, 4);
    I.a = address(s.operands[load ? 1 : 0], Space::Shared, I.immediate);
    I.run = load ? load_matrix : store_matrix;
    I.space = Space::Shared;
    I.kind = Kind::WarpWide;
    I.cls = SHARED;
    push(s);
}

void Parser::atomic(Statement& s) {
    static const std::map<string, Atomic> variants = {
        {"add", ATOMIC_ADD}, {"exch", ATOMIC_EXCHANGE}, {"max", ATOMIC_MAX}, {"min", ATOMIC_MIN},
        {"and", ATOMIC_AND}, {"or", ATOMIC_OR},         {"xor", ATOMIC_XOR}, {"cas", ATOMIC_CAS}};
    static const std::set<string> others = {"global", "shared", "gpu", "sys", "cta",
                                            "relaxed", "acquire", "release", "acq_rel"};
    Instruction& I = s.I;
    const string type = s.parts.back();
    bool found = false;
    for (size_t i = 1; i + 1 < s.parts.size(); i++) {
        const string& part = s.parts[i];
        const auto variant = variants.find(part);
        if (part == "acquire" || part == "acq_rel") I.acquire = true;
        if (part == "release" || part == "acq_rel") I.release = true;
        if (part == "shared") I.space = Space::Shared;
        if (variant != variants.end()) I.variant = variant->second;
        else if (!others.count(part)) refuse("modifier ." + part + " is not implemented");
        found |= variant != variants.end();
    }
    I.run = atomic_function(type);
    if (!found || !I.run) refuse("not implemented: " + s.opcode);
    const bool result = s.parts[0] == "atom", swap = I.variant == ATOMIC_CAS;
    need_operands(s, size_t(2 + result + swap));
    const u32 size = type_size(type);
    if (result) I.d = destination(s.operands[0], size);
    I.a = address(s.operands[result], I.space, I.immediate);
    I.b = source(s.operands[1u + result], size);
    if (swap) I.c = source(s.operands[2u + result], size);
    I.cls = ATOMIC;
    push(s);
}

// cp.async.ca.shared.global [to], [from], bytes{, bytes of the source}; and what orders them
void Parser::async(Statement& s) {
    Instruction& I = s.I;
    u64 value = 0;
    I.cls = GLOBAL;
    if (s.opcode == "cp.async.commit_group" || s.opcode == "cp.async.wait_all") {
        need_operands(s, 0);
        I.run = s.opcode == "cp.async.wait_all" ? wait_all : commit_group;
        I.cls = CONTROL;
        return push(s);
    }
    if (s.opcode == "cp.async.wait_group") {
        need_operands(s, 1);
        need(number(s.operands[0], 4, value), "groups in a register");
        I.immediate = s64(value);
        I.run = wait_group;
        I.cls = CONTROL;
        return push(s);
    }
    if (s.parts.size() < 5 || (s.parts[2] != "ca" && s.parts[2] != "cg")) refuse("not implemented: " + s.opcode);
    allow(s, {"async", "ca", "cg", "shared", "global", "L2::64B", "L2::128B", "L2::256B"});
    need(s.operands.size() == 3 || s.operands.size() == 4, "operands");
    need(number(s.operands[2], 4, value) && (value == 4 || value == 8 || value == 16), "bytes of a copy");
    need(value == 16 || s.parts[2] == "ca", "cp.async.cg copies 16 bytes");
    I.size = u8(value);
    I.c = address(s.operands[0], Space::Shared, I.second_immediate);
    I.a = address(s.operands[1], Space::Global, I.immediate);
    if (s.operands.size() == 4) source_size(s, s.operands[3]);
    I.run = copy_async;
    push(s);
}

// a number of bytes, or a predicate: true for none
void Parser::source_size(Statement& s, const string& operand) {
    const u32 r = find_register(operand);
    const bool ignore = r != NONE && k.registers[r].size == 1;
    s.I.variant = ignore ? IGNORE_SOURCE : SOURCE_SIZE;
    s.I.b = source(operand, ignore ? 1 : 4);
}

}  // namespace ptxsim
