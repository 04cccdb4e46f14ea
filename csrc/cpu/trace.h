// The coupling network forward, on chunks of a band's pixels (network.cpp says which products).
#pragma once
#include "taps.h"
#include "weights.h"

namespace flowkern::FLOWKERN_ISA {

// Pixels, a multiple of ROWS. Sums over pixels leave a tile after each chunk, which larger chunks make up for.
template <class E>
constexpr int64_t CHUNK = TILED<E> ? 128 : 64;

// Both hidden activations of some images, in rows as products want them: whole blocks of rows a band.
template <class E>
struct Hidden {
    View<E> first, second;

    static int64_t rows_of_band(const Bands& bands, int64_t band) {
        return ceil_div(bands.row_count(band) * bands.width, ROWS<E>) * ROWS<E>;
    }
    static int64_t rows_of_image(const Bands& bands) {  // whose last band may be smaller
        const int64_t last = bands.per_image - 1;
        return last * rows_of_band(bands, 0) + rows_of_band(bands, last);
    }
    static int64_t first_row(const Bands& bands, int64_t band) {
        return bands.sample(band) * rows_of_image(bands) + band % bands.per_image * rows_of_band(bands, 0);
    }
};

// Images given by a pointer and strides, or dense ones.
inline auto pixels_of(const Image& image) {
    return [=](int64_t n, int64_t y, int64_t x) {
        return static_cast<const float*>(image.data) + n * image.sample + y * image.row + x * image.pixel;
    };
}
template <class E>
auto dense_pixels(const void* data, const Bands& bands, int64_t channels) {
    return [=](int64_t n, int64_t y, int64_t x) {
        return static_cast<const E*>(data) + ((n * bands.height + y) * bands.width + x) * channels;
    };
}

// What a product does with its sums: a ReLU, in which NaN stays.
template <class E>
auto rectified(const View<E>& to) {
    return [to](int64_t r, int64_t c, Vector<float> v) { store_numbers(to[r] + c, v < 0 ? Vector<float>{} : v); };
}

// The loop over bands, with one thread's scratch memory.
template <class E>
class TraceBands {
  public:
    // kept: where hidden activations are left, or null.
    TraceBands(const Sizes<E>& sizes, const Bands& bands, const Hidden<E>* kept)
        : s_(sizes), bands_(bands), kept_(kept), wide_(s_.few_units * PER_UNIT<E>), taps_(padded<float>(9 * s_.out) | WIDTH),
          image_(bands.bordered(), wide_), x_(CHUNK<E>, s_.row(9 * s_.few_units)), h1_(kept ? 0 : CHUNK<E>, s_.hidden_row()),
          h2_(kept ? 0 : CHUNK<E>, s_.hidden_row()), sent_(CHUNK<E>, taps_) {}

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
            const View<E> h1 = kept_ ? kept_->first.from(row + first) : View<E>(h1_);
            const View<E> h2 = kept_ ? kept_->second.from(row + first) : View<E>(h2_);
            gather_taps(image.units().data, m.width, s.few_units, first, count, x.units());
            multiply<E>(x.units(), rows, 9 * s.few_units, packed + folded.w1, m.hidden, packed + folded.b1, rectified(h1));
            multiply<E>(h1.units(), rows, s.hidden_units, packed + folded.w2, m.hidden, packed + folded.b2, rectified(h2));
            multiply<E>(h2.units(), rows, s.hidden_units, packed + folded.w3, 9 * m.out, nullptr,
                        [&](int64_t r, int64_t c, Vector<float> v) { store(sent[r] + c, v); });
            scatter(sent[0], taps_, m.width, first, count, m.out, to);
            if (!m.h1) continue;
            const int64_t pixel = bands.first_pixel(band) + first;
            for (int64_t p = 0; p < count; p++) {
                copy_past_cache(static_cast<Stored<E>*>(m.h1) + (pixel + p) * m.hidden, h1[p], m.hidden);
                copy_past_cache(static_cast<Stored<E>*>(m.h2) + (pixel + p) * m.hidden, h2[p], m.hidden);
            }
        }
        if (m.h1) end_copies_past_cache();
    }

  private:
    const Sizes<E>& s_;
    const Bands& bands_;
    const Hidden<E>* const kept_;
    const int64_t wide_, taps_;
    [[maybe_unused]] Tiles<E> tiles_;
    const Rows<E> image_, x_, h1_, h2_;
    const Rows<float> sent_;
};

}  // namespace flowkern::FLOWKERN_ISA
