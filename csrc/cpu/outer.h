// Sums over pixels of products of two arrays' numbers, which are the weights' gradients.
#pragma once
#include "product.h"

namespace flowkern::FLOWKERN_ISA {

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
    for (; r + ROWS<E> <= rows; r += ROWS<E>) add_outer_block<E, ROWS<E>, V>(at(), b, depth, total + r * stride, stride);
    if constexpr (ROWS<E> > 4) {
        for (; r + 4 <= rows; r += 4) add_outer_block<E, 4, V>(at(), b, depth, total + r * stride, stride);
    }
    for (; r + 2 <= rows; r += 2) add_outer_block<E, 2, V>(at(), b, depth, total + r * stride, stride);
    for (; r < rows; r++) add_outer_block<E, 1, V>(at(), b, depth, total + r * stride, stride);
}

// total (rows, columns), rows `stride` apart, += transpose of a (depth, rows) times b (depth, columns), columns padded to whole
// vectors.
template <class E>
inline void add_outer(Units a, int64_t rows, Units b, int64_t columns, int64_t depth, float* total, int64_t stride) {
    each_panel<E>(columns, [&](auto vectors, int64_t column) {
        add_outer_panel<E, decltype(vectors)::value>(a, rows, {b.data + column, b.stride}, depth, total + column, stride);
    });
}

// Scratch memory for such sums over at most so many pixels, a whole number of blocks, of arrays of at most so many columns:
// fp32 arrays are factors as they are, of bf16 ones pairs of rows are put together, for tiles' left factors transposed.
template <class E>
class OuterProduct {
  public:
    OuterProduct(int64_t pixels, int64_t left, int64_t right)
        : left_(TILED<E> ? padded<float>(left) : PAIRED * pixels / 2, line(TILED<E> ? pixels / 2 : left)),
          right_(PAIRED * pixels / 2, line(right)) {}

    // total (a's columns, b's columns) += the sum over `pixels` rows, a multiple of ROWS. Columns of b are padded to whole
    // vectors; with tiles, a's to a multiple of as many.
    void add(const View<E>& a, int64_t a_columns, const View<E>& b, int64_t b_columns, int64_t pixels, float* total) const {
        const int64_t depth = pixels / PER_UNIT<E>;
        if constexpr (TILED<E>) {
            for (int64_t p = 0; p < pixels; p += 2 * WIDTH) {
                transpose_pairs(a[p], a[1] - a[0], a_columns, left_[0] + p / 2, left_[1] - left_[0]);
            }
            add_product(left_.units(), a_columns, pair_rows(b, right_, pixels, b_columns), b_columns, depth, total);
        } else if constexpr (PAIRED) {
            add_outer<E>(pair_rows(a, left_, pixels, a_columns), a_columns, pair_rows(b, right_, pixels, b_columns), b_columns,
                         depth, total, padded<float>(b_columns));
        } else {
            add_outer<E>(a.units(), a_columns, b.units(), b_columns, depth, total, padded<float>(b_columns));
        }
    }

  private:
    static constexpr bool PAIRED = PER_UNIT<E> == 2;
    Rows<float> left_, right_;

    // An odd number of cache lines, so that columns don't collide.
    static int64_t line(int64_t units) { return padded<float>(units) | WIDTH; }

    static Units pair_rows(const View<E>& rows, const Rows<float>& pairs, int64_t count, int64_t columns) {
        for (int64_t p = 0; p < count; p += 2) {
            const E *low = rows[p], *high = rows[p + 1];
            float* to = pairs[p / 2];
            for (int64_t c = 0; c < columns; c += WIDTH) {
                HalfVector<uint16_t> l, h;
                memcpy(&l, low + c, sizeof l);
                memcpy(&h, high + c, sizeof h);
                const BitVector pair = __builtin_convertvector(l, BitVector) | __builtin_convertvector(h, BitVector) << 16;
                memcpy(to + c, &pair, sizeof pair);
            }
        }
        return pairs.units();
    }
};

}  // namespace flowkern::FLOWKERN_ISA
