// The vector type of the instruction set that this unit is compiled for. Everything per instruction set lives in a
// namespace of that name, and uses no std templates: their weak copies would be shared between instruction sets.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef FLOWKERN_ISA
#define FLOWKERN_ISA baseline
#endif

namespace flowkern::FLOWKERN_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ACCUMULATORS = 24;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, ACCUMULATORS = 12;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 24;
#else
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 8;
#endif

template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
struct HalfVectorOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES / 2)));
};

template <class T>
using HalfVector = typename HalfVectorOf<T>::type;

template <class T>
inline Vector<T> load(const T* p) {
    Vector<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
inline HalfVector<T> load_half(const T* p) {
    HalfVector<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
    memcpy(p, &v, sizeof v);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// A row of n elements, padded to whole vectors.
template <class T>
constexpr int64_t padded(int64_t n) {
    return ceil_div(n, LANES<T>) * LANES<T>;
}

}  // namespace flowkern::FLOWKERN_ISA
