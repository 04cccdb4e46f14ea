// What the Python modules check before work starts. Raises std::invalid_argument.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "params.h"

namespace flowkern {

using Pointer = std::uintptr_t;

inline void* address(Pointer p) { return reinterpret_cast<void*>(p); }

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

inline Type type_of(int code) {
    require(code >= 0 && code <= 3, "the element type must be 0 (fp32), 1 (fp64), 2 (bf16) or 3 (fp16)");
    return Type(code);
}

inline Type state_type(int code) {
    require(code == 0 || code == 1, "a state must be fp32 (0) or fp64 (1)");
    return Type(code);
}

inline Type network_type(int code, Type state) {
    Type type = type_of(code);
    require(state == Type::f32 ? type != Type::f64 : type == Type::f64,
            "the network's output must be fp64 beside an fp64 state, and fp32, bf16 or fp16 beside an fp32 one");
    return type;
}

inline Scale scale_of(int code) {
    require(code >= 0 && code <= 2, "the scale must be 0 (softclamp), 1 (sigmoid) or 2 (additive)");
    return Scale(code);
}

inline void check_sizes(int64_t samples, int64_t pixels, int64_t channels) {
    require(samples >= 0 && pixels >= 0 && channels >= 1, "sizes must not be negative, and channels at least 1");
}

inline void check_couples(int64_t channels) { require(channels % 2 == 0, "a coupling needs an even number of channels"); }

// Arrays of `count` elements; an array without elements may be anywhere.
template <class... P>
inline void check_arrays(int64_t count, P... pointers) {
    require(count == 0 || ((pointers != 0) && ...), "a pointer is null");
}

}  // namespace flowkern
