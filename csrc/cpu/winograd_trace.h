// The coupling network forward on a band, with 3x3 convolutions by Winograd, for which bands have whole tiles. Hidden activations
// are in the order of squares.
#pragma once
#include "hidden.h"
#include "quads.h"

namespace flowkern::FLOWKERN_ISA {

// One thread's loop over bands, with its scratch memory.
template <class E, class Tile>
class WinogradTrace {
  public:
    WinogradTrace(const Sizes<E>& sizes, const Bands& bands, const Hidden<E>* kept)
        : s_(sizes), bands_(bands), image_(bands.bordered(), s_.few), d_(s_.few),
          hidden_(kept, Tile::PIXELS * TILES, s_.hidden_row()), sent_(s_.out) {}

    void run(const NetworkTrace& m, int64_t band, float* sums) const {
        const Bands bands = bands_;
        const Sizes<E> s = s_;
        const Folded<E> folded(s);
        const View<E> image = image_;
        const ProductsView products = products_;
        const PointsView d = d_, sent = sent_;
        const EvaluatedView x = x_;
        const float* packed = m.packed;
        const int64_t size = bands.bordered() * m.out, row = Hidden<E>::first_row(bands, band);
        load_band(bands, band, pixels_of(m.a), m.few, m.few, image[0]);
        float* to = sums + band * size;
        memset(to, 0, size * sizeof(float));
        const int64_t tiles = bands.row_count(band) * m.width / Tile::PIXELS;
        for (int64_t first = 0; first < tiles; first += TILES) {
            const int64_t count = min(TILES, tiles - first), place = Tile::PIXELS * first, pixels = Tile::PIXELS * count;
            const Hidden<E> hidden = hidden_.at(row + place);
            const View<E> h1 = hidden.first, h2 = hidden.second;
            load_points<Tile>(widened(image)[0], m.width, m.few, first, count, d);
            to_many<Tile>(d, count, m.few, packed + folded.w1, m.hidden, packed + folded.b1, products, rectified(h1));
            multiply<E>(h1.units(), ceil_div(pixels, ROWS<E>) * ROWS<E>, m.hidden, packed + folded.w2, m.hidden, packed + folded.b2,
                        rectified(h2));
            send(m, widened(h2), count, packed + folded.w3, x, sent);
            spread_products<Tile>(sent, m.width, first, count, m.out, to);
            if (m.h1) {
                copy_out(hidden, pixels, m, [&](int64_t r) { return bands.first_pixel(band) + pixel_of(place + r, m.width); });
            }
        }
        if (m.h1) end_copies_past_cache();
    }

  private:
    // Products of the last layer, of which tiles then send to the pixels around them.
    void send(const NetworkTrace& m, const View<float>& h2, int64_t count, const float* packed, const EvaluatedView& x,
              const PointsView& sent) const {
#ifdef __AVX512F__
        if (by_quads(m.hidden, m.out)) {
            for (int64_t c = 0; c < m.hidden; c += EVALUATED) {
                const int64_t channels = min(EVALUATED, m.hidden - c);
                evaluate_quads<Tile>(h2, c, channels, count, x);
                const auto add = m.out <= 4 ? add_quads<Tile, 1> : add_quads<Tile, 3>;
                add(x, c, channels, m.hidden, packed, quads_);
            }
            return part_quads<Tile>(quads_, m.out, count, sent);
        }
#endif
        each_evaluated<Tile>(h2, m.hidden, count, x, [&](const EvaluatedView& points, int64_t c, int64_t channels) {
            add_products<Tile>(points, count, c, channels, m.hidden, packed, m.out, sent);
        });
    }

    const Sizes<E>& s_;
    const Bands& bands_;
    const Rows<E> image_;
    const Points<Tile> d_;
    const Products<Tile> products_;
    const HiddenChunks<E> hidden_;
    const Points<Tile> sent_;
    const Evaluated<Tile> x_;
#ifdef __AVX512F__
    const QuadSums<Tile> quads_;
#endif
};

}  // namespace flowkern::FLOWKERN_ISA
