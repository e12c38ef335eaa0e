#include "text.h"

#include <cctype>
#include <cstdlib>

namespace ptxsim {

using std::string;

string trim(const string& s) {
    const size_t first = s.find_first_not_of(" \t\r\n");
    if (first == string::npos) return "";
    return s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}

std::vector<string> split_operands(const string& s) {
    std::vector<string> operands;
    string operand;
    int depth = 0;
    for (const char c : s) {
        if (c == '{' || c == '[') depth++;
        if (c == '}' || c == ']') depth--;
        if (c == ',' && !depth) {
            operands.push_back(trim(operand));
            operand.clear();
        } else {
            operand += c;
        }
    }
    operand = trim(operand);
    if (!operand.empty()) operands.push_back(operand);
    return operands;
}

std::vector<string> split(const string& s, const char* separators) {
    std::vector<string> parts;
    for (size_t at = 0;;) {
        const size_t end = s.find_first_of(separators, at);
        parts.push_back(s.substr(at, end - at));
        if (end == string::npos) return parts;
        at = end + 1;
    }
}

std::vector<string> in_braces(const string& s) {
    if (s[0] != '{') return {s};
    return split_operands(inside(s));
}

string inside(const string& s) { return s.size() < 2 ? "" : trim(s.substr(1, s.size() - 2)); }

bool starts_with(const string& s, const char* start) { return s.rfind(start, 0) == 0; }

u32 type_size(const string& type) {
    if (type == "pred") return 1;
    if (type == "f16" || type == "bf16") return 2;
    if (type == "f16x2" || type == "bf16x2") return 4;
    if (type.size() < 2 || !strchr("bsuf", type[0])) return 0;
    for (size_t i = 1; i < type.size(); i++)
        if (!isdigit(type[i])) return 0;
    const int bits = atoi(type.c_str() + 1);
    return bits == 8 || bits == 16 || bits == 32 || bits == 64 ? u32(bits) / 8 : 0;
}

Sum split_sum(const string& s) {
    const size_t plus = s.find('+');
    if (plus == string::npos) return {trim(s), 0};
    return {trim(s.substr(0, plus)), strtoll(s.c_str() + plus + 1, nullptr, 0)};
}

}  // namespace ptxsim
