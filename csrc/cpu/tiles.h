// Matrix products of bf16 numbers on the tiles of Intel's AMX: registers of 16 rows of 64 bytes. One instruction adds to a
// tile of fp32 sums the product of 16 rows of 16 pairs of numbers and 16 rows of 16 columns' pairs, which is how right
// factors are packed (factors.h).
#pragma once
#include "factors.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in gcc 12's own intrinsics
#endif

namespace flowkern::FLOWKERN_ISA {

// Held by each thread that multiplies numbers of E. No configuration is left behind or taken for granted, because PyTorch's
// own products configure tiles too.
template <bool tiled>
struct TileConfiguration {};

template <class E>
using Tiles = TileConfiguration<TILED<E>>;

// As multiply_panel of product.h.
template <int V, class F>
void multiply_on_tiles(Units a, int64_t rows, int64_t depth, const float* packed, const float* init, const F& done);

#ifdef __AMX_BF16__

template <>
struct TileConfiguration<true> {
    TileConfiguration() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } const all;
        static_assert(sizeof all == 64, "as the instruction reads it");
        fence();
        _tile_loadconfig(&all);
    }
    ~TileConfiguration() { _tile_release(); }
    TileConfiguration(const TileConfiguration&) = delete;
    TileConfiguration& operator=(const TileConfiguration&) = delete;
    // Compilers don't know what memory tile instructions read and write.
    static void fence() { __asm__ volatile("" ::: "memory"); }
};

// Nor do sanitizers, which are shown it: R rows and V columns of tiles.
template <int R, int V>
inline void show([[maybe_unused]] const float* tiles, [[maybe_unused]] int64_t stride) {
#ifdef __SANITIZE_ADDRESS__
    for (int64_t r = 0; r < R * WIDTH; r++) {
        for (int64_t c = 0; c < V * WIDTH; c++) [[maybe_unused]] volatile float seen = tiles[r * stride + c];
    }
#endif
}

// Tile instructions name their registers literally: sums are 0 to 3 (row of tiles * 2 + column), left factors 4 and 5,
// right ones 6 and 7. R rows and V columns of sums.
template <int R, int V>
inline void load_tiles(const float* from, int64_t stride) {
    show<R, V>(from, stride);
    TileConfiguration<true>::fence();
    const int64_t bytes = stride * sizeof(float);
    _tile_loadd(0, from, bytes);
    if constexpr (V > 1) _tile_loadd(1, from + WIDTH, bytes);
    if constexpr (R > 1) _tile_loadd(2, from + WIDTH * stride, bytes);
    if constexpr (R > 1 && V > 1) _tile_loadd(3, from + WIDTH * stride + WIDTH, bytes);
}

template <int R, int V>
inline void store_tiles(float* to, int64_t stride) {
    show<R, V>(to, stride);
    TileConfiguration<true>::fence();
    const int64_t bytes = stride * sizeof(float);
    _tile_stored(0, to, bytes);
    if constexpr (V > 1) _tile_stored(1, to + WIDTH, bytes);
    if constexpr (R > 1) _tile_stored(2, to + WIDTH * stride, bytes);
    if constexpr (R > 1 && V > 1) _tile_stored(3, to + WIDTH * stride + WIDTH, bytes);
    TileConfiguration<true>::fence();
}

