// Pieces of PTX text.
#pragma once
#include <string>
#include <vector>

#include "types.h"

namespace ptxsim {

std::string trim(const std::string& s);
// at commas that are in no brackets
std::vector<std::string> split_operands(const std::string& s);
// at each of some characters; empty pieces are kept
std::vector<std::string> split(const std::string& s, const char* separators);
// {a, b} or a
std::vector<std::string> in_braces(const std::string& s);
// what stands between the first and the last character
std::string inside(const std::string& s);
bool starts_with(const std::string& s, const char* start);
// bytes of a type such as f32, 0 where it is none
u32 type_size(const std::string& type);

// base + offset
struct Sum {
    std::string base;
    s64 offset;
};
Sum split_sum(const std::string& s);

}  // namespace ptxsim
