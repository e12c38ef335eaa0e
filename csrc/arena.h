// Scratch memory of a caller's buffer, handed out in steps of 64 bytes.
#pragma once
#include <cstddef>

#include "vec.h"

namespace reflora {
namespace REFLORA_ISA {

struct Arena {
    char* next;
    template <class T>
    T* take(size_t count) {
        T* p = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

}  // namespace REFLORA_ISA
}  // namespace reflora
