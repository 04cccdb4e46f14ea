// Numbers of lower precision to and from fp32, rounding to nearest even, without branches.
#pragma once
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace flowkern::FLOWKERN_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
// A number of bf16 as the fp32 number that it is, for processors that multiply those faster.
struct Widened {
    float value;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline void convert(float from, float& to) { to = from; }
inline void convert(double from, double& to) { to = from; }

inline void convert(BFloat16 from, float& to) { to = float_of(uint32_t(from.bits) << 16); }

inline void convert(float from, BFloat16& to) {
    uint32_t bits = bits_of(from);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline void convert(float from, Widened& to) {
    BFloat16 number;
    convert(from, number);
    convert(number, to.value);
}
inline void convert(BFloat16 from, Widened& to) { convert(from, to.value); }
inline void convert(Widened from, BFloat16& to) { to.bits = uint16_t(bits_of(from.value) >> 16); }

inline void convert(Float16 from, float& to) {
    uint32_t sign = uint32_t(from.bits & 0x8000) << 16, magnitude = from.bits & 0x7FFF;
    // Exponents differ by 112; the product is exact, for subnormal numbers too.
    float value = float_of(magnitude << 13) * float_of(uint32_t(127 + 112) << 23);
    uint32_t bits = magnitude >= 0x7C00 ? (magnitude << 13) | 0x7F800000 : bits_of(value);
    to = float_of(bits | sign);
}

inline void convert(float from, Float16& to) {
    uint32_t bits = bits_of(from), sign = (bits >> 16) & 0x8000;
    bits &= 0x7FFFFFFF;
    // Subnormal results: adding 0.5 puts the unit of fp16's subnormals at the last place of the sum.
    uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    uint32_t normal = (bits - (uint32_t(112) << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
    uint32_t special = bits > 0x7F800000 ? 0x7E00 : 0x7C00;
    uint32_t result = bits < 0x38800000 ? subnormal : normal;
    to.bits = uint16_t((bits >= 0x477FF000 ? special : result) | sign);
}

}  // namespace flowkern::FLOWKERN_ISA
