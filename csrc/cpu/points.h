// 3x3 convolutions as products of points: arrays of the tiles' numbers before and after them (winograd.h).
#pragma once
#include "product.h"
#include "taps.h"
#include "winograd.h"

namespace flowkern::FLOWKERN_ISA {

constexpr int64_t TILES = 16;  // of a chunk

// to += the first n numbers of a vector.
inline void add_first(float* to, V v, int64_t n) {
    if (n == WIDTH) return store(to, load(to) + v);
#ifdef __AVX512F__
    const __mmask16 first = uint16_t((1u << n) - 1);
    _mm512_mask_storeu_ps(to, first, __m512(v) + _mm512_maskz_loadu_ps(first, to));
#else
    float numbers[WIDTH];
    store(numbers, v);
    for (int64_t l = 0; l < n; l++) to[l] += numbers[l];
#endif
}

// Arrays of a chunk: rows of all tiles for each point.
class Points : public Rows<float> {
  public:
    explicit Points(int64_t channels) : Rows<float>(POINTS * TILES, padded<float>(channels) | WIDTH) {}
    View<float> at(int point) const { return from(point * TILES); }
};

// What `count` tiles of a band from the one numbered `first` on are products of; `wide`: numbers of a bordered band's pixel.
inline void load_points(const float* bordered, int64_t width, int64_t wide, int64_t channels, int64_t first, int64_t count,
                        const View<float>& points) {
    const int64_t row = (width + 2) * wide, columns = width / 2;
    for (int64_t t = 0; t < count; t++) {
        const float* patch = bordered + (first + t) / columns * 2 * row + (first + t) % columns * 2 * wide;
        for (int64_t c = 0; c < channels; c += WIDTH) {
            V d[16], p[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) d[i] = load(patch + i / 4 * row + i % 4 * wide + c);
            in_both<4, 4, to_points>(d, p);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) store(points[i * TILES + t] + c, p[i]);
        }
    }
}

// The same of a tile's own pixels, which are four rows of `rows`.
inline void evaluate_points(const View<float>& rows, int64_t channels, int64_t count, const View<float>& points) {
    for (int64_t t = 0; t < count; t++) {
        const View<float> tile = rows.from(4 * t);
        for (int64_t c = 0; c < channels; c += WIDTH) {
            V x[4], p[16];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) x[i] = load(tile[i] + c);
            in_both<2, 4, evaluate>(x, p);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) store(points[i * TILES + t] + c, p[i]);
        }
    }
}

// A convolution to many channels: done(row, column, vector) for every vector of four rows a tile. packed: POINTS factors.
template <int P, class F>
inline void combine_panel(const View<float>& points, int64_t count, int64_t depth, const float* packed, int64_t size, const float* init,
                          const View<float>& products, const F& done) {
    for (int64_t first = 0; first < count; first += ROWS<float>) {
        for (int i = 0; i < POINTS; i++) {
            const View<float> to = products.from(i * ROWS<float>);
            multiply_on_vectors<float, P, false>(points.from(i * TILES + first).units(), ROWS<float>, depth, packed + i * size, nullptr,
                                          [&](int64_t r, int64_t c, V v) { store(to[r] + c, v); });
        }
        for (int64_t r = 0; r < min(ROWS<float>, count - first); r++) {
#pragma GCC unroll 3
            for (int v = 0; v < P; v++) {
                V m[16], y[4];
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) m[i] = load(products[i * ROWS<float> + r] + v * WIDTH);
                in_both<4, 2, combine>(m, y);
                const V start = init ? load(init + v * WIDTH) : V{};
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) done(4 * (first + r) + i, v * WIDTH, y[i] + start);
            }
        }
    }
}

template <class F>
inline void to_many(const View<float>& points, int64_t count, int64_t depth, const float* packed, int64_t columns, const float* init,
                    const View<float>& products, const F& done) {
    const int64_t size = packed_size<float>(depth, columns);
    for (int64_t i = 0; i < panel_count<float>(columns); i++) {
        const Panel p = panel<float>(columns, i);
        const int64_t column = p.first * WIDTH;
        const float *b = packed + depth * column, *start = init ? init + column : nullptr;
        const auto shifted = [&](int64_t r, int64_t c, V v) { done(r, column + c, v); };
        if (p.vectors == 3) combine_panel<3>(points, count, depth, b, size, start, products, shifted);
        if (p.vectors == 2) combine_panel<2>(points, count, depth, b, size, start, products, shifted);
        if (p.vectors == 1) combine_panel<1>(points, count, depth, b, size, start, products, shifted);
    }
}

// bordered += what tiles send to the pixels around them, from products of all points.
template <int C>
void spread_tiles(const View<float>& products, int64_t width, int64_t first, int64_t count, int64_t channels, float* bordered) {
    const int64_t n = C ? C : channels, row = (width + 2) * n, columns = width / 2;
    for (int64_t t = 0; t < count; t++) {
        float* patch = bordered + (first + t) / columns * 2 * row + (first + t) % columns * 2 * n;
        for (int64_t c = 0; c < n; c += WIDTH) {
            V m[16], s[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) m[i] = load(products[i * TILES + t] + c);
            in_both<4, 4, spread>(m, s);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) add_first(patch + i / 4 * row + i % 4 * n + c, s[i], min(WIDTH, n - c));
        }
    }
}

// A convolution to few channels, of evaluated points.
inline void to_few(const View<float>& points, int64_t count, int64_t depth, const float* packed, int64_t channels, const View<float>& products,
                   int64_t width, int64_t first, float* bordered) {
    const int64_t size = packed_size<float>(depth, channels), rows = ceil_div(count, ROWS<float>) * ROWS<float>;
    for (int i = 0; i < POINTS; i++) {
        const View<float> to = products.from(i * TILES);
        multiply<float>(points.from(i * TILES).units(), rows, depth, packed + i * size, channels, nullptr,
                        [&](int64_t r, int64_t c, V v) { store(to[r] + c, v); });
    }
    switch (channels) {
        case 6: return spread_tiles<6>(products, width, first, count, channels, bordered);
        case 12: return spread_tiles<12>(products, width, first, count, channels, bordered);
        case 24: return spread_tiles<24>(products, width, first, count, channels, bordered);
        case 48: return spread_tiles<48>(products, width, first, count, channels, bordered);
        default: return spread_tiles<0>(products, width, first, count, channels, bordered);
    }
}

}  // namespace flowkern::FLOWKERN_ISA
