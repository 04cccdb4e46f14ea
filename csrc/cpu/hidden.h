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
