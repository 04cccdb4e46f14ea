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

FLOWKERN_HD inline float of_bits(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

FLOWKERN_HD inline float power_of_two(int32_t n) { return of_bits(int32_t(uint32_t(n + 127) << 23)); }

// x = n ln 2 + r with |r| <= ln 2 / 2. Returns e^r - 1, and n as EXPONENT + n: the exponent of 2^n and bits above it,
// which `power` shifts out.
constexpr int32_t EXPONENT = 0x4B400000 + 127;

FLOWKERN_HD inline float reduced_expm1(float x, int32_t& shifted_n) {
    // Adding 1.5 * 2^23 + 127 rounds to an integer and leaves it in the low bits.
    const float magic = 12583039.0f;
    float shifted = x * 1.44269504f + magic;
    float whole = shifted - magic;
    memcpy(&shifted_n, &shifted, sizeof shifted_n);
    // ln 2 in two parts, the first with few bits so that its multiples are exact.
    float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.392618359e-3f;
    p = p * r + 8.363179053e-3f;
    p = p * r + 4.166655462e-2f;
    p = p * r + 1.666657699e-1f;
    p = p * r + 0.5f;
    return p * (r * r) + r;
}

// 2^n for -127 (then 0) to 128 (then infinity).
FLOWKERN_HD inline float power(int32_t shifted_n) { return of_bits(int32_t(uint32_t(shifted_n) << 23)); }

// e^x to about one ulp over the whole range: gradual underflow, infinity on overflow, NaN through.
FLOWKERN_HD inline float exponential(float x) {
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    int32_t n;
    float p = 1.0f + reduced_expm1(x, n);
    n -= EXPONENT;
    // 2^n in two factors: n runs from -150 to 128, beyond the exponents of normal numbers.
    int32_t half = n >> 1;
    return p * power_of_two(half) * power_of_two(n - half);
}

FLOWKERN_HD inline double exponential(double x) { return std::exp(x); }

// The same for |x| < 10^6 and where results at the very ends of the range don't matter: 0 below e^-87.7, infinity above
// e^88.3. Bounding n takes fewer instructions than bounding x.
FLOWKERN_HD inline float bounded_exponential(float x) {
    int32_t n;
    float p = 1.0f + reduced_expm1(x, n);
    n = n < EXPONENT - 127 ? EXPONENT - 127 : n;
    n = n > EXPONENT + 128 ? EXPONENT + 128 : n;
    return power(n) * p;
}

FLOWKERN_HD inline double bounded_exponential(double x) { return std::exp(x); }

// tanh(v / 2) = -d / (2 + d) and its slope 4 (1 + d) / (2 + d)^2 with d = exp(-|v|) - 1, both to relative precision.
template <class T>
struct Tangent {
    T value, slope;
};

FLOWKERN_HD inline Tangent<float> hyperbolic_tangent_of_half(float v) {
    float x = -std::fabs(v);
    x = x < -87.0f ? -87.0f : x;
    int32_t n;
    float p = reduced_expm1(x, n), scale = power(n);
    float d = scale * p + (scale - 1.0f), sum = 2.0f + d;
    return {std::copysign(d / sum, v), 4.0f * (scale * p + scale) / (sum * sum)};
}

FLOWKERN_HD inline Tangent<double> hyperbolic_tangent_of_half(double v) {
    double th = std::tanh(v / 2);
    return {th, 1 - th * th};
}

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

// What the coupling needs of its scale map at one raw value. Unused members cost nothing once inlined.
template <class T>
struct ScaleTerms {
    T log_s;      // log s(raw)
    T s;          // s(raw)
    T inverse_s;  // 1 / s(raw)
    T slope;      // d log s / d raw
};

// The same halfway, after the first exponential, for loops that go on from there in another loop: (log s, its slope) of the
// softclamp, (u, e^-|u|) of the sigmoid, whose argument u is.
template <class T>
struct ScaleBegun {
    T first, second;
};

template <Scale S, class T>
FLOWKERN_HD inline ScaleBegun<T> begin_scale(T raw, T alpha, T inverse_alpha) {
    if constexpr (S == Scale::softclamp) {
        const Tangent<T> th = hyperbolic_tangent_of_half(raw * (2 * inverse_alpha));
        return {alpha * th.value, th.slope};
    } else {
        const T u = raw + T(2);
        return {u, exponential(-std::fabs(u))};
    }
}

template <Scale S, class T>
FLOWKERN_HD inline ScaleTerms<T> finish_scale(const ScaleBegun<T>& begun) {
    if constexpr (S == Scale::softclamp) {
        const T log_s = begun.first;
        return {log_s, bounded_exponential(log_s), bounded_exponential(-log_s), begun.second};
    } else {
        const T u = begun.first, e = begun.second, r = T(1) / (T(1) + e);
        return {(u < 0 ? u : T(0)) - log1p_unit(e), u < 0 ? e * r : r, T(1) + (u < 0 ? T(1) / e : e),
                u < 0 ? r : e * r};
    }
}

template <Scale S, class T>
FLOWKERN_HD inline ScaleTerms<T> scale_terms(T raw, T alpha, T inverse_alpha) {
    return finish_scale<S>(begin_scale<S>(raw, alpha, inverse_alpha));
}

}  // namespace
}  // namespace flowkern
