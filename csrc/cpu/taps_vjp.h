// The coupling network backward on a band, by sums over taps, on chunks of its pixels (network.cpp says which products).
#pragma once
#include "weight_gradients.h"

namespace flowkern::FLOWKERN_ISA {

// One thread's loop over bands, with its scratch memory.
template <class E>
class TapsVjp {
  public:
    // kept: hidden activations, or null.
    TapsVjp(const WeightGradients<E>& weights, const Bands& bands, const Hidden<E>* kept)
        : w_(weights), s_(w_.s), bands_(bands), few_(s_.few_units * PER_UNIT<E>), out_(s_.out_units * PER_UNIT<E>),
          taps_(padded<float>(9 * s_.few) | WIDTH), image_(bands.bordered(), few_), gradient_(bands.bordered(), out_),
          x_(CHUNK<E>, s_.row(9 * s_.few_units)), d_(CHUNK<E>, s_.row(9 * s_.out_units)), 
          hidden_(kept, CHUNK<E>, s_.hidden_row()), g1_(CHUNK<E>, s_.hidden_row()), g2_(CHUNK<E>, s_.hidden_row()), sent_(CHUNK<E>, taps_),
          outer_(CHUNK<E>, max(max(9 * few_, 9 * out_), s_.hidden), s_.hidden) {}

    // Adds weights' gradients to `total`, and puts what the band's pixels send to their neighbours into its `sums`. Hidden
    // activations are those of `m` if none are kept.
    void run(const NetworkVjp& m, int64_t band, float* sums, float* total) const {
        const Bands bands = bands_;
        const Network& n = m.network;
        const Sizes<E> s = s_;
        const Sums<E> where = w_.where;
        // Copies, because compilers must assume that each store changes members, and would load them again.
        const View<E> image = image_, gradient = gradient_, x = x_, d = d_, g1 = g1_, g2 = g2_;
        const View<float> sent = sent_;
        const int64_t size = bands.bordered() * n.few, row = Hidden<E>::first_row(bands, band);
        load_band(bands, band, pixels_of(m.a), n.few, few_, image[0]);
        load_band(bands, band, dense_pixels<Stored<E>>(m.dh, bands, n.out), n.out, out_, gradient[0]);
        float* to = sums + band * size;
        memset(to, 0, size * sizeof(float));
        const int64_t pixels = bands.row_count(band) * m.width;
        for (int64_t first = 0; first < pixels; first += CHUNK<E>) {
            const int64_t count = min(CHUNK<E>, pixels - first), rows = ceil_div(count, ROWS<E>) * ROWS<E>;
            const Hidden<E> hidden = hidden_.at(row + first);
            const View<E> h1 = hidden.first, h2 = hidden.second;
            if (!hidden_.kept()) copy_in(m, [&](int64_t r) { return bands.first_pixel(band) + first + r; }, count, hidden);
            gather_taps(gradient.units().data, m.width, s.out_units, first, count, d.units());
            // Sums are over whole blocks of pixels: gradients are zero beyond the last, so that nothing comes of the rest.
            for (int64_t p = count; p < rows; p++) memset(d[p], 0, d.row * sizeof(E));
            multiply<E>(d.units(), rows, 9 * s.out_units, w_.back.w3.data(), n.hidden, nullptr, masked(g2, h2));
            if (w_.need3) {
                outer_.add(d, 9 * out_, h2, n.hidden, rows, total + where.w3);
                add_rows(d, 4 * out_, count, n.out, total + where.b3);
            }
            multiply<E>(g2.units(), rows, s.hidden_units, w_.back.w2.data(), n.hidden, nullptr, masked(g1, h1));
            if (w_.need2) {
                outer_.add(g2, n.hidden, h1, n.hidden, rows, total + where.w2);
                add_rows(g2, 0, count, s.hidden, total + where.b2);
            }
            if (w_.need1) {
                gather_taps(image.units().data, m.width, s.few_units, first, count, x.units());
                for (int64_t p = count; p < rows; p++) memset(x[p], 0, x.row * sizeof(E));
                outer_.add(x, 9 * few_, g1, n.hidden, rows, total + where.w1);
                add_rows(g1, 0, count, s.hidden, total + where.b1);
            }
            multiply<E>(g1.units(), rows, s.hidden_units, w_.back.w1.data(), 9 * n.few, nullptr,
                        [&](int64_t r, int64_t c, Vector<float> v) { store(sent[r] + c, v); });
            scatter(sent[0], taps_, m.width, first, count, n.few, to);
        }
    }

  private:
    const WeightGradients<E>& w_;
    const Sizes<E>& s_;
    const Bands& bands_;
    const int64_t few_, out_, taps_;
    [[maybe_unused]] Tiles<E> tiles_;
    const Rows<E> image_, gradient_, x_, d_;
    const HiddenChunks<E> hidden_;
    const Rows<E> g1_, g2_;
    const Rows<float> sent_;
    const OuterProduct<E> outer_;
};

}  // namespace flowkern::FLOWKERN_ISA
