// The coupling network forward on a band, by sums over taps, on chunks of its pixels (network.cpp says which products).
#pragma once
#include "hidden.h"
#include "product.h"

namespace flowkern::FLOWKERN_ISA {

// One thread's loop over bands, with its scratch memory.
template <class E>
class TapsTrace {
  public:
    // kept: where hidden activations are left, or null.
    TapsTrace(const Sizes<E>& sizes, const Bands& bands, const Hidden<E>* kept)
        : s_(sizes), bands_(bands), wide_(s_.few_units * PER_UNIT<E>), taps_(padded<float>(9 * s_.out) | WIDTH),
          image_(bands.bordered(), wide_), x_(CHUNK<E>, s_.row(9 * s_.few_units)), 
          hidden_(kept, CHUNK<E>, s_.hidden_row()), sent_(CHUNK<E>, taps_) {}

    // What the band's pixels send to their neighbours, into its `sums`; and hidden activations into those of `m`.
    void run(const NetworkTrace& m, int64_t band, float* sums) const {
        const Bands bands = bands_;
        const Sizes<E> s = s_;
        const Folded<E> folded(s);
        // Copies, because compilers must assume that each store changes members, and would load them again.
        const View<E> image = image_, x = x_;
        const View<float> sent = sent_;
        const float* packed = m.packed;
        const int64_t size = bands.bordered() * m.out, row = Hidden<E>::first_row(bands, band);
        load_band(bands, band, pixels_of(m.a), m.few, wide_, image[0]);
        float* to = sums + band * size;
        memset(to, 0, size * sizeof(float));
        const int64_t pixels = bands.row_count(band) * m.width;
        for (int64_t first = 0; first < pixels; first += CHUNK<E>) {
            const int64_t count = min(CHUNK<E>, pixels - first), rows = ceil_div(count, ROWS<E>) * ROWS<E>;
            const Hidden<E> hidden = hidden_.at(row + first);
            const View<E> h1 = hidden.first, h2 = hidden.second;
            gather_taps(image.units().data, m.width, s.few_units, first, count, x.units());
            multiply<E>(x.units(), rows, 9 * s.few_units, packed + folded.w1, m.hidden, packed + folded.b1, rectified(h1));
            multiply<E>(h1.units(), rows, s.hidden_units, packed + folded.w2, m.hidden, packed + folded.b2, rectified(h2));
            multiply<E>(h2.units(), rows, s.hidden_units, packed + folded.w3, 9 * m.out, nullptr,
                        [&](int64_t r, int64_t c, Vector<float> v) { store(sent[r] + c, v); });
            scatter(sent[0], taps_, m.width, first, count, m.out, to);
            if (m.h1) copy_out(hidden, count, m, [&](int64_t r) { return bands.first_pixel(band) + first + r; });
        }
        if (m.h1) end_copies_past_cache();
    }

  private:
    const Sizes<E>& s_;
    const Bands& bands_;
    const int64_t wide_, taps_;
    [[maybe_unused]] Tiles<E> tiles_;
    const Rows<E> image_, x_;
    const HiddenChunks<E> hidden_;
    const Rows<float> sent_;
};

}  // namespace flowkern::FLOWKERN_ISA
