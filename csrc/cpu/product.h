// Products of matrices of fp32 or bf16 numbers with sums in fp32, on blocks that stay in registers.
//
// Factors are arrays of 32-bit units: a number of fp32, or a pair of bf16 numbers that are neighbours along the dimension
// that is summed over, which one instruction multiplies and adds. So one set of loops serves both.
#pragma once
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "convert.h"
#include "vector.h"

namespace flowkern::FLOWKERN_ISA {

template <class E>
constexpr int PER_UNIT = sizeof(float) / sizeof(E);

constexpr int WIDTH = LANES<float>;
constexpr int VECTORS = 3, ROWS = ACCUMULATORS / VECTORS;  // of a block of sums

inline Vector<float> splat(float x) { return x - Vector<float>{}; }

inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, float) { sum += a * b; }

#ifdef __AVX512BF16__
inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, BFloat16) {
    sum = Vector<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_ps(a)), __m512bh(b)));
}
#endif

// A vector's worth of numbers to and from fp32.
inline Vector<float> load_numbers(const float* p) { return load(p); }
inline void store_numbers(float* p, Vector<float> v) { store(p, v); }

typedef uint16_t HalfVector __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t BitVector __attribute__((vector_size(VECTOR_BYTES)));

inline Vector<float> load_numbers(const BFloat16* p) {
    HalfVector half;
    memcpy(&half, p, sizeof half);
    return Vector<float>(__builtin_convertvector(half, BitVector) << 16);
}

#ifdef __AVX512BF16__
inline void store_numbers(BFloat16* p, Vector<float> v) {
    const __m256bh half = _mm512_cvtneps_pbh(__m512(v));
    memcpy(p, &half, sizeof half);
}
#endif

// How the columns of a right factor are divided into panels of at most VECTORS vectors.
struct Panel {
    int64_t first;  // vector
    int vectors;
};

inline int64_t panel_count(int64_t columns) { return ceil_div(padded<float>(columns), VECTORS * WIDTH); }

inline Panel panel(int64_t columns, int64_t i) {
    const int64_t vectors = padded<float>(columns) / WIDTH, count = panel_count(columns);
    return {vectors * i / count, int(vectors * (i + 1) / count - vectors * i / count)};
}

// Right factors are packed panel by panel, each of `depth` rows of its vectors, so that they are read in order.
inline int64_t packed_size(int64_t depth, int64_t columns) { return depth * padded<float>(columns); }

// A matrix's units, rows `stride` apart.
struct Units {
    const float* data;
    int64_t stride;
};

template <class E, int V, class F>
inline void multiply_panel(Units a, int64_t rows, int64_t depth, const float* packed, const float* init, const F& done) {
    for (int64_t first = 0; first < rows; first += ROWS) {
        const float* row[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) row[r] = a.data + (first + r) * a.stride;
        Vector<float> sum[ROWS][V];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[r][v] = init ? load(init + v * WIDTH) : Vector<float>{};
        }
        const float* b = packed;
        for (int64_t k = 0; k < depth; k++, b += V * WIDTH) {
            Vector<float> column[V];
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) column[v] = load(b + v * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const float value = row[r][k];
#pragma GCC unroll 3
                for (int v = 0; v < V; v++) multiply_add(sum[r][v], value, column[v], E());
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) done(first + r, v * WIDTH, sum[r][v]);
        }
    }
}

// done(row, column, vector) for every vector of a b + init, b packed, `rows` a multiple of ROWS. init: columns, or null.
template <class E, class F>
inline void multiply(Units a, int64_t rows, int64_t depth, const float* packed, int64_t columns, const float* init, const F& done) {
    for (int64_t i = 0; i < panel_count(columns); i++) {
        const Panel p = panel(columns, i);
        const int64_t column = p.first * WIDTH;
        const float *b = packed + depth * column, *start = init ? init + column : nullptr;
        const auto shifted = [&](int64_t r, int64_t c, Vector<float> v) { done(r, column + c, v); };
        if (p.vectors == 3) multiply_panel<E, 3>(a, rows, depth, b, start, shifted);
        if (p.vectors == 2) multiply_panel<E, 2>(a, rows, depth, b, start, shifted);
        if (p.vectors == 1) multiply_panel<E, 1>(a, rows, depth, b, start, shifted);
    }
}

template <class E, int R, int V>
inline void add_outer_block(Units a, Units b, int64_t depth, float* total, int64_t stride) {
    Vector<float> sum[R][V] = {};
    for (int64_t k = 0; k < depth; k++) {
        Vector<float> column[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) column[v] = load(b.data + k * b.stride + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const float value = a.data[k * a.stride + r];
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) multiply_add(sum[r][v], value, column[v], E());
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) {
            float* to = total + r * stride + v * WIDTH;
            store(to, load(to) + sum[r][v]);
        }
    }
}

template <class E, int V>
inline void add_outer_panel(Units a, int64_t rows, Units b, int64_t depth, float* total, int64_t stride) {
    int64_t r = 0;
    const auto at = [&] { return Units{a.data + r, a.stride}; };
    for (; r + ROWS <= rows; r += ROWS) add_outer_block<E, ROWS, V>(at(), b, depth, total + r * stride, stride);
    if constexpr (ROWS > 4) {
        for (; r + 4 <= rows; r += 4) add_outer_block<E, 4, V>(at(), b, depth, total + r * stride, stride);
    }
    for (; r + 2 <= rows; r += 2) add_outer_block<E, 2, V>(at(), b, depth, total + r * stride, stride);
    for (; r < rows; r++) add_outer_block<E, 1, V>(at(), b, depth, total + r * stride, stride);
}

// total (rows, columns) += transpose of a (depth, rows) times b (depth, columns), columns padded to whole vectors.
template <class E>
inline void add_outer(Units a, int64_t rows, Units b, int64_t columns, int64_t depth, float* total) {
    const int64_t stride = padded<float>(columns);
    for (int64_t i = 0; i < panel_count(columns); i++) {
        const Panel p = panel(columns, i);
        const Units from{b.data + p.first * WIDTH, b.stride};
        float* to = total + p.first * WIDTH;
        if (p.vectors == 3) add_outer_panel<E, 3>(a, rows, from, depth, to, stride);
        if (p.vectors == 2) add_outer_panel<E, 2>(a, rows, from, depth, to, stride);
        if (p.vectors == 1) add_outer_panel<E, 1>(a, rows, from, depth, to, stride);
    }
}

}  // namespace flowkern::FLOWKERN_ISA
