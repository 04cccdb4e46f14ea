// Matrix products on tiles of pixels: the channel mix, and the outer products of its gradient.
//
// A tile is TILE rows of `channels` numbers in scratch memory, contiguous, with room for one vector after the last row.
// Vectors run along a row of the result, so that rows are padded to whole vectors in the packed matrix only.
#pragma once
#include "../params.h"
#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {

constexpr int TILE = 32;  // pixels

// A kernel's element type and number of channels, the latter a constant where it is a usual one (the levels of a Glow on
// RGB images), else 0. Kernels call `channels` where they use it: a captured variable would no longer be a constant.
template <class T, int C>
struct Case {
    using Element = T;
    static constexpr int64_t channels(int64_t n) { return C ? C : n; }
};

template <class F>
void specialise(Type type, int64_t channels, const F& f) {
    if (type == Type::f64) return f(Case<double, 0>());
    switch (channels) {
        case 12: return f(Case<float, 12>());
        case 24: return f(Case<float, 24>());
        case 48: return f(Case<float, 48>());
        default: return f(Case<float, 0>());
    }
}

template <class T>
constexpr int64_t tile_size(int64_t channels) {
    return TILE * channels + LANES<T>;
}

// The first `valid` rows of a tile from or to an image; what a tile lacks is zero.
template <class T>
inline void load_tile(const T* image, int64_t valid, int64_t channels, T* tile) {
    memcpy(tile, image, valid * channels * sizeof(T));
    if (valid < TILE) memset(tile + valid * channels, 0, (TILE - valid) * channels * sizeof(T));
}

template <class T>
inline void store_tile(const T* tile, int64_t valid, int64_t channels, T* image) {
    memcpy(image, tile, valid * channels * sizeof(T));
}

// Whether a tile is complete and vectors may be read beyond its last row, `left` pixels before the image's end.
template <class T>
inline bool is_readable(int64_t left, int64_t channels) {
    return (left - TILE) * channels >= LANES<T>;
}

// The rows of a tile themselves where that is so, else a copy completed by zeros.
template <class T>
inline const T* readable(const T* image, int64_t left, int64_t channels, T* tile) {
    if (is_readable<T>(left, channels)) return image;
    load_tile(image, min(left, TILE), channels, tile);
    return tile;
}

// An offset as often as a tile has rows, so that whole vectors of it are subtracted whatever the number of channels.
template <class T>
class Offset {
  public:
    Offset(const void* offset, int64_t channels) : rows_(TILE * channels) {
        for (int p = 0; p < TILE; p++) memcpy(rows_.data() + p * channels, offset, channels * sizeof(T));
    }
    // From the first `valid` rows of a tile; what it lacks is zero before.
    void subtract_from(const T* image, int64_t valid, int64_t channels, T* tile) const {
        const T* rows = rows_.data();
        if (valid < TILE) {
            load_tile(image, valid, channels, tile);
            image = tile;
        }
#pragma omp simd
        for (int64_t i = 0; i < TILE * channels; i++) tile[i] = image[i] - rows[i];
    }

  private:
    Scratch<T> rows_;
};

// The transpose of a matrix, in rows of padded<T>(channels).
template <class T>
void pack(const Matrix& matrix, int64_t channels, T* packed) {
    const T* data = static_cast<const T*>(matrix.data);
    const int64_t width = padded<T>(channels);
    for (int64_t i = 0; i < channels; i++) {
        for (int64_t o = 0; o < width; o++) {
            packed[i * width + o] = o < channels ? data[o * matrix.row + i * matrix.column] : T(0);
        }
    }
}

inline Matrix transposed(const Matrix& m) { return {m.data, m.column, m.row}; }

// How many vectors of a row are computed together, and for how many pixels, so that the sums stay in registers.
constexpr int GROUP = ACCUMULATORS >= 12 ? 3 : 2;
constexpr int pixels_at_once(int vectors) {
    return 8 * vectors <= ACCUMULATORS ? 8 : 4;
}
constexpr int rows_at_once(int vectors) { return ACCUMULATORS / vectors < 12 ? ACCUMULATORS / vectors : 12; }

