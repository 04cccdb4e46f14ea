// The coupling on tiles of pixels: the halves that change and the network's output are gathered into compact arrays, the
// formulas run over those as plain loops, and rows are put together again.
#pragma once
#include "../formulas.h"
#include "convert.h"
#include "halves.h"

namespace flowkern::FLOWKERN_ISA {

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

// The network's output (raw, t) for the tile at element `at`, or t alone with an additive coupling. It is the image
// itself where that is complete and of type T, else a copy in `tile`, completed by rows whose log s and t are zero.
template <class T>
inline const T* network_rows(const void* h, Type type, int64_t at, int64_t valid, int64_t row, Scale scale, T* tile) {
    const T* rows = tile;
    with_network_type<T>(type, [&](auto number) {
        const auto* from = static_cast<const decltype(number)*>(h) + at;
        if constexpr (sizeof number == sizeof(T)) {
            if (valid == TILE) {
                rows = from;
                return;
            }
        }
        for (int64_t j = 0; j < valid * row; j++) convert(from[j], tile[j]);
    });
    const T neutral = scale == Scale::sigmoid ? T(1000) : T(0);
    for (int64_t p = valid; p < TILE; p++) {
        for (int64_t c = 0; c < row; c++) tile[p * row + c] = c < row / 2 && scale != Scale::additive ? neutral : T(0);
    }
    return rows;
}

// Elements that go through each of a coupling's loops at a time.
template <class T>
constexpr int64_t STRIP = 16 * LANES<T>;

// The scale maps of one strip, halfway. Two exponentials one after the other are a chain of some 250 cycles, of which a
// processor has too few under way at a time to fill its multipliers; with a loop for each it has enough.
template <Scale S, class T>
struct ScalesBegun {
    alignas(VECTOR_BYTES) T first[STRIP<T>];
    alignas(VECTOR_BYTES) T second[STRIP<T>];

    void begin(const T* raw, int64_t size, T alpha, T inverse_alpha) {
#pragma omp simd
        for (int64_t j = 0; j < size; j++) {
            const ScaleBegun<T> begun = begin_scale<S>(raw[j], alpha, inverse_alpha);
            first[j] = begun.first;
            second[j] = begun.second;
        }
    }
    ScaleTerms<T> terms(int64_t j) const { return finish_scale<S>(ScaleBegun<T>{first[j], second[j]}); }
};

// b <- (b + t) s, or b <- b / s - t. Returns the sum of log s, strip by strip, so that rounding errors don't pile up.
template <Scale S, bool INVERSE, class T>
__attribute__((noinline)) double couple_scaled(T* b, const T* raw, const T* t, int64_t size, T alpha) {
    const T inverse_alpha = T(1) / alpha;
    double total = 0;
    ScalesBegun<S, T> scales;
    for (; size > 0; size -= STRIP<T>, b += STRIP<T>, raw += STRIP<T>, t += STRIP<T>) {
        const int64_t some = min(size, STRIP<T>);
        scales.begin(raw, some, alpha, inverse_alpha);
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < some; j++) {
            const ScaleTerms<T> terms = scales.terms(j);
            b[j] = INVERSE ? b[j] * terms.inverse_s - t[j] : (b[j] + t[j]) * terms.s;
            sum += terms.log_s;
        }
        total += sum;
    }
    return total;
}

template <bool INVERSE, class T>
inline double couple_halves(T* b, const T* raw, const T* t, int64_t size, Scale scale, T alpha) {
    if (scale == Scale::softclamp) return couple_scaled<Scale::softclamp, INVERSE>(b, raw, t, size, alpha);
    if (scale == Scale::sigmoid) return couple_scaled<Scale::sigmoid, INVERSE>(b, raw, t, size, alpha);
    for (int64_t j = 0; j < size; j++) b[j] = INVERSE ? b[j] - t[j] : b[j] + t[j];
    return 0;
}

// b and g are v's and the cotangent's halves; b becomes the rebuilt input (with GIVEN it is left), g its gradient, raw
// and t their own gradients. `glogdet` is the cotangent of the sample's log-determinant. Where s is there already, a
// division takes less than a second exponential.
template <Scale S, bool INVERSE, bool GIVEN, class T>
__attribute__((noinline)) void couple_vjp_scaled(T* b, T* g, T* raw, T* t, int64_t size, T alpha, T glogdet) {
    const T inverse_alpha = T(1) / alpha;
    ScalesBegun<S, T> scales;
    for (; size > 0; size -= STRIP<T>, b += STRIP<T>, g += STRIP<T>, raw += STRIP<T>, t += STRIP<T>) {
        const int64_t some = min(size, STRIP<T>);
        scales.begin(raw, some, alpha, inverse_alpha);
#pragma omp simd
        for (int64_t j = 0; j < some; j++) {
            const ScaleTerms<T> terms = scales.terms(j);
            if (INVERSE) {
                const T shifted = GIVEN ? b[j] / terms.s : b[j] + t[j];
                if (!GIVEN) b[j] = shifted * terms.s;
                raw[j] = -(g[j] * shifted + glogdet) * terms.slope;
                t[j] = -g[j];
                g[j] = g[j] / terms.s;
            } else {
                const T out = GIVEN ? (b[j] + t[j]) * terms.s : b[j];
                if (!GIVEN) b[j] = b[j] / terms.s - t[j];
                raw[j] = (g[j] * out + glogdet) * terms.slope;
                g[j] *= terms.s;
                t[j] = g[j];
            }
        }
    }
}

template <bool INVERSE, bool GIVEN, class T>
inline void couple_vjp_halves(T* b, T* g, T* raw, T* t, int64_t size, Scale scale, T alpha, T glogdet) {
    if (scale == Scale::softclamp) {
        return couple_vjp_scaled<Scale::softclamp, INVERSE, GIVEN>(b, g, raw, t, size, alpha, glogdet);
    }
    if (scale == Scale::sigmoid) {
        return couple_vjp_scaled<Scale::sigmoid, INVERSE, GIVEN>(b, g, raw, t, size, alpha, glogdet);
    }
    for (int64_t j = 0; j < size; j++) {
        if (!GIVEN) b[j] = INVERSE ? b[j] + t[j] : b[j] - t[j];
        t[j] = INVERSE ? -g[j] : g[j];
    }
}

}  // namespace flowkern::FLOWKERN_ISA
