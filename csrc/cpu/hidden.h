// What the loops over bands of the coupling network share: images, and hidden activations.
#pragma once
#include "taps.h"
#include "weights.h"

namespace flowkern::FLOWKERN_ISA {

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

// Where a loop over bands has them, chunk by chunk: in the images' own rows if they are kept, else one chunk after the other in
// scratch arrays of `rows` rows.
template <class E>
class HiddenChunks {
  public:
    HiddenChunks(const Hidden<E>* kept, int64_t rows, int64_t row)
        : kept_(kept), first_(kept ? 0 : rows, row), second_(kept ? 0 : rows, row) {}
    bool kept() const { return kept_; }
    // Of the chunk that begins with a row of the images'.
    Hidden<E> at(int64_t row) const {
        return kept_ ? Hidden<E>{kept_->first.from(row), kept_->second.from(row)} : Hidden<E>{first_, second_};
    }

  private:
    const Hidden<E>* const kept_;
    const Rows<E> first_, second_;
};

// A chunk's hidden activations to the arrays that callers see, past the cache, and back. pixel(row): its number there.
template <class E, class F>
void copy_out(const Hidden<E>& from, int64_t count, const NetworkTrace& m, const F& pixel) {
    for (int64_t r = 0; r < count; r++) {
        const int64_t at = pixel(r) * m.hidden;
        copy_past_cache(static_cast<Stored<E>*>(m.h1) + at, from.first[r], m.hidden);
        copy_past_cache(static_cast<Stored<E>*>(m.h2) + at, from.second[r], m.hidden);
    }
}
template <class E, class F>
void copy_in(const NetworkVjp& m, const F& pixel, int64_t count, const Hidden<E>& to) {
    const int64_t hidden = m.network.hidden;
    for (int64_t r = 0; r < count; r++) {
        const int64_t at = pixel(r) * hidden;
        convert_numbers(static_cast<const Stored<E>*>(m.h1) + at, to.first[r], hidden);
        convert_numbers(static_cast<const Stored<E>*>(m.h2) + at, to.second[r], hidden);
    }
}

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

}  // namespace flowkern::FLOWKERN_ISA
