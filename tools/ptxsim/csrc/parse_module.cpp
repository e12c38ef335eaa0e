// The parser: the module around the kernel, its labels and source lines.
#include <cctype>
#include <cstdio>
#include <cstdlib>

#include "allocations.h"
#include "parser.h"

namespace ptxsim {

using std::string;

void Parser::refuse(const string& what) const {
    throw Error(format("PTX line %u: %s%s%s", line, what.c_str(), current.empty() ? "" : ": ", current.c_str()));
}

void Parser::skip_to(size_t end) {
    for (; at < end; at++) line += text[at] == '\n';
}

// from here on, or the end of the text
size_t Parser::find(char c) const {
    const size_t found = text.find(c, at);
    return found == string::npos ? text.size() : found;
}

void Parser::run() {
    k.locs.push_back("?");
    while (true) {
        while (at < text.size() && isspace(text[at])) skip_to(at + 1);
        if (at == text.size()) break;
        current.clear();
        const size_t end_of_line = find('\n');
        if (text.compare(at, 2, "//") == 0) skip_to(end_of_line);
        else if (scopes.empty()) module_line(text.substr(at, end_of_line - at));
        else body_item();
    }
    for (const Jump& jump : jumps) {
        const auto label = labels.find(jump.label);
        if (label == labels.end()) throw Error("unknown label " + jump.label);
        k.code[jump.pc].target = label->second;
    }
    if (k.code.empty()) throw Error("no code");
    k.counters.assign(k.code.size(), Counters());
    place_registers(k);
}

void Parser::module_line(const string& first_line) {
    current = first_line;
    if (starts_with(first_line, ".extern .shared")) {
        const size_t bracket = first_line.find('['), space = first_line.find_last_of(" \t", bracket);
        k.shared_symbols[first_line.substr(space + 1, bracket - space - 1)] = NONE;  // behind all others
        return skip_to(find('\n'));
    }
    if (starts_with(first_line, ".global") || starts_with(first_line, ".shared")) {
        const size_t end = find(';');
        const string declaration = text.substr(at, end - at);
        if (starts_with(declaration, ".global")) global(declaration);
        else shared(declaration);
        return skip_to(end + 1);
    }
    if (first_line.find(".func") != string::npos && first_line.find(".extern") == string::npos)
        refuse("functions are not implemented");
    if (first_line.find(".entry") != string::npos) return entry();
    if (starts_with(first_line, ".section")) return skip_to(std::min(find('}') + 1, text.size()));
    skip_to(find('\n'));
}

void Parser::entry() {
    if (!k.name.empty()) refuse("more than one entry");
    const size_t brace = find('{');
    const string head = text.substr(at, brace - at);
    const size_t name = head.find(".entry") + 6, open = head.find('(');
    k.name = trim(head.substr(name, open - name));
    if (open != string::npos)
        for (const string& declaration : split_operands(head.substr(open + 1, head.find(')') - open - 1)))
            parameter(declaration);
    for (auto& symbol : k.shared_symbols)
        if (symbol.second == NONE) symbol.second = round_up(k.static_shared, 128);
    const size_t threads = head.find(".reqntid");
    if (threads != string::npos) k.threads = u32(atoi(head.c_str() + threads + 8));
    scopes.emplace_back();
    skip_to(brace + 1);
}

void Parser::body_item() {
    if (text[at] == '{') {
        scopes.emplace_back();
        return skip_to(at + 1);
    }
    if (text[at] == '}') {
        scopes.pop_back();
        return skip_to(at + 1);
    }
    if (text.compare(at, 4, ".loc") == 0) {
        const size_t end = find('\n');
        location(text.substr(at, end - at));
        return skip_to(end);
    }
    size_t word = at;
    while (word < text.size() && (isalnum(text[word]) || strchr("_$.", text[word]))) word++;
    if (text.compare(word, 1, ":") == 0 && text.compare(word, 2, "::") != 0) {
        Statement s;
        const string name = text.substr(at, word - at);
        labels[name] = u32(k.code.size());
        s.text = name + ":";
        s.opcode = "label";
        s.I.kind = Kind::Label;
        s.I.cls = CONTROL;
        // nothing jumps to those of the debug information
        if (!starts_with(name, "$L__tmp") && !starts_with(name, "$L__func")) push(s);
        return skip_to(word + 1);
    }
    const size_t end = find(';');
    const string s = text.substr(at, end - at);
    if (s.find("//") != string::npos) refuse("a comment inside a statement");
    statement(s);
    skip_to(end + 1);
}

// .loc 1 23 7 // file.py:23:7 @[ ... ]
void Parser::location(const string& line_text) {
    const size_t comment = line_text.find("//");
    if (comment != string::npos) {
        k.locs.push_back(trim(line_text.substr(comment + 2)));
        return;
    }
    int file = 0, row = 0, column = 0;
    sscanf(line_text.c_str() + 4, "%d %d %d", &file, &row, &column);
    k.locs.push_back(format("%d:%d:%d", file, row, column));
}

// .param .u64 .ptr .global .align 1 name, or .param .align 8 .b8 name[n]
void Parser::parameter(const string& declaration) {
    std::vector<string> words;
    for (const string& word : split(declaration, " \t\n"))
        if (!word.empty()) words.push_back(word);
    need(words.size() >= 3, "parameter");
    string name = words.back();
    u32 size = type_size(words[1].substr(1)), alignment = size;
    if (words[1] == ".align") {
        const size_t bracket = name.find('[');
        need(bracket != string::npos, "parameter");
        alignment = u32(atoi(words[2].c_str()));
        size = u32(atoi(name.c_str() + bracket + 1));
        name = name.substr(0, bracket);
    }
    need(size && alignment, "parameter type");
    k.parameter_bytes = round_up(k.parameter_bytes, alignment);
    k.parameters[name] = {k.parameter_bytes, size};
    k.parameter_bytes += size;
}

namespace {

// .global .align 4 .b8 name[n]
struct Array {
    string name;
    u32 element, count;
};

Array parse_array(const string& declaration) {
    const size_t bracket = declaration.find('['), space = declaration.find_last_of(" \t", bracket);
    if (bracket == string::npos || space == string::npos) return {"", 0, 0};
    const size_t dot = declaration.find_last_of('.', space);
    return {declaration.substr(space + 1, bracket - space - 1),
            type_size(trim(declaration.substr(dot + 1, space - dot - 1))),
            u32(atoi(declaration.c_str() + bracket + 1))};
}

}  // namespace

void Parser::global(const string& declaration) {
    const Array array = parse_array(declaration);
    need(array.element, "global symbol");
    const u32 count = std::max(array.count, 1u), size = count * array.element;
    std::unique_ptr<u8[]> data(new u8[size + 16]());
    const size_t equals = declaration.find('=');
    if (equals != string::npos) {
        const auto values = in_braces(trim(declaration.substr(equals + 1)));
        for (u32 i = 0; i < values.size() && i < count; i++) {
            const u64 value = strtoull(values[i].c_str(), nullptr, 0);
            memcpy(data.get() + i * array.element, &value, array.element);
        }
    }
    k.globals[array.name] = u64(data.get());
    add_allocation(u64(data.get()), size);
    k.global_data.push_back(std::move(data));
}

void Parser::shared(const string& declaration) {
    const Array array = parse_array(declaration);
    need(array.element, "shared symbol");
    if (!scopes.empty())
        for (const auto& symbol : k.shared_symbols)
            if (symbol.second == round_up(k.static_shared, 128))
                refuse("shared symbols inside the kernel beside dynamic ones");
    const size_t align = declaration.find(".align");
    const u32 alignment = align == string::npos ? 16 : u32(atoi(declaration.c_str() + align + 6));
    const u32 begin = round_up(k.static_shared, alignment);
    k.shared_symbols[array.name] = begin;
    k.static_shared = begin + array.count * array.element;
}

}  // namespace ptxsim
