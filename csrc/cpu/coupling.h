// The coupling on tiles of pixels: the halves that change and the network's output are gathered into compact arrays, the
// formulas run over those as plain loops, the results are scattered back.
#pragma once
#include "../formulas.h"
#include "convert.h"
#include "mix.h"

namespace flowkern::FLOWKERN_ISA {

// Compact arrays for one tile, TILE * channels / 2 numbers each.
template <class T>
struct Halves {
    T *b, *g, *raw, *t, *log_s;
    int64_t size;
};

// Rows of `half` from or to the second halves of a tile's rows.
template <class K, class T>
inline void gather(const T* tile, int64_t channels, T* compact) {
    const int64_t half = K::channels(channels) / 2;
    for (int p = 0; p < TILE; p++) memcpy(compact + p * half, tile + (2 * p + 1) * half, half * sizeof(T));
}

template <class K, class T>
inline void scatter(const T* compact, int64_t channels, T* tile) {
    const int64_t half = K::channels(channels) / 2;
    for (int p = 0; p < TILE; p++) memcpy(tile + (2 * p + 1) * half, compact + p * half, half * sizeof(T));
}

// Rows of the network's output: (raw, t), or t alone for an additive coupling. What a tile lacks is zero.
template <class K, class T, class H>
inline void load_network(const H* h, bool additive, int64_t valid, int64_t channels, T* raw, T* t) {
    const int64_t half = K::channels(channels) / 2, row = additive ? half : 2 * half;
    for (int64_t p = 0; p < valid; p++) {
        for (int64_t c = 0; c < half; c++) convert(h[p * row + row - half + c], t[p * half + c]);
        if (additive) continue;
        for (int64_t c = 0; c < half; c++) convert(h[p * row + c], raw[p * half + c]);
    }
    if (valid == TILE) return;
    memset(t + valid * half, 0, (TILE - valid) * half * sizeof(T));
    if (!additive) memset(raw + valid * half, 0, (TILE - valid) * half * sizeof(T));
}

template <class K, class T, class H>
inline void store_network(const T* draw, const T* dt, bool additive, int64_t valid, int64_t channels, H* dh) {
    const int64_t half = K::channels(channels) / 2, row = additive ? half : 2 * half;
    for (int64_t p = 0; p < valid; p++) {
        for (int64_t c = 0; c < half; c++) convert(dt[p * half + c], dh[p * row + row - half + c]);
        if (additive) continue;
        for (int64_t c = 0; c < half; c++) convert(draw[p * half + c], dh[p * row + c]);
    }
}

// Calls f with a number of the network's element type. In double precision the network has no other.
template <class T, class F>
inline void with_network_type(Type type, const F& f) {
    if constexpr (sizeof(T) == sizeof(double)) {
        f(double());
    } else {
        switch (type) {
            case Type::bf16: return f(BFloat16());
            case Type::f16: return f(Float16());
            default: return f(float());
        }
    }
}

// b <- (b + t) s, or b <- b / s - t; log_s as it is.
template <Scale S, bool INVERSE, class T>
__attribute__((noinline)) void couple_scaled(const Halves<T>& a, T alpha) {
    const T inverse_alpha = T(1) / alpha;
    T *b = a.b, *log_s = a.log_s;
    const T *raw = a.raw, *t = a.t;
#pragma omp simd
    for (int64_t j = 0; j < a.size; j++) {
        const ScaleTerms<T> terms = scale_terms<S>(raw[j], alpha, inverse_alpha);
        b[j] = INVERSE ? b[j] * terms.inverse_s - t[j] : (b[j] + t[j]) * terms.s;
        log_s[j] = terms.log_s;
    }
}

template <bool INVERSE, class T>
inline void couple_halves(const Halves<T>& a, Scale scale, T alpha) {
    if (scale == Scale::softclamp) return couple_scaled<Scale::softclamp, INVERSE>(a, alpha);
    if (scale == Scale::sigmoid) return couple_scaled<Scale::sigmoid, INVERSE>(a, alpha);
    for (int64_t j = 0; j < a.size; j++) a.b[j] = INVERSE ? a.b[j] - a.t[j] : a.b[j] + a.t[j];
}

// b and g are v's and the cotangent's halves; b becomes the rebuilt input (with GIVEN it is left), g its gradient, raw
// and t their own gradients. `glogdet` is the cotangent of the sample's log-determinant.
template <Scale S, bool INVERSE, bool GIVEN, class T>
__attribute__((noinline)) void couple_vjp_scaled(const Halves<T>& a, T alpha, T glogdet) {
    const T inverse_alpha = T(1) / alpha;
    T *b = a.b, *g = a.g, *raw = a.raw, *t = a.t;
#pragma omp simd
    for (int64_t j = 0; j < a.size; j++) {
        const ScaleTerms<T> terms = scale_terms<S>(raw[j], alpha, inverse_alpha);
        if (INVERSE) {
            const T shifted = GIVEN ? b[j] * terms.inverse_s : b[j] + t[j];
            if (!GIVEN) b[j] = shifted * terms.s;
            raw[j] = -(g[j] * shifted + glogdet) * terms.slope;
            t[j] = -g[j];
            g[j] *= terms.inverse_s;
        } else {
            const T out = GIVEN ? (b[j] + t[j]) * terms.s : b[j];
            if (!GIVEN) b[j] = b[j] / terms.s - t[j];
            raw[j] = (g[j] * out + glogdet) * terms.slope;
            g[j] *= terms.s;
            t[j] = g[j];
        }
    }
}

template <bool INVERSE, bool GIVEN, class T>
inline void couple_vjp_halves(const Halves<T>& a, Scale scale, T alpha, T glogdet) {
    if (scale == Scale::softclamp) return couple_vjp_scaled<Scale::softclamp, INVERSE, GIVEN>(a, alpha, glogdet);
    if (scale == Scale::sigmoid) return couple_vjp_scaled<Scale::sigmoid, INVERSE, GIVEN>(a, alpha, glogdet);
    for (int64_t j = 0; j < a.size; j++) {
        if (!GIVEN) a.b[j] = INVERSE ? a.b[j] + a.t[j] : a.b[j] - a.t[j];
        a.t[j] = INVERSE ? -a.g[j] : a.g[j];
    }
}

// The sum of n numbers, in double precision and in strips, whose rounding errors don't pile up.
template <class T>
inline double sum_of(const T* a, int64_t n) {
    constexpr int64_t STRIP = 128;
    double total = 0;
    for (int64_t first = 0; first < n; first += STRIP) {
        const int64_t last = min(first + STRIP, n);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < last; j++) sum += double(a[j]);
        total += sum;
    }
    return total;
}

}  // namespace flowkern::FLOWKERN_ISA