// Whether rows of a usual number of channels end in half a vector, and are one group. Half of a whole one would be padding
// then, for which processors that execute a vector of 64 bytes as two halves (Zen 4) need as long as for numbers. Halves of 32
// are no faster.
template <class K>
constexpr bool ends_in_half() {
    constexpr int64_t channels = K::channels(0), W = LANES<typename K::Element>;
    return VECTOR_BYTES == 64 && channels > W && channels < GROUP * W && channels % W == W / 2;
}

// V vectors of every row from column `first` on, which is a constant where the number of channels is. HALF: the last one is
// half a vector, and ends with the row.
template <class K, int V, bool HALF, class T>
__attribute__((always_inline)) inline void mix_columns(const T* x, int64_t n, int64_t first, const T* packed, const T* init, T* y) {
    constexpr int PIXELS = pixels_at_once(V), W = LANES<T>, WHOLE = V - HALF;
    const int64_t channels = K::channels(n), width = padded<T>(channels);
    packed += first, init += first, y += first;
    for (int pixel = 0; pixel < TILE; pixel += PIXELS, x += PIXELS * channels, y += PIXELS * channels) {
        Vector<T> sum[PIXELS][WHOLE];
        [[maybe_unused]] HalfVector<T> end[PIXELS];
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++) {
#pragma GCC unroll 3
            for (int v = 0; v < WHOLE; v++) sum[p][v] = load(init + v * W);
            if constexpr (HALF) memcpy(&end[p], init + WHOLE * W, sizeof end[p]);
        }
        for (int64_t i = 0; i < channels; i++) {
            Vector<T> row[WHOLE];
            [[maybe_unused]] HalfVector<T> last;
#pragma GCC unroll 3
            for (int v = 0; v < WHOLE; v++) row[v] = load(packed + i * width + v * W);
            if constexpr (HALF) memcpy(&last, packed + i * width + WHOLE * W, sizeof last);
#pragma GCC unroll 8
            for (int p = 0; p < PIXELS; p++) {
                const T value = x[p * channels + i];
#pragma GCC unroll 3
                for (int v = 0; v < WHOLE; v++) sum[p][v] += value * row[v];
                if constexpr (HALF) end[p] += value * last;
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++) {
            if constexpr (HALF) {
#pragma GCC unroll 3
                for (int v = 0; v < WHOLE; v++) store(y + p * channels + v * W, sum[p][v]);
                memcpy(y + p * channels + WHOLE * W, &end[p], sizeof end[p]);
                continue;
            }
#pragma GCC unroll 3
            for (int v = 0; v < WHOLE; v++) {
                T* to = y + p * channels + v * W;
                // Behind the tile's last row there may be another's. Usual rows are so long that vectors only of the last
                // pixels reach there.
                constexpr bool usual = K::channels(0) > 0;
                const int64_t left = (usual ? PIXELS - p : TILE - pixel - p) * channels - first - v * W;
                if (left < W && (!usual || pixel + PIXELS == TILE)) {
                    const Vector<T> last = sum[p][v];
                    memcpy(to, &last, left * sizeof(T));
                } else {
                    store(to, sum[p][v]);
                }
            }
        }
    }
}

// y = M x + init at every pixel of a tile, from pack(M). Columns run from last to first and pixels forward, so that what
// a row's last vector writes past the row's end is overwritten by the next row. Nothing is written past the last row.
template <class K, class T>
inline void mix_tile(const T* x, int64_t channels, const T* packed, const T* init, T* y) {
    if constexpr (ends_in_half<K>()) {
        return mix_columns<K, K::channels(0) / LANES<T> + 1, true>(x, channels, 0, packed, init, y);
    }
#pragma GCC unroll 4
    for (int64_t end = padded<T>(K::channels(channels)) / LANES<T>; end > 0;) {
        const int64_t vectors = ceil_div(end, ceil_div(end, GROUP)), first = (end - vectors) * LANES<T>;
        if (vectors == 1) mix_columns<K, 1, false>(x, channels, first, packed, init, y);
        if (vectors == 2) mix_columns<K, 2, false>(x, channels, first, packed, init, y);
        if constexpr (GROUP > 2) {
            if (vectors == 3) mix_columns<K, 3, false>(x, channels, first, packed, init, y);
        }
        end -= vectors;
    }
}

