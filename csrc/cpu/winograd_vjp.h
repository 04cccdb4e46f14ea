// The coupling network backward on a band, with 3x3 convolutions by Winograd.
#pragma once
#include "points.h"
#include "weight_gradients.h"

namespace flowkern::FLOWKERN_ISA {

// One thread's loop over bands, with its scratch memory.
template <class E, class Tile>
class WinogradVjp {
  public:
    WinogradVjp(const WeightGradients<E>& weights, const Bands& bands, const Hidden<E>* kept)
        : w_(weights), s_(w_.s), bands_(bands), image_(bands.bordered(), s_.few), gradient_(bands.bordered(), s_.out),
          hidden_(kept, Tile::PIXELS * TILES, s_.hidden_row()),
          g1_(Tile::PIXELS * TILES, s_.hidden_row()), g2_(Tile::PIXELS * TILES, s_.hidden_row()), d_(s_.out),
          a_(s_.few), sent_(s_.few) {}

    void run(const NetworkVjp& m, int64_t band, float* sums, float* total) const {
        const Bands bands = bands_;
        const Sizes<E> s = s_;
        const Sums<E> where = w_.where;
        const View<E> image = image_, gradient = gradient_, g1 = g1_, g2 = g2_;
        const ProductsView products = products_;
        const PointsView d = d_, a = a_, sent = sent_;
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
            const int64_t count = min(TILES, tiles - first), rows = ceil_div(Tile::PIXELS * count, ROWS<E>) * ROWS<E>;
            const Hidden<E> hidden = hidden_.at(row + Tile::PIXELS * first);
            const View<E> h1 = hidden.first, h2 = hidden.second;
            if (!hidden_.kept()) {
                copy_in(m, [&](int64_t r) { return bands.first_pixel(band) + pixel_of<Tile>(Tile::PIXELS * first + r, m.width); },
                        Tile::PIXELS * count, hidden);
            }
            load_points<Tile>(widened(gradient)[0], m.width, s.out, first, count, d);
            to_many<Tile>(d, count, s.out, w_.back.w3.data(), s.hidden, nullptr, products, masked(g2, h2));
            multiply<E>(g2.units(), rows, s.hidden, w_.back.w2.data(), s.hidden, nullptr, masked(g1, h1));
            if (w_.need2) {
                add_outer<E>(g2.units(), s.hidden, h1.units(), s.hidden, Tile::PIXELS * count, total + where.w2, wide);
                add_rows(g2, 0, Tile::PIXELS * count, s.hidden, total + where.b2);
            }
            if (w_.need1) {
                load_points<Tile>(widened(image)[0], m.width, s.few, first, count, a);
                add_rows(g1, 0, Tile::PIXELS * count, s.hidden, total + where.b1);
            }
            for (int64_t c = 0; c < s.hidden; c += EVALUATED) {
                const int64_t channels = min(EVALUATED, s.hidden - c);
                const auto add_outers = [&](const PointsView& few, int64_t rows, float* to) {
                    for (int64_t i = 0; i < Tile::POINTS; i++, to += rows * wide) {
                        add_outer<E>(few[i].units(), rows, x[i].units(), channels, count, to, wide);
                    }
                };
                if (w_.need3) {
                    evaluate_points<Tile>(widened(h2), c, channels, count, x);
                    add_outers(d, s.out, total + where.w3 + c);
                }
                evaluate_points<Tile>(widened(g1), c, channels, count, x);
                if (w_.need1) add_outers(a, s.few, total + where.w1 + c);
                add_products<Tile>(x, count, c, channels, s.hidden, w_.back.w1.data(), s.few, sent);
            }
            spread_products<Tile>(sent, m.width, first, count, s.few, to);
        }
    }

  private:
    const WeightGradients<E>& w_;
    const Sizes<E>& s_;
    const Bands& bands_;
    const Rows<E> image_, gradient_;
    const Products<Tile> products_;
    const HiddenChunks<E> hidden_;
    const Rows<E> g1_, g2_;
    const Points<Tile> d_, a_, sent_;
    const Evaluated<Tile> x_;
};

}  // namespace flowkern::FLOWKERN_ISA
