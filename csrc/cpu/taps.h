// 3x3 convolutions as matrix products: what a pixel's neighbours send to it is gathered into a row before a product, or
// what it sends to them is added up after one.
//
// Work is divided into bands of an image's rows. How, depends on the image's size alone, so that the thread count changes
// no bit. Arrays of a band have a border of one pixel.
#pragma once
#include "factors.h"

namespace flowkern::FLOWKERN_ISA {

struct Bands {
    int64_t samples, height, width, rows, per_image;

    Bands(int64_t samples, int64_t height, int64_t width)
        : samples(samples), height(height), width(width), rows(min(height, max(2, 256 / width / 2 * 2))),
          per_image(ceil_div(height, rows)) {}
    int64_t count() const { return samples * per_image; }
    int64_t sample(int64_t band) const { return band / per_image; }
    int64_t first_row(int64_t band) const { return band % per_image * rows; }
    int64_t row_count(int64_t band) const { return min(rows, height - first_row(band)); }
    int64_t first_pixel(int64_t band) const { return (sample(band) * height + first_row(band)) * width; }
    int64_t bordered() const { return (rows + 2) * (width + 2); }  // pixels
};

// Pixels that are taken through all layers together, a multiple of ROWS. Sums over pixels leave a tile after each chunk, which larger chunks make up for.
template <class E>
constexpr int64_t CHUNK = TILED<E> ? 128 : 64;

// Copies n numbers by whole vectors: up to a vector too many are read and written.
inline void copy_vectors(float* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) store(to + i, load(from + i));
}

inline void convert_numbers(const float* from, float* to, int64_t n) { memcpy(to, from, n * sizeof(float)); }
inline void convert_numbers(const BFloat16* from, BFloat16* to, int64_t n) { memcpy(to, from, n * sizeof(BFloat16)); }
template <class From, class To>
inline void convert_numbers(const From* from, To* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) convert(from[i], to[i]);
}

// A band of an image and its border, zero outside of the image; `wide` >= channels numbers a pixel, the rest zero.
// pixel(sample, row, column) points at a pixel's channels.
template <class E, class F>
void load_band(const Bands& bands, int64_t band, const F& pixel, int64_t channels, int64_t wide, E* to) {
    const int64_t sample = bands.sample(band), top = bands.first_row(band) - 1, row = (bands.width + 2) * wide;
    for (int64_t r = 0; r < bands.row_count(band) + 2; r++, to += row) {
        const int64_t y = top + r;
        memset(to, 0, row * sizeof(E));
        if (y < 0 || y >= bands.height) continue;
        for (int64_t x = 0; x < bands.width; x++) convert_numbers(pixel(sample, y, x), to + (x + 1) * wide, channels);
    }
}

// For `count` pixels of a band from the one numbered `first` on, rows of the nine neighbours' units. `wide`: units of a
// pixel. Rows are written by whole vectors, in order, and padded with a vector of zeros for products of whole tiles.
inline void gather_taps(const float* bordered, int64_t width, int64_t wide, int64_t first, int64_t count, Units to) {
    const int64_t row = (width + 2) * wide;
    float* taps = const_cast<float*>(to.data);
    int64_t x = first % width;
    const float* from = bordered + first / width * row + x * wide;
    for (int64_t p = 0; p < count; p++, taps += to.stride) {
        for (int64_t dy = 0; dy < 3; dy++) copy_vectors(taps + dy * 3 * wide, from + dy * row, 3 * wide);
        store(taps + 9 * wide, Vector<float>{});
        from += ++x == width ? 3 * wide : wide;
        if (x == width) x = 0;
    }
}

// bordered += what `count` pixels from `first` on send to their nine neighbours: taps (count, 9, channels), rows `stride`
// apart. Sums along a row of taps are taken first, so that no number is read back right after it was written.
template <int C>
void scatter_taps(const float* taps, int64_t stride, int64_t width, int64_t first, int64_t count, int64_t channels, float* bordered) {
    const int64_t n = C ? C : channels;
    for (int64_t done = 0; done < count;) {
        const int64_t y = (first + done) / width, begin = (first + done) % width, end = min(width, begin + count - done);
        for (int64_t dy = 0; dy < 3; dy++) {
            float* to = bordered + ((y + dy) * (width + 2) + begin) * n;
            for (int64_t x = begin; x < end + 2; x++, to += n) {
                // The tap that reaches column x of the border's count from the pixel at x - dx.
                const float* from = taps + (done + x - begin) * stride + dy * 3 * n;
                const int64_t last = x - begin, left = x - end;
                if (left < 0 && last >= 2) {
                    const float *one = from - stride + n, *two = from - 2 * stride + 2 * n;
#pragma omp simd
                    for (int64_t c = 0; c < n; c++) to[c] += from[c] + one[c] + two[c];
                    continue;
                }
                for (int64_t dx = 0; dx < 3; dx++) {
                    if (dx > last || dx <= left) continue;
                    for (int64_t c = 0; c < n; c++) to[c] += from[dx * (n - stride) + c];
                }
            }
        }
        done += end - begin;
    }
}

inline void scatter(const float* taps, int64_t stride, int64_t width, int64_t first, int64_t count, int64_t channels, float* bordered) {
    switch (channels) {
        case 6: return scatter_taps<6>(taps, stride, width, first, count, channels, bordered);
        case 12: return scatter_taps<12>(taps, stride, width, first, count, channels, bordered);
        case 24: return scatter_taps<24>(taps, stride, width, first, count, channels, bordered);
        case 48: return scatter_taps<48>(taps, stride, width, first, count, channels, bordered);
        default: return scatter_taps<0>(taps, stride, width, first, count, channels, bordered);
    }
}

// After `scatter` over all bands: done(sample, row, sums) for every row of a band, with what neighbouring bands sent there.
template <class F>
void finish_band(const Bands& bands, int64_t band, float* bordered, int64_t channels, const F& done) {
    const int64_t size = bands.bordered() * channels, row = (bands.width + 2) * channels, rows = bands.row_count(band);
    const int64_t place = band % bands.per_image;
    float* own = bordered + band * size;
    const auto add = [&](float* sums, const float* sent) {
        for (int64_t i = 0; i < bands.width * channels; i++) sums[i] += sent[i];
    };
    for (int64_t r = 0; r < rows; r++) {
        float* sums = own + (r + 1) * row + channels;
        if (r == 0 && place > 0) add(sums, own - size + (bands.rows + 1) * row + channels);
        if (r + 1 == rows && place + 1 < bands.per_image) add(sums, own + size + channels);
        done(bands.sample(band), bands.first_row(band) + r, sums);
    }
}

}  // namespace flowkern::FLOWKERN_ISA
