// The parser: registers, numbers, addresses.
#include <cctype>
#include <cstdlib>

#include "parser.h"
#include "warp.h"

namespace ptxsim {

using std::string;

u32 Parser::new_register(Register::Sort sort, u32 size, u64 value) {
    k.registers.push_back({sort, size, value});
    return u32(k.registers.size()) - 1;
}

// .reg .b32 %r<9>, %x
void Parser::declare_registers(const string& declaration) {
    const size_t dot = declaration.find('.', 4), end = declaration.find_first_of(" \t", dot);
    const u32 size = type_size(declaration.substr(dot + 1, end - dot - 1));
    need(size && size <= 8, "register type");
    for (const string& name : split_operands(declaration.substr(end))) {
        const size_t bracket = name.find('<');
        if (bracket == string::npos) scopes.back().names[name] = new_register(Register::Ordinary, size);
        else scopes.back().ranges[name.substr(0, bracket)] = {size, u32(atoi(name.c_str() + bracket + 1))};
    }
}

// NONE where it is none
u32 Parser::find_register(const string& name) {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
        const auto known = scope->names.find(name);
        if (known != scope->names.end()) return known->second;
        if (digits == 0 || digits == name.size()) continue;
        const auto range = scope->ranges.find(name.substr(0, digits));
        if (range == scope->ranges.end() || u32(atoi(name.c_str() + digits)) >= range->second.count) continue;
        return scope->names[name] = new_register(Register::Ordinary, range->second.size);
    }
    return NONE;
}

u32 Parser::find_special(const string& name) {
    static const std::map<string, Special> known = {
        {"%tid.x", Special::TidX},       {"%tid.y", Special::Zero},       {"%tid.z", Special::Zero},
        {"%ntid.x", Special::NtidX},     {"%ntid.y", Special::One},       {"%ntid.z", Special::One},
        {"%ctaid.x", Special::CtaidX},   {"%ctaid.y", Special::CtaidY},   {"%ctaid.z", Special::CtaidZ},
        {"%nctaid.x", Special::NctaidX}, {"%nctaid.y", Special::NctaidY}, {"%nctaid.z", Special::NctaidZ},
        {"%laneid", Special::Lane},      {"%warpid", Special::WarpId},
    };
    const auto seen = specials.find(name);
    if (seen != specials.end()) return seen->second;
    const auto found = known.find(name);
    if (found == known.end()) return NONE;
    return specials[name] = new_register(Register::Special, 4, u64(found->second));
}

u32 Parser::constant(u64 value, u32 size) {
    const auto key = std::make_pair(value, size);
    const auto known = constants.find(key);
    if (known != constants.end()) return known->second;
    return constants[key] = new_register(Register::Constant, size, value);
}

// 0f3F800000, 0d3FF0000000000000, -12, 0x1FU
bool Parser::number(const string& s, u32 size, u64& value) const {
    if (s.empty()) return false;
    const char prefix = s[0] == '0' && s.size() > 1 ? char(tolower(s[1])) : ' ';
    if ((prefix == 'f' && s.size() == 10) || (prefix == 'd' && s.size() == 18)) {
        if (size != (prefix == 'f' ? 4 : 8)) refuse("a float of another width: " + s);
        value = strtoull(s.c_str() + 2, nullptr, 16);
        return true;
    }
    const bool negative = s[0] == '-';
    string digits = s.substr(negative);
    if (digits.empty() || !isdigit(digits[0])) return false;
    if (digits.back() == 'U') digits.pop_back();
    char* end;
    value = strtoull(digits.c_str(), &end, 0);
    if (*end) return false;
    if (negative) value = 0 - value;
    if (size < 8) value &= (u64(1) << (8 * size)) - 1;
    return true;
}

u32 Parser::source(const string& s, u32 size) {
    u64 value;
    if (size == 1 && (s == "0" || s == "1" || s == "-1")) return constant(s != "0", 1);
    if (number(s, size, value)) return constant(value, size);
    u32 r = find_register(s);
    if (r == NONE) r = find_special(s);
    if (r == NONE) {
        const Sum sum = split_sum(s);
        const auto symbol = k.shared_symbols.find(sum.base);
        if (symbol != k.shared_symbols.end()) return constant(u64(SHARED_BASE + symbol->second + sum.offset), size);
        const auto global = k.globals.find(sum.base);
        if (global != k.globals.end()) return constant(global->second + u64(sum.offset), size);
        refuse("unknown operand " + s);
    }
    const u32 have = k.registers[r].size;
    if (have != size) refuse(format("operand %s is %u bytes wide, the instruction wants %u", s.c_str(), have, size));
    return r;
}

u32 Parser::destination(const string& s, u32 size) {
    if (s == "_") return new_register(Register::Ordinary, size);
    const u32 r = find_register(s);
    if (r == NONE) refuse("unknown destination " + s);
    const u32 have = k.registers[r].size;
    if (have != size)
        refuse(format("destination %s is %u bytes wide, the instruction wants %u", s.c_str(), have, size));
    return r;
}

void Parser::sources(Instruction& I, const strings& names, u32 size) {
    for (const string& name : names) I.ins.push_back(source(name, size));
}

void Parser::destinations(Instruction& I, const strings& names, u32 size) {
    for (const string& name : names) I.outs.push_back(destination(name, size));
}

u32 Parser::width_of(const string& name, u32 element) {
    u64 value;
    if (name == "_" || number(name, element, value)) return element;
    const u32 r = find_register(name);
    if (r == NONE) refuse("unknown operand " + name);
    return k.registers[r].size;
}

u32 Parser::address(const string& s, Space space, s64& offset) {
    need(s[0] == '[', "an address is expected");
    const Sum sum = split_sum(inside(s));
    offset = sum.offset;
    return source(sum.base, space == Space::Global ? 8 : 4);
}

// the lanes that take part in a warp-wide instruction
void Parser::members(Instruction& I, const string& s, bool in_register) {
    u64 value;
    if (number(s, 4, value)) I.members = u32(value);
    else if (in_register) I.members_register = source(s, 4);
    else refuse("a member mask in a register");
}

}  // namespace ptxsim
