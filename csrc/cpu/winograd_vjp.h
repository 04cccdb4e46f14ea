// The coupling network backward on a band, with 3x3 convolutions by Winograd.
#pragma once
#include "points.h"
#include "weight_gradients.h"

namespace flowkern::FLOWKERN_ISA {

// One thread's loop over bands, with its scratch memory. The weights' gradients are sums over squares whatever the tiles:
// filters of four numbers would make them less exact.
template <class E, class Tile>
class WinogradVjp {
  public:
    WinogradVjp(const WeightGradients<E>& weights, const Bands& bands, const Hidden<E>* kept)
        : w_(weights), s_(w_.s), bands_(bands), image_(bands.bordered(), s_.few), gradient_(bands.bordered(), s_.out),
          hidden_(kept, CHUNK, s_.hidden_row()), g1_(CHUNK, s_.hidden_row()), g2_(CHUNK, s_.hidden_row()), d_(s_.out),
          few_(max(s_.few, s_.out)), sent_(s_.few) {}

    void run(const NetworkVjp& m, int64_t band, float* sums, float* total) const {
        const Bands bands = bands_;
        const Sizes<E> s = s_;
        const Sums<E> where = w_.where;
        const View<E> image = image_, gradient = gradient_, g1 = g1_, g2 = g2_;
        const ProductsView products = products_;
        const PointsView d = d_, sent = sent_;
        const EvaluatedView x = x_;
        const int64_t size = bands.bordered() * s.few, row = Hidden<E>::first_row(bands, band), wide = padded<float>(s.hidden);
        load_band(bands, band, pixels_of(m.a), s.few, s.few, image[0]);
        load_band(bands, band, dense_pixels<Stored<E>>(m.dh, bands, s.out), s.out, s.out, gradient[0]);
        float* to = sums + band * size;
        memset(to, 0, size * sizeof(float));
        if (w_.need3) {
            for (int64_t r = 1; r <= bands.row_count(band); r++) {
                add_rows(gradient.from(r * (m.width + 2) + 1), 0, m.width, s.out, total + where.b3);
            }
        }
        const int64_t tiles = bands.row_count(band) * m.width / Tile::PIXELS;
        for (int64_t first = 0; first < tiles; first += TILES) {
            const int64_t count = min(TILES, tiles - first), place = Tile::PIXELS * first, pixels = Tile::PIXELS * count;
            const Hidden<E> hidden = hidden_.at(row + place);
            const View<E> h1 = hidden.first, h2 = hidden.second;
            if (!hidden_.kept()) {
                copy_in(m, [&](int64_t r) { return bands.first_pixel(band) + pixel_of(place + r, m.width); }, pixels, hidden);
            }
            load_points<Tile>(widened(gradient)[0], m.width, s.out, first, count, d);
            to_many<Tile>(d, count, s.out, w_.back.w3.data(), s.hidden, nullptr, products, masked(g2, h2));
            multiply<E>(g2.units(), ceil_div(pixels, ROWS<E>) * ROWS<E>, s.hidden, w_.back.w2.data(), s.hidden, nullptr, masked(g1, h1));
            if (w_.need3) add_squares(gradient, s.out, m.width, place, h2, pixels, total + where.w3);
            if (w_.need2) {
                add_outer<E>(g2.units(), s.hidden, h1.units(), s.hidden, pixels, total + where.w2, wide);
                add_rows(g2, 0, pixels, s.hidden, total + where.b2);
            }
            if (w_.need1) {
                add_squares(image, s.few, m.width, place, g1, pixels, total + where.w1);
                add_rows(g1, 0, pixels, s.hidden, total + where.b1);
            }
            each_evaluated<Tile>(widened(g1), s.hidden, count, x, [&](const EvaluatedView& points, int64_t c, int64_t channels) {
                add_products<Tile>(points, count, c, channels, s.hidden, w_.back.w1.data(), s.few, sent);
            });
            spread_products<Tile>(sent, m.width, first, count, s.few, to);
        }
    }

  private:
    static constexpr int64_t CHUNK = Tile::PIXELS * TILES;

    // total += products of a bordered array's points and those of hidden activations, at squares from a place in the band on.
    void add_squares(const View<E>& bordered, int64_t channels, int64_t width, int64_t place, const View<E>& hidden, int64_t pixels,
                     float* total) const {
        constexpr int64_t MOST = Square::PIXELS * TILES;
        const PointsView few = few_;
        const int64_t wide = padded<float>(s_.hidden);
        for (int64_t p = 0; p < pixels; p += MOST) {
            const int64_t count = min(MOST, pixels - p) / Square::PIXELS;
            load_points<Square>(widened(bordered)[0], width, channels, (place + p) / Square::PIXELS, count, few);
            each_evaluated<Square>(widened(hidden.from(p)), s_.hidden, count, x_, [&](const EvaluatedView& x, int64_t c, int64_t columns) {
                float* to = total + c;
                for (int64_t i = 0; i < Square::POINTS; i++, to += channels * wide) {
                    add_outer<E>(few[i].units(), channels, x[i].units(), columns, count, to, wide);
                }
            });
        }
    }

    const WeightGradients<E>& w_;
    const Sizes<E>& s_;
    const Bands& bands_;
    const Rows<E> image_, gradient_;
    const Products<Tile> products_;
    const HiddenChunks<E> hidden_;
    const Rows<E> g1_, g2_;
    const Points<Tile> d_;
    const Points<Square> few_;
    const Points<Tile> sent_;
    const Evaluated<Tile> x_;
};

}  // namespace flowkern::FLOWKERN_ISA
