// Products of matrices of fp32 or bf16 numbers with sums in fp32, on blocks that stay in registers.
#pragma once
#include "tiles.h"

namespace flowkern::FLOWKERN_ISA {

inline Vector<float> splat(float x) { return x - Vector<float>{}; }

inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, float) { sum += a * b; }
inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, Widened) { sum += a * b; }

#ifdef __AVX512BF16__
inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, BFloat16) {
    sum = Vector<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_ps(a)), __m512bh(b)));
}
#endif

template <class E, int V, class F>
inline void multiply_on_vectors(Units a, int64_t rows, int64_t depth, const float* packed, const float* init, const F& done) {
    for (int64_t first = 0; first < rows; first += ROWS<E>) {
        const float* row[ROWS<E>];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS<E>; r++) row[r] = a.data + (first + r) * a.stride;
        Vector<float> sum[ROWS<E>][V];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS<E>; r++) {
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[r][v] = init ? load(init + v * WIDTH) : Vector<float>{};
        }
        const float* b = packed;
        for (int64_t k = 0; k < depth; k++, b += V * WIDTH) {
            Vector<float> column[V];
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) column[v] = load(b + v * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS<E>; r++) {
                const float value = row[r][k];
#pragma GCC unroll 3
                for (int v = 0; v < V; v++) multiply_add(sum[r][v], value, column[v], E());
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS<E>; r++) {
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) done(first + r, v * WIDTH, sum[r][v]);
        }
    }
}

template <class E, int V, class F>
inline void multiply_panel(Units a, int64_t rows, int64_t depth, const float* packed, const float* init, const F& done) {
    if constexpr (TILED<E>) {
        multiply_on_tiles<V>(a, rows, depth, packed, init, done);
    } else {
        multiply_on_vectors<E, V>(a, rows, depth, packed, init, done);
    }
}

// done(row, column, vector) for every vector of a b + init, b packed, `rows` a multiple of ROWS. init: columns, or null.
template <class E, class F>
inline void multiply(Units a, int64_t rows, int64_t depth, const float* packed, int64_t columns, const float* init, const F& done) {
    depth = packed_depth<E>(depth);
    for (int64_t i = 0; i < panel_count<E>(columns); i++) {
        const Panel p = panel<E>(columns, i);
        const int64_t column = p.first * WIDTH;
        const float *b = packed + depth * column, *start = init ? init + column : nullptr;
        const auto shifted = [&](int64_t r, int64_t c, Vector<float> v) { done(r, column + c, v); };
        if constexpr (VECTORS<E> == 3) {
            if (p.vectors == 3) multiply_panel<E, 3>(a, rows, depth, b, start, shifted);
        }
        if (p.vectors == 2) multiply_panel<E, 2>(a, rows, depth, b, start, shifted);
        if (p.vectors == 1) multiply_panel<E, 1>(a, rows, depth, b, start, shifted);
    }
}

}  // namespace flowkern::FLOWKERN_ISA
