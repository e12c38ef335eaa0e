// atom and red.
#pragma once
#include <string>

#include "warp.h"

namespace ptxsim {

enum Atomic : u8 { ATOMIC_ADD, ATOMIC_EXCHANGE, ATOMIC_MAX, ATOMIC_MIN, ATOMIC_AND, ATOMIC_OR, ATOMIC_XOR, ATOMIC_CAS };

// null where there is none for the type
Function atomic_function(const std::string& type);

}  // namespace ptxsim
