// 3x3 convolutions as products of points: arrays of the tiles' numbers before and after them (winograd.h).
#pragma once
#include "product.h"
#include "taps.h"
#include "winograd.h"

namespace flowkern::FLOWKERN_ISA {

constexpr int64_t TILES = 16;             // of a chunk
constexpr int64_t EVALUATED = 9 * WIDTH;  // hidden channels at once

// A chunk's rows of tiles for each point.
template <class R>
struct PointsIn {
    R rows;

    R operator[](int64_t point) const { return rows.from(point * TILES); }
};
using PointsView = PointsIn<View<float>>;
using EvaluatedView = PointsIn<FixedView<EVALUATED>>;

// Scratch memory for them, an odd number of cache lines a row, so that points don't collide.
template <class Tile>
struct Points : PointsView {
    explicit Points(int64_t channels) : PointsView{{}}, memory_(Tile::POINTS * TILES, padded<float>(channels) | WIDTH) { rows = memory_; }

  private:
    const Rows<float> memory_;
};
template <class Tile>
struct Evaluated : EvaluatedView {
    Evaluated() : EvaluatedView{}, memory_(Tile::POINTS * TILES, EVALUATED) { rows = {memory_.data}; }

  private:
    const Rows<float> memory_;
};

// Products of a few tiles at all points, for one panel of columns.
using ProductsView = FixedView<VECTORS<float> * WIDTH>;
template <class Tile>
struct Products : ProductsView {
    Products() : ProductsView{}, memory_(Tile::POINTS * ROWS<float>, VECTORS<float> * WIDTH) { data = memory_.data; }

