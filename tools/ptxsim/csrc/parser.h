// Reads PTX text into a kernel. What is not known is refused.
#pragma once
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "program.h"
#include "text.h"

namespace ptxsim {

class Parser {
public:
    Parser(Kernel& kernel, const std::string& text) : k(kernel), text(text) {}
    void run();

private:
    using string = std::string;
    using strings = std::vector<string>;

    // names of registers between braces: single ones, and %r<n> before each is used
    struct Range {
        u32 size, count;
    };
    struct Scope {
        std::map<string, Range> ranges;
        std::map<string, u32> names;
    };
    struct Jump {
        u32 pc;
        string label;
    };
    // one statement in pieces: @guard name.part.part operand, operand;
    struct Statement {
        string text, opcode;
        strings parts, operands;
        Instruction I;
    };

    Kernel& k;
    const string& text;
    size_t at = 0;
    u32 line = 1;
    string current;  // the statement, for messages
    std::vector<Scope> scopes;
    std::map<string, u32> labels;
    std::vector<Jump> jumps;
    std::map<std::pair<u64, u32>, u32> constants;  // registers by value and size
    std::map<string, u32> specials;

    [[noreturn]] void refuse(const string& what) const;
    void need(bool condition, const char* what) const {
        if (!condition) refuse(what);
    }

    // the module (parse_module.cpp)
    void skip_to(size_t end);
    size_t find(char c) const;
    void module_line(const string& first_line);
    void entry();
    void body_item();
    void location(const string& line_text);
    void parameter(const string& declaration);
    void global(const string& declaration);
    void shared(const string& declaration);

    // operands (parse_operands.cpp)
    u32 new_register(Register::Sort sort, u32 size, u64 value = 0);
    void declare_registers(const string& declaration);
    u32 find_register(const string& name);
    u32 find_special(const string& name);
    u32 constant(u64 value, u32 size);
    bool number(const string& s, u32 size, u64& value) const;
    u32 source(const string& s, u32 size);
    u32 destination(const string& s, u32 size);
    void sources(Instruction& I, const strings& names, u32 size);
    void destinations(Instruction& I, const strings& names, u32 size);
    // bytes of a register, or of a number in its place
    u32 width_of(const string& name, u32 element);
    // the register of [register + offset]
    u32 address(const string& s, Space space, s64& offset);
    void members(Instruction& I, const string& s, bool in_register);

    // instructions (parse_instructions.cpp, parse_memory.cpp)
    void statement(const string& s);
    void push(Statement& s);
    void need_operands(const Statement& s, size_t count) const;
    void allow(const Statement& s, std::initializer_list<const char*> parts) const;
    bool control(Statement& s);
    void barrier(Statement& s);
    void shuffle(Statement& s);
    void redux(Statement& s);
    void vote(Statement& s);
    void mma(Statement& s);
    bool mov_vector(Statement& s);
    bool convert_narrow(Statement& s);
    void by_table(Statement& s);
    void load_store(Statement& s);
    void load_parameter(Statement& s);
    void matrix(Statement& s);
    void atomic(Statement& s);
    void async(Statement& s);
    void source_size(Statement& s, const string& operand);
};

// registers to places in the register file by their live ranges, so that a warp's registers fit a cache
void place_registers(Kernel& kernel);
// estimates of latencies, for Options::timing
void set_latencies(Kernel& kernel, u32 global_latency);

}  // namespace ptxsim