// sums += a b, `depth` a multiple of a tile's.
template <int R, int V>
inline void multiply_tiles(Units a, Units b, int64_t depth) {
    const int64_t a_bytes = a.stride * sizeof(float), b_bytes = b.stride * sizeof(float);
    const float *left = a.data, *right = b.data;
    for (int64_t k = 0; k < depth; k += WIDTH, left += WIDTH, right += WIDTH * b.stride) {
        show<R, 1>(left, a.stride);
        show<1, V>(right, b.stride);
        _tile_loadd(4, left, a_bytes);
        _tile_loadd(6, right, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (V > 1) _tile_loadd(7, right + WIDTH, b_bytes);
        if constexpr (V > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (R > 1) _tile_loadd(5, left + WIDTH * a.stride, a_bytes);
        if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (R > 1 && V > 1) _tile_dpbf16ps(3, 5, 7);
    }
}

template <int V, class F>
void multiply_on_tiles(Units a, int64_t rows, int64_t depth, const float* packed, const float* init, const F& done) {
    alignas(64) float sums[2 * WIDTH * V * WIDTH];
    alignas(64) static constexpr float zeros[V * WIDTH] = {};
    const auto finish = [&](int64_t first) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < 2 * WIDTH; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) done(first + r, v * WIDTH, load(sums + (r * V + v) * WIDTH));
        }
    };
    // Vectors finish a block's sums while tiles multiply the next one's. With stride 0, all rows of a tile are the same.
    for (int64_t first = 0; first < rows; first += 2 * WIDTH) {
        load_tiles<2, V>(init ? init : zeros, 0);
        multiply_tiles<2, V>({a.data + first * a.stride, a.stride}, {packed, V * WIDTH}, depth);
        if (first) finish(first - 2 * WIDTH);
        store_tiles<2, V>(sums, V * WIDTH);
    }
    finish(rows - 2 * WIDTH);
}

template <int R, int V>
inline void add_tile_product(Units a, Units b, int64_t depth, float* total, int64_t stride) {
    load_tiles<R, V>(total, stride);
    multiply_tiles<R, V>(a, b, depth);
    store_tiles<R, V>(total, stride);
}

// total (rows, columns) += a b, rows and columns padded to whole tiles.
inline void add_product(Units a, int64_t rows, Units b, int64_t columns, int64_t depth, float* total) {
    const int64_t stride = padded<float>(columns);
    for (int64_t c = 0; c < columns; c += 2 * WIDTH) {
        const bool wide = c + WIDTH < columns;
        for (int64_t r = 0; r < rows; r += 2 * WIDTH) {
            const bool high = r + WIDTH < rows;
            const Units left{a.data + r * a.stride, a.stride}, right{b.data + c, b.stride};
            float* to = total + r * stride + c;
            if (high && wide) add_tile_product<2, 2>(left, right, depth, to, stride);
            if (high && !wide) add_tile_product<2, 1>(left, right, depth, to, stride);
            if (!high && wide) add_tile_product<1, 2>(left, right, depth, to, stride);
            if (!high && !wide) add_tile_product<1, 1>(left, right, depth, to, stride);
        }
    }
}

// Eight numbers of each of four rows, `stride` apart.
inline __m512i four_rows(const BFloat16* p, int64_t stride) {
    const auto row = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * stride)); };
    __m512i v = _mm512_castsi128_si512(row(0));
    v = _mm512_inserti32x4(v, row(1), 1);
    v = _mm512_inserti32x4(v, row(2), 2);
    return _mm512_inserti32x4(v, row(3), 3);
}

// Four columns of 16 pairs, each to a row. Lane l of v[j] holds the four columns' pairs of number 4 l + j.
inline void store_columns(const __m512i* v, float* to, int64_t stride) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(a, c));
    _mm512_storeu_si512(to + stride, _mm512_unpackhi_epi64(a, c));
    _mm512_storeu_si512(to + 2 * stride, _mm512_unpacklo_epi64(b, d));
    _mm512_storeu_si512(to + 3 * stride, _mm512_unpackhi_epi64(b, d));
}

// Each column of 2 * WIDTH rows to a row of WIDTH pairs. Up to seven columns more are read and written.
inline void transpose_pairs(const BFloat16* rows, int64_t row, int64_t columns, float* to, int64_t stride) {
    for (int64_t c = 0; c < columns; c += 8, to += 8 * stride) {
        __m512i first[4], last[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const BFloat16* p = rows + 2 * j * row + c;
            const __m512i low = four_rows(p, 8 * row), high = four_rows(p + row, 8 * row);
            first[j] = _mm512_unpacklo_epi16(low, high);
            last[j] = _mm512_unpackhi_epi16(low, high);
        }
        store_columns(first, to, stride);
        store_columns(last, to + 4 * stride, stride);
    }
}

#endif

}  // namespace flowkern::FLOWKERN_ISA