  private:
    const Rows<float> memory_;
};

// The pixel, counted from a band's first, that is at a place in the order of squares.
inline int64_t pixel_of(int64_t place, int64_t width) {
    const int64_t square = place / 4, i = place % 4;
    return (square / (width / 2) * 2 + i / 2) * width + square % (width / 2) * 2 + i % 2;
}

// Where the patch of a tile begins in a bordered band of `channels` numbers a pixel.
template <class Tile>
int64_t patch_of(int64_t tile, int64_t width, int64_t channels) {
    const int64_t columns = width / Tile::X;
    return (tile / columns * Tile::Y * (width + 2) + tile % columns * Tile::X) * channels;
}

// The first n numbers of a vector, the others zero.
inline Vec load_first(const float* from, int64_t n) {
    if (n == WIDTH) return load(from);
#ifdef __AVX512F__
    return Vec(_mm512_maskz_loadu_ps(uint16_t((1u << n) - 1), from));
#else
    Vec v{};
    for (int64_t l = 0; l < n; l++) v[l] = from[l];
    return v;
#endif
}
inline void store_first(float* to, Vec v, int64_t n) {
    if (n == WIDTH) return store(to, v);
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(to, uint16_t((1u << n) - 1), __m512(v));
#else
    for (int64_t l = 0; l < n; l++) to[l] = v[l];
#endif
}

// What `count` tiles of a bordered band from the one numbered `first` on are products of.
template <class Tile>
void load_points(const float* bordered, int64_t width, int64_t channels, int64_t first, int64_t count, const PointsView& points) {
    const int64_t row = (width + 2) * channels;
    for (int64_t t = 0; t < count; t++) {
        const float* patch = bordered + patch_of<Tile>(first + t, width, channels);
        for (int64_t c = 0; c < channels; c += WIDTH) {
            Vec d[Tile::POINTS], p[Tile::POINTS];
#pragma GCC unroll 24
            for (int i = 0; i < Tile::POINTS; i++) d[i] = load(patch + i / Tile::PATCH_X * row + i % Tile::PATCH_X * channels + c);
            Tile::to_points(d, p);
#pragma GCC unroll 24
            for (int i = 0; i < Tile::POINTS; i++) store(points[i][t] + c, p[i]);
        }
    }
}

// The same of a tile's own pixels, which are rows of `rows`, and of `channels` from the first one on.
template <class Tile>
void evaluate_points(const View<float>& rows, int64_t first, int64_t channels, int64_t count, const EvaluatedView& points) {
    for (int64_t t = 0; t < count; t++) {
        const View<float> tile = rows.from(Tile::PIXELS * t);
        for (int64_t c = 0; c < channels; c += WIDTH) {
            Vec x[Tile::PIXELS], p[Tile::POINTS];
#pragma GCC unroll 8
            for (int i = 0; i < Tile::PIXELS; i++) x[i] = load(tile[Tile::place_of(i)] + first + c);
            Tile::evaluate(x, p);
#pragma GCC unroll 24
            for (int i = 0; i < Tile::POINTS; i++) store(points[i][t] + c, p[i]);
        }
    }
}

// f(points, first channel, how many) for all of the hidden channels, some at once, of `count` tiles' pixels.
template <class Tile, class F>
void each_evaluated(const View<float>& rows, int64_t hidden, int64_t count, const EvaluatedView& points, const F& f) {
    for (int64_t c = 0; c < hidden; c += EVALUATED) {
        const int64_t channels = min(EVALUATED, hidden - c);
        evaluate_points<Tile>(rows, c, channels, count, points);
        f(points, c, channels);
    }
}

// A convolution to many channels: done(row, column, vector) for every vector of a tile's rows. packed: a factor for each point.
template <class Tile, int P, class F>
inline void combine_panel(const PointsView& points, int64_t count, int64_t depth, const float* packed, int64_t size, const float* init,
                          const ProductsView& products, const F& done) {
    for (int64_t first = 0; first < count; first += ROWS<float>) {
        for (int i = 0; i < Tile::POINTS; i++) {
            const ProductsView to = products.from(i * ROWS<float>);
            multiply_on_vectors<float, P, false>(points[i].from(first).units(), ROWS<float>, depth, packed + i * size, nullptr,
                                                [&](int64_t r, int64_t c, Vec v) { store(to[r] + c, v); });
        }
        for (int64_t r = 0; r < min(ROWS<float>, count - first); r++) {
#pragma GCC unroll 3
            for (int v = 0; v < P; v++) {
                Vec m[Tile::POINTS], y[Tile::PIXELS];
#pragma GCC unroll 24
                for (int i = 0; i < Tile::POINTS; i++) m[i] = load(products[i * ROWS<float> + r] + v * WIDTH);
                Tile::combine(m, y);
                const Vec start = init ? load(init + v * WIDTH) : Vec{};
#pragma GCC unroll 8
                for (int i = 0; i < Tile::PIXELS; i++) done(Tile::PIXELS * (first + r) + Tile::place_of(i), v * WIDTH, y[i] + start);
            }
        }
    }
}

template <class Tile, class F>
void to_many(const PointsView& points, int64_t count, int64_t depth, const float* packed, int64_t columns, const float* init,
             const ProductsView& products, const F& done) {
    const int64_t size = packed_size<float>(depth, columns);
    each_panel<float>(columns, [&](auto vectors, int64_t column) {
        combine_panel<Tile, decltype(vectors)::value>(points, count, depth, packed + depth * column, size, init ? init + column : nullptr, products,
                                                [&](int64_t r, int64_t c, Vec v) { done(r, column + c, v); });
    });
}

// bordered += what tiles send to the pixels around them, from products of all points. The last two columns are the next tile's
// too: they wait in registers, so that no number is read back right after it was written, for which a processor has to wait; nor
// one beside it, since of a masked vector's lanes some processors can't tell which were written (Zen 4).
template <class Tile, int C>
void spread_tiles(const PointsView& products, int64_t width, int64_t first, int64_t count, int64_t channels, float* bordered) {
    const int64_t n = C ? C : channels, row = (width + 2) * n, columns = width / Tile::X;
    for (int64_t c = 0; c < n; c += WIDTH) {
        const int64_t size = min(WIDTH, n - c);
        Vec waiting[Tile::PATCH_Y][2] = {};
        for (int64_t t = 0; t < count; t++) {
            float* patch = bordered + patch_of<Tile>(first + t, width, n) + c;
            Vec m[Tile::POINTS], s[Tile::POINTS];
#pragma GCC unroll 24
            for (int i = 0; i < Tile::POINTS; i++) m[i] = load(products[i][t] + c);
            Tile::spread(m, s);
            const bool last = (first + t + 1) % columns == 0 || t + 1 == count;
#pragma GCC unroll 4
            for (int y = 0; y < Tile::PATCH_Y; y++, patch += row) {
                const Vec* sent = s + y * Tile::PATCH_X;
                Vec sum[Tile::X];
#pragma GCC unroll 4
                for (int x = 0; x < Tile::X; x++) sum[x] = load_first(patch + x * n, size) + (x < 2 ? waiting[y][x] + sent[x] : sent[x]);
#pragma GCC unroll 2
                for (int x = 0; x < 2; x++) waiting[y][x] = sent[Tile::X + x];
#pragma GCC unroll 4
                for (int x = 0; x < Tile::X; x++) store_first(patch + x * n, sum[x], size);
                if (!last) continue;
#pragma GCC unroll 2
                for (int x = 0; x < 2; x++) {
                    float* next = patch + (Tile::X + x) * n;
                    store_first(next, load_first(next, size) + waiting[y][x], size);
                    waiting[y][x] = Vec{};
                }
            }
        }
    }
}

// A convolution to few channels: products of evaluated points, `count` channels of `depth` from the one numbered `first` on, of
// which the first ones begin the sums that `spread` is for.
template <class Tile>
void add_products(const EvaluatedView& points, int64_t tiles, int64_t first, int64_t count, int64_t depth, const float* packed,
                  int64_t channels, const PointsView& products) {
    const int64_t size = packed_size<float>(depth, channels), rows = ceil_div(tiles, ROWS<float>) * ROWS<float>;
    for (int i = 0; i < Tile::POINTS; i++) {
        const View<float> to = products[i];
        multiply_some<float>(points[i].units(), rows, first, count, depth, packed + i * size, channels, nullptr,
                             [&](int64_t r, int64_t c, Vec v) { store(to[r] + c, first ? load(to[r] + c) + v : v); });
    }
}

template <class Tile>
void spread_products(const PointsView& products, int64_t width, int64_t first, int64_t count, int64_t channels, float* bordered) {
    switch (channels) {
        case 6: return spread_tiles<Tile, 6>(products, width, first, count, channels, bordered);
        case 12: return spread_tiles<Tile, 12>(products, width, first, count, channels, bordered);
        case 24: return spread_tiles<Tile, 24>(products, width, first, count, channels, bordered);
        case 48: return spread_tiles<Tile, 48>(products, width, first, count, channels, bordered);
        default: return spread_tiles<Tile, 0>(products, width, first, count, channels, bordered);
    }
}

}  // namespace flowkern::FLOWKERN_ISA
