// Products of matrices of fp32 or bf16 numbers with sums in fp32, on blocks that stay in registers.
#pragma once
#include "tiles.h"

namespace flowkern::FLOWKERN_ISA {

inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, float) { sum += a * b; }
inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, Widened) { sum += a * b; }

#ifdef __AVX512BF16__
inline void multiply_add(Vector<float>& sum, float a, Vector<float> b, BFloat16) {
    sum = Vector<float>(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_ps(a)), __m512bh(b)));
}
#endif

// HALF: of the last vector of every row only half has columns. Processors that execute a vector of 64 bytes as two halves (Zen 4)
// need half the time for it.
template <class E, int V, bool HALF, class F>
inline void multiply_on_vectors(Units a, int64_t rows, int64_t depth, const float* packed, const float* init, const F& done) {
    constexpr int WHOLE = V - HALF;
    for (int64_t first = 0; first < rows; first += ROWS<E>) {
        const float* row[ROWS<E>];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS<E>; r++) row[r] = a.data + (first + r) * a.stride;
        Vector<float> sum[ROWS<E>][V];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS<E>; r++) {
#pragma GCC unroll 3
            for (int v = 0; v < WHOLE; v++) sum[r][v] = init ? load(init + v * WIDTH) : Vector<float>{};
        }
        [[maybe_unused]] HalfVector<float> end[ROWS<E>];
        if constexpr (HALF) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS<E>; r++) end[r] = init ? load_half(init + WHOLE * WIDTH) : HalfVector<float>{};
        }
        const float* b = packed;
        for (int64_t k = 0; k < depth; k++, b += V * WIDTH) {
            Vector<float> column[V];
            [[maybe_unused]] HalfVector<float> last;
#pragma GCC unroll 3
            for (int v = 0; v < WHOLE; v++) column[v] = load(b + v * WIDTH);
            if constexpr (HALF) last = load_half(b + WHOLE * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS<E>; r++) {
                const float value = row[r][k];
#pragma GCC unroll 3
                for (int v = 0; v < WHOLE; v++) multiply_add(sum[r][v], value, column[v], E());
                if constexpr (HALF) end[r] += value * last;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS<E>; r++) {
            if constexpr (HALF) {
                sum[r][V - 1] = Vector<float>{};
                memcpy(&sum[r][V - 1], &end[r], sizeof end[r]);
            }
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) done(first + r, v * WIDTH, sum[r][v]);
        }
    }
}

template <class E, int V, class F>
inline void multiply_panel(Units a, int64_t rows, int64_t depth, const float* packed, bool half, const float* init, const F& done) {
    if constexpr (TILED<E>) {
        multiply_on_tiles<V>(a, rows, depth, packed, init, done);
    } else {
        if constexpr (VECTOR_BYTES == 64 && PER_UNIT<E> == 1) {
            if (half) return multiply_on_vectors<E, V, true>(a, rows, depth, packed, init, done);
        }
        multiply_on_vectors<E, V, false>(a, rows, depth, packed, init, done);
    }
}

// As `multiply`, of `count` rows of b from the one numbered `first` on, of `depth` that it has.
template <class E, class F>
inline void multiply_some(Units a, int64_t rows, int64_t first, int64_t count, int64_t depth, const float* packed, int64_t columns,
                          const float* init, const F& done) {
    each_panel<E>(columns, [&](auto vectors, int64_t column) {
        constexpr int V = decltype(vectors)::value;
        const bool half = columns - column <= (2 * V - 1) * (WIDTH / 2);
        multiply_panel<E, V>(a, rows, count, packed + depth * column + first * V * WIDTH, half, init ? init + column : nullptr,
                             [&](int64_t r, int64_t c, Vector<float> v) { done(r, column + c, v); });
    });
}

// done(row, column, vector) for every vector of a b + init, b packed, `rows` a multiple of ROWS. init: columns, or null.
template <class E, class F>
inline void multiply(Units a, int64_t rows, int64_t depth, const float* packed, int64_t columns, const float* init, const F& done) {
    depth = packed_depth<E>(depth);
    multiply_some<E>(a, rows, 0, depth, depth, packed, columns, init, done);
}

}  // namespace flowkern::FLOWKERN_ISA
