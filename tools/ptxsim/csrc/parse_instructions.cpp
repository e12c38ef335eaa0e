// The parser: instructions that do not access memory.
#include <algorithm>
#include <set>

#include "conversions.h"
#include "exchange.h"
#include "matrix.h"
#include "parser.h"
#include "table.h"

namespace ptxsim {

using std::string;

void Parser::statement(const string& given) {
    Statement s;
    s.text = trim(given);
    std::replace_if(s.text.begin(), s.text.end(), [](char c) { return c == '\t' || c == '\n'; }, ' ');
    if (s.text.empty()) return;
    current = s.text;
    if (starts_with(s.text, ".reg")) return declare_registers(s.text);
    if (starts_with(s.text, ".shared")) return shared(s.text);
    if (starts_with(s.text, ".pragma")) return;
    need(s.text[0] != '.', "directive");
    string rest = s.text;
    if (rest[0] == '@') {
        const size_t space = rest.find(' ');
        s.I.guard_negated = rest[1] == '!';
        const size_t name = s.I.guard_negated ? 2 : 1;
        s.I.guard = source(rest.substr(name, space - name), 1);
        rest = trim(rest.substr(space));
    }
    const size_t space = rest.find(' ');
    s.opcode = rest.substr(0, space);
    // without clusters, "shared" is the shared memory of the block
    const string own = "shared::cta";
    for (size_t at; (at = s.opcode.find(own)) != string::npos;) s.opcode.replace(at, own.size(), "shared");
    s.parts = split(s.opcode, ".");
    if (space != string::npos) s.operands = split_operands(rest.substr(space));

    const string& name = s.parts[0];
    if (control(s)) return;
    if (name == "bar" || name == "barrier") return barrier(s);
    if (name == "ld" || name == "st") return load_store(s);
    if (name == "ldmatrix" || name == "stmatrix") return matrix(s);
    if (starts_with(s.opcode, "cp.async")) return async(s);
    if (name == "atom" || name == "red") return atomic(s);
    if (name == "shfl") return shuffle(s);
    if (name == "redux") return redux(s);
    if (name == "vote") return vote(s);
    if (name == "mma") return mma(s);
    if (name == "mov" && mov_vector(s)) return;
    if (name == "cvt" && convert_narrow(s)) return;
    by_table(s);
}

void Parser::push(Statement& s) {
    s.I.pc = u32(k.code.size());
    s.I.line = line;
    s.I.loc = u32(k.locs.size()) - 1;
    s.I.text = s.text;
    s.I.opcode = s.opcode;
    k.code.push_back(s.I);
}

void Parser::need_operands(const Statement& s, size_t count) const {
    if (s.operands.size() != count) refuse(format("%zu operands, expected %zu", s.operands.size(), count));
}

void Parser::allow(const Statement& s, std::initializer_list<const char*> parts) const {
    for (size_t i = 1; i < s.parts.size(); i++)
        if (std::find(parts.begin(), parts.end(), s.parts[i]) == parts.end())
            refuse("modifier ." + s.parts[i] + " is not implemented");
}

bool Parser::control(Statement& s) {
    if (s.parts[0] == "bra") {
        allow(s, {"uni"});
        need_operands(s, 1);
        s.I.kind = Kind::Branch;
        jumps.push_back({u32(k.code.size()), s.operands[0]});
    } else if (s.parts[0] == "ret" || s.parts[0] == "exit") {
        s.I.kind = Kind::Return;
    } else {
        return false;
    }
    s.I.cls = CONTROL;
    push(s);
    return true;
}

void Parser::barrier(Statement& s) {
    static const std::set<string> block_wide = {"bar.sync", "barrier.sync", "barrier.sync.aligned",
                                                "barrier.cta.sync.aligned"};
    s.I.cls = BARRIER;
    need_operands(s, 1);
    if (s.opcode == "bar.warp.sync") {
        members(s.I, s.operands[0], false);
        s.I.kind = Kind::WarpWide;
        s.I.run = warp_barrier;
        return push(s);
    }
    if (!block_wide.count(s.opcode)) refuse("not implemented: " + s.opcode);
    need(s.operands[0] == "0", "a barrier other than 0");
    s.I.kind = Kind::BlockBarrier;
    push(s);
}

void Parser::shuffle(Statement& s) {
    static const std::map<string, Shuffle> variants = {{"shfl.sync.bfly.b32", SHUFFLE_BFLY},
                                                       {"shfl.sync.idx.b32", SHUFFLE_IDX},
                                                       {"shfl.sync.up.b32", SHUFFLE_UP},
                                                       {"shfl.sync.down.b32", SHUFFLE_DOWN}};
    const auto variant = variants.find(s.opcode);
    if (variant == variants.end()) refuse("not implemented: " + s.opcode);
    need_operands(s, 5);
    const auto to = split(s.operands[0], "|");
    s.I.variant = variant->second;
    s.I.d = destination(trim(to[0]), 4);
    if (to.size() > 1) s.I.outs.push_back(destination(trim(to[1]), 1));
    s.I.a = source(s.operands[1], 4);
    s.I.b = source(s.operands[2], 4);
    s.I.c = source(s.operands[3], 4);
    members(s.I, s.operands[4], false);
    s.I.kind = Kind::WarpWide;
    s.I.cls = SHUFFLE;
    s.I.run = ptxsim::shuffle;
    push(s);
}

void Parser::redux(Statement& s) {
    s.I.run = redux_function(s.opcode);
    if (!s.I.run) refuse("not implemented: " + s.opcode);
    need_operands(s, 3);
    s.I.d = destination(s.operands[0], 4);
    s.I.a = source(s.operands[1], 4);
    members(s.I, s.operands[2], true);
    s.I.kind = Kind::WarpWide;
    s.I.cls = SHUFFLE;
    push(s);
}

void Parser::vote(Statement& s) {
    static const std::map<string, Vote> variants = {{"vote.sync.any.pred", VOTE_ANY},
                                                    {"vote.sync.all.pred", VOTE_ALL},
                                                    {"vote.sync.ballot.b32", VOTE_BALLOT},
                                                    {"vote.sync.uni.pred", VOTE_UNI}};
    const auto variant = variants.find(s.opcode);
    if (variant == variants.end()) refuse("not implemented: " + s.opcode);
    need_operands(s, 3);
    s.I.variant = variant->second;
    s.I.d = destination(s.operands[0], variant->second == VOTE_BALLOT ? 4 : 1);
    s.I.a = source(s.operands[1], 1);
    members(s.I, s.operands[2], false);
    s.I.kind = Kind::WarpWide;
    s.I.cls = SHUFFLE;
    s.I.run = ptxsim::vote;
    push(s);
}

void Parser::mma(Statement& s) {
    const Mma* shape = find_mma(s.opcode);
    if (!shape) refuse("not implemented: " + s.opcode);
    need_operands(s, 4);
    const auto d = in_braces(s.operands[0]), a = in_braces(s.operands[1]), b = in_braces(s.operands[2]),
               c = in_braces(s.operands[3]);
    need(a.size() == shape->a && b.size() == shape->b && c.size() == shape->c && d.size() == c.size(),
         "fragment sizes");
    sources(s.I, a, shape->bytes);
    sources(s.I, b, shape->bytes);
    sources(s.I, c, shape->bytes);
    destinations(s.I, d, shape->bytes);
    s.I.kind = Kind::WarpWide;
    s.I.cls = MMA;
    s.I.mma = shape;
    s.I.run = shape->run;
    push(s);
}

// mov.b64 {a, b}, c and its opposite
bool Parser::mov_vector(Statement& s) {
    need_operands(s, 2);
    const bool to_parts = s.operands[0][0] == '{', from_parts = s.operands[1][0] == '{';
    if (!to_parts && !from_parts) return false;
    const u32 total = type_size(s.parts.back());
    const auto parts = in_braces(s.operands[to_parts ? 0 : 1]);
    need(total && !parts.empty() && total % parts.size() == 0, "parts of a register");
    s.I.width = u8(total / parts.size());
    if (to_parts) {
        s.I.a = source(s.operands[1], total);
        destinations(s.I, parts, s.I.width);
    } else {
        s.I.d = destination(s.operands[0], total);
        sources(s.I, parts, s.I.width);
    }
    s.I.run = to_parts ? unpack : pack;
    s.I.cls = MOV;
    push(s);
    return true;
}

namespace {

template <class N, class D>
Function narrow_from(u32 from) {
    switch (from) {
        case 2: return unary<Narrow<D, N>, D, u16>;
        case 4: return unary<Narrow<D, N>, D, u32>;
        default: return unary<Narrow<D, N>, D, u64>;
    }
}

template <class N>
Function narrow_function(u32 to, u32 from) {
    switch (to) {
        case 2: return narrow_from<N, s16>(from);
        case 4: return narrow_from<N, s32>(from);
        default: return narrow_from<N, s64>(from);
    }
}

// by the type whose bits are kept and the bytes of the registers
Function narrow_function(const string& type, u32 to, u32 from) {
    if (type == "s8") return narrow_function<s8>(to, from);
    if (type == "u8") return narrow_function<u8>(to, from);
    if (type == "s16") return narrow_function<s16>(to, from);
    if (type == "u16") return narrow_function<u16>(to, from);
    if (type == "s32") return narrow_function<s32>(to, from);
    if (type == "u32") return narrow_function<u32>(to, from);
    return nullptr;
}

}  // namespace

// whole numbers, from a register wider than the type, or of 8 bits
bool Parser::convert_narrow(Statement& s) {
    static const std::set<string> whole = {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"};
    if (s.parts.size() != 3 || !whole.count(s.parts[1]) || !whole.count(s.parts[2])) return false;
    need_operands(s, 2);
    const string &to = s.parts[1], &from = s.parts[2];
    const u32 d = find_register(s.operands[0]), a = find_register(s.operands[1]);
    const bool wider = a != NONE && k.registers[a].size > type_size(from);
    if (type_size(to) != 1 && !wider) return false;
    need(d != NONE && a != NONE, "operands");
    const u32 width = k.registers[d].size;
    need(width == std::max(2u, type_size(to)), "destination of another width");
    // the narrower type decides what is kept and how it is extended
    s.I.run = narrow_function(type_size(to) < type_size(from) ? to : from, width, k.registers[a].size);
    if (!s.I.run) refuse("not implemented: " + s.opcode);
    s.I.d = d;
    s.I.a = a;
    s.I.cls = CVT;
    push(s);
    return true;
}

void Parser::by_table(Statement& s) {
    const Operation* operation = table().find(s.opcode);
    if (!operation) refuse("not implemented: " + s.opcode);
    need_operands(s, size_t(2 + (operation->b > 0) + (operation->c > 0)));
    const auto to = split(s.operands[0], "|");
    need(to.size() == (operation->two_destinations ? 2 : 1), "destinations");
    s.I.d = destination(trim(to[0]), operation->d);
    if (to.size() > 1) s.I.outs.push_back(destination(trim(to[1]), 1));
    s.I.a = source(s.operands[1], operation->a);
    if (operation->b) s.I.b = source(s.operands[2], operation->b);
    if (operation->c) s.I.c = source(s.operands[3], operation->c);
    s.I.run = operation->run;
    s.I.cls = operation->cls;
    push(s);
}

}  // namespace ptxsim