// The same into an image, of which the tile's first `valid` rows are there.
template <class K, class T>
inline void mix_into(const T* x, int64_t channels, const T* packed, const T* init, int64_t valid, T* tile, T* image) {
    mix_tile<K>(x, channels, packed, init, valid == TILE ? image : tile);
    if (valid < TILE) store_tile(tile, valid, channels, image);
}

// Moves n sums, whole vectors, over some tiles to those in double precision over many.
template <class T>
inline void flush(T* sums, int64_t n, double* total) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        total[i] += sums[i];
        sums[i] = 0;
    }
}

template <class T, int V, bool HALF, int R>
inline void outer_rows(const T* g, const T* x, int64_t channels, T* total, int64_t width) {
    constexpr int W = LANES<T>, WHOLE = V - HALF;
    Vector<T> sum[R][WHOLE] = {};
    [[maybe_unused]] HalfVector<T> end[R] = {};
    for (int p = 0; p < TILE; p++) {
        Vector<T> row[WHOLE];
        [[maybe_unused]] HalfVector<T> last;
#pragma GCC unroll 3
        for (int v = 0; v < WHOLE; v++) row[v] = load(x + p * channels + v * W);
        if constexpr (HALF) memcpy(&last, x + p * channels + WHOLE * W, sizeof last);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const T value = g[p * channels + r];
#pragma GCC unroll 3
            for (int v = 0; v < WHOLE; v++) sum[r][v] += value * row[v];
            if constexpr (HALF) end[r] += value * last;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        T* to = total + r * width;
#pragma GCC unroll 3
        for (int v = 0; v < WHOLE; v++) store(to + v * W, load(to + v * W) + sum[r][v]);
        if constexpr (HALF) {
            HalfVector<T> sofar;
            memcpy(&sofar, to + WHOLE * W, sizeof sofar);
            sofar += end[r];
            memcpy(to + WHOLE * W, &sofar, sizeof sofar);
        }
    }
}

template <class T, int V, bool HALF = false>
inline void outer_columns(const T* g, const T* x, int64_t channels, T* total, int64_t width) {
    constexpr int R = rows_at_once(V);
    for (int64_t r = 0; r < channels;) {
        const int64_t left = channels - r;
        if (left >= R) {
            outer_rows<T, V, HALF, R>(g + r, x, channels, total + r * width, width);
            r += R;
        } else if (R > 4 && left >= 4) {
            outer_rows<T, V, HALF, 4>(g + r, x, channels, total + r * width, width);
            r += 4;
        } else {
            outer_rows<T, V, HALF, 1>(g + r, x, channels, total + r * width, width);
            r += 1;
        }
    }
}

// total[o][i] += sum over the tile's pixels of g[o] x[i], in rows of padded<T>(channels).
template <class K, class T>
inline void outer_tile(const T* g, const T* x, int64_t n, T* total) {
    const int64_t channels = K::channels(n), width = padded<T>(channels);
    if constexpr (ends_in_half<K>()) {
        return outer_columns<T, K::channels(0) / LANES<T> + 1, true>(g, x, channels, total, width);
    }
    for (int64_t end = width / LANES<T>; end > 0;) {
        const int64_t vectors = ceil_div(end, ceil_div(end, GROUP)), first = (end - vectors) * LANES<T>;
        if (vectors == 1) outer_columns<T, 1>(g, x + first, channels, total + first, width);
        if (vectors == 2) outer_columns<T, 2>(g, x + first, channels, total + first, width);
        if constexpr (GROUP > 2) {
            if (vectors == 3) outer_columns<T, 3>(g, x + first, channels, total + first, width);
        }
        end -= vectors;
    }
}

// total[c] += sum over the tile's pixels of g[c].
template <class T>
inline void sum_tile(const T* g, int64_t channels, T* total) {
    for (int64_t first = 0; first < channels; first += LANES<T>) {
        Vector<T> sum[4] = {};
        for (int p = 0; p < TILE; p += 4) {
            for (int i = 0; i < 4; i++) sum[i] += load(g + (p + i) * channels + first);
        }
        store(total + first, load(total + first) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
}

}  // namespace flowkern::FLOWKERN_ISA
