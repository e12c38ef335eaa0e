#include "program.h"

#include <cstdarg>
#include <cstdio>

#include "allocations.h"

namespace ptxsim {

const char* const class_names[CLASSES] = {"fp64", "fp32", "fp16", "int", "cvt", "mov", "mma", "shuffle", "shared",
                                          "global", "atomic", "barrier", "control", "predicate", "param"};
const char* const hazard_names[] = {"read after write", "write after read", "write after write", "uninitialised read"};
const char* const level_names[] = {"between blocks", "between warps", "in a warp", "in one instruction",
                                   "of a copy in flight"};

std::string format(const char* pattern, ...) {
    va_list arguments, again;
    va_start(arguments, pattern);
    va_copy(again, arguments);
    std::string text(size_t(vsnprintf(nullptr, 0, pattern, arguments)), '\0');
    vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(again);
    va_end(arguments);
    return text;
}

std::string Kernel::where(u32 pc) const {
    return format("PTX line %u `%s` (%s)", code[pc].line, code[pc].text.c_str(), loc(pc).c_str());
}

Kernel::~Kernel() {
    for (const auto& global : globals) remove_allocation(global.second);
}

}  // namespace ptxsim
