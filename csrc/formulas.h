// The per-element mathematics of the coupling: one definition for the CPU's loops and for CUDA's kernels.
//
// Single precision uses polynomials of our own without branches or library calls, so that compilers vectorise loops
// over them; double precision, which serves verification, uses the standard library.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.h"

#ifdef __CUDACC__
#define FLOWKERN_HD __host__ __device__
#else
#define FLOWKERN_HD
#endif

namespace flowkern {
// Internal linkage: the same functions are compiled for several instruction sets, and the linker must not keep one
// instruction set's copy for all of them.
namespace {

FLOWKERN_HD inline float power_of_two(int32_t n) {
    int32_t bits = (n + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// e^x to about one ulp over the whole range: gradual underflow, infinity on overflow, NaN through.
FLOWKERN_HD inline float exponential(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const float magic = 12582912.0f;
    float shifted = x * 1.44269504f + magic;
    float n = shifted - magic;
    // ln 2 in two parts, the first with few bits so that n times it is exact.
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.989099082e-4f;
    p = p * r + 1.393365e-3f;
    p = p * r + 8.333310925e-3f;
    p = p * r + 4.166646493e-2f;
    p = p * r + 1.666666668e-1f;
    p = p * r + 5.000000013e-1f;
    p = 1.0f + (p * (r * r) + r);
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    // 2^n in two factors: n runs from -150 to 128, beyond the exponents of normal numbers.
    int32_t exponent = bits - 0x4B400000, half = exponent >> 1;
    return p * power_of_two(half) * power_of_two(exponent - half);
}

FLOWKERN_HD inline double exponential(double x) { return std::exp(x); }

// log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)): relative precision also for tiny e.
FLOWKERN_HD inline float log1p_unit(float e) {
    float s = e / (2.0f + e), t = s * s;
    float p = 1.161216461e-1f;
    p = p * t + 1.08532879e-1f;
    p = p * t + 1.4296179e-1f;
    p = p * t + 1.999985317e-1f;
    p = p * t + 3.333333366e-1f;
    return 2.0f * (s + s * t * p);
}

FLOWKERN_HD inline double log1p_unit(double e) { return std::log1p(e); }

// tanh(u), given e = exp(-2 |u|) and r = 1 / (1 + e): a polynomial where 1 - e would cancel.
FLOWKERN_HD inline float tanh_from(float u, float e, float r) {
    float a = u < 0 ? -u : u, t = a * a;
    float p = -6.94294175e-3f;
    p = p * t + 2.147068303e-2f;
    p = p * t - 5.393346915e-2f;
    p = p * t + 1.333322578e-1f;
    p = p * t - 3.33333328e-1f;
    float small = a + a * t * p, large = (1.0f - e) * r;
    float value = a < 0.5f ? small : large;
    return u < 0 ? -value : value;
}

FLOWKERN_HD inline double tanh_from(double u, double, double) { return std::tanh(u); }

// What the coupling needs of its scale map at one raw value. Unused members cost nothing once inlined.
template <class T>
struct ScaleTerms {
    T log_s;      // log s(raw)
    T s;          // s(raw)
    T inverse_s;  // 1 / s(raw)
    T slope;      // d log s / d raw
};

template <Scale S, class T>
FLOWKERN_HD inline ScaleTerms<T> scale_terms(T raw, T alpha, T inverse_alpha) {
    if constexpr (S == Scale::softclamp) {
        T u = raw * inverse_alpha;
        T e = exponential(T(-2) * (u < 0 ? -u : u)), r = T(1) / (T(1) + e);
        T log_s = alpha * tanh_from(u, e, r);
        return {log_s, exponential(log_s), exponential(-log_s), T(4) * e * r * r};
    } else {
        T u = raw + T(2);
        T e = exponential(u < 0 ? u : -u), r = T(1) / (T(1) + e);
        return {(u < 0 ? u : T(0)) - log1p_unit(e), u < 0 ? e * r : r, T(1) + (u < 0 ? T(1) / e : e),
                u < 0 ? r : e * r};
    }
}

}  // namespace
}  // namespace flowkern
