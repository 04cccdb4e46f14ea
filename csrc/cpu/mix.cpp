#include "mix.h"

#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// Tiles over which sums are taken in the numbers' own precision.
constexpr int TILES_SUMMED = 4;

template <class K, class T>
void mix_tiles(const Mix& m, const T* packed, const T* init, int64_t begin, int64_t end) {
    const int64_t channels = K::channels(m.channels);
    const T* x = static_cast<const T*>(m.x);
    T* y = static_cast<T*>(m.y);
    Scratch<T> in(tile_size<T>(channels)), out(tile_size<T>(channels));
    const Offset<T> offset(m.offset, channels);
    for (int64_t first = begin * TILE; first < min(end * TILE, m.pixels); first += TILE) {
        const int64_t valid = min(TILE, m.pixels - first);
        const T* rows = x + first * channels;
        if (m.inverse || valid < TILE) {
            load_tile(rows, valid, channels, in.data());
            if (m.inverse) offset.subtract_from(in.data(), channels);
            rows = in.data();
        }
        mix_into<K>(rows, channels, packed, init, valid, out.data(), y + first * channels);
    }
}

// The reverse pass of one direction of the mix: what its output or input v and cotangent g are multiplied by.
template <class T>
struct Reverse {
    const T *map, *init;  // v -> the other end of the mix; null where the op doesn't need it
    bool subtract;        // whether the offset is taken off v first
    const T *back, *zero; // g -> dv
};

template <class K, class T>
void mix_vjp_tiles(const MixVjp& m, const Reverse<T>& reverse, int64_t begin, int64_t end, double* sums) {
    const int64_t channels = K::channels(m.channels), size = tile_size<T>(channels), width = padded<T>(channels);
    const T *vs = static_cast<const T*>(m.v), *gs = static_cast<const T*>(m.g);
    T *rebuilt = static_cast<T*>(m.rebuilt), *dv = static_cast<T*>(m.dv);
    Scratch<T> given(size), mapped(size), gradient(size), back(size), some(channels * width + width);
    some.clear();
    const Offset<T> offset(m.offset, channels);
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t first = tile * TILE, left = m.pixels - first, valid = min(TILE, left), at = first * channels;
        const T *v = given.data(), *g = readable(gs + at, left, channels, gradient.data());
        if (reverse.subtract) {
            load_tile(vs + at, valid, channels, given.data());
            offset.subtract_from(given.data(), channels);
        } else {
            v = readable(vs + at, left, channels, given.data());
        }
        if (reverse.map) {
            mix_tile<K>(v, channels, reverse.map, reverse.init, mapped.data());
            if (rebuilt) store_tile(mapped.data(), valid, channels, rebuilt + at);
        }
        mix_tile<K>(g, channels, reverse.back, reverse.zero, back.data());
        store_tile(back.data(), valid, channels, dv + at);
        const T* x = reverse.subtract ? mapped.data() : v;
        const T* weight = m.inverse ? back.data() : g;
        outer_tile<K>(weight, x, channels, some.data());
        sum_tile(weight, channels, some.data() + channels * width);
        if ((tile - begin) % TILES_SUMMED == TILES_SUMMED - 1 || tile + 1 == end) flush(some.data(), channels * width + width, sums);
    }
}

}  // namespace

void mix(const Mix& m, int threads) {
    specialise(m.type, m.channels, [&](auto kind) {
        using K = decltype(kind);
        using T = typename K::Element;
        const int64_t channels = m.channels, width = padded<T>(channels);
        Scratch<T> packed(channels * width), init(width);
        pack(m.matrix, channels, packed.data());
        init.clear();
        if (!m.inverse) memcpy(init.data(), m.offset, channels * sizeof(T));
        parallel(threads, ceil_div(m.pixels, TILE), [&](int64_t begin, int64_t end) {
            mix_tiles<K>(m, packed.data(), init.data(), begin, end);
        });
    });
}

// Sums over pixels are taken over a few tiles, then over a chunk of tiles in double precision, then over the chunks in
// order. How pixels are divided into chunks depends on their number alone, so the thread count changes no bit.
void mix_vjp(const MixVjp& m, int threads) {
    specialise(m.type, m.channels, [&](auto kind) {
        using K = decltype(kind);
        using T = typename K::Element;
        const int64_t channels = m.channels, width = padded<T>(channels);
        Scratch<T> map(channels * width), back(channels * width), init(width), zero(width);
        // The sums need x, the forward mix's input. It is v itself, or the inverse matrix's image of v; a v that is x
        // is mapped (to y) only where the caller wants that rebuilt.
        const bool v_is_x = m.inverse != m.given_input;
        pack(v_is_x ? m.matrix : m.inverse_matrix, channels, map.data());
        pack(transposed(m.inverse ? m.inverse_matrix : m.matrix), channels, back.data());
        init.clear();
        zero.clear();
        if (v_is_x) memcpy(init.data(), m.offset, channels * sizeof(T));
        const T* mapping = v_is_x && m.given_input ? nullptr : map.data();
        const Reverse<T> reverse{mapping, init.data(), !v_is_x, back.data(), zero.data()};

        constexpr int64_t SMALLEST_CHUNK = 8, MOST_CHUNKS = 64;
        const int64_t tiles = ceil_div(m.pixels, TILE);
        const int64_t chunk = max(SMALLEST_CHUNK, ceil_div(tiles, MOST_CHUNKS));
        const int64_t chunks = ceil_div(tiles, chunk), size = channels * width + width;
        Scratch<double> sums(max(chunks, 1) * size);
        sums.clear();
        parallel(threads, chunks, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; c++) {
                mix_vjp_tiles<K>(m, reverse, c * chunk, min((c + 1) * chunk, tiles), sums.data() + c * size);
            }
        });

        double* total = sums.data();
        for (int64_t c = 1; c < chunks; c++) {
            for (int64_t i = 0; i < size; i++) total[i] += total[c * size + i];
        }
        T *dmatrix = static_cast<T*>(m.dmatrix), *doffset = static_cast<T*>(m.doffset);
        const double sign = m.inverse ? -1 : 1;
        for (int64_t o = 0; o < channels; o++) {
            for (int64_t i = 0; i < channels; i++) dmatrix[o * channels + i] = T(sign * total[o * width + i]);
            doffset[o] = T(sign * total[channels * width + o]);
        }
    });
}

}  // namespace flowkern::FLOWKERN_ISA
