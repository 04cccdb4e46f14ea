#include "mix.h"

#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// Tiles over which sums are taken in the numbers' own precision.
constexpr int TILES_SUMMED = 4;

template <class K, class T>
void mix_tiles(const Mix& m, const T* packed, const T* init, const Offset<T>& offset, int64_t begin, int64_t end) {
    const int64_t channels = K::channels(m.channels);
    const T* x = static_cast<const T*>(m.x);
    T* y = static_cast<T*>(m.y);
    Scratch<T> in(tile_size<T>(channels)), out(tile_size<T>(channels));
    for (int64_t first = begin * TILE; first < min(end * TILE, m.pixels); first += TILE) {
        const int64_t valid = min(TILE, m.pixels - first);
        const T* rows = x + first * channels;
        if (m.inverse || valid < TILE) {
            m.inverse ? offset.subtract_from(rows, valid, channels, in.data()) : load_tile(rows, valid, channels, in.data());
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

// One thread's loop over tiles, with its scratch memory.
template <class K, class T = typename K::Element>
class MixVjpTiles {
  public:
    MixVjpTiles(const MixVjp& m, const Reverse<T>& reverse, const Offset<T>& offset)
        : m_(m), reverse_(reverse), offset_(offset), given_(tile_size<T>(m.channels)), mapped_(given_.size()),
          gradient_(given_.size()), back_(given_.size()), some_(m.channels * padded<T>(m.channels) + padded<T>(m.channels)) {}

    // Adds to `sums`, of the matrix and behind them of the offset, in rows of padded<T>(channels).
    void run(int64_t begin, int64_t end, double* sums) const {
        some_.clear();
        for (int64_t tile = begin; tile < end; tile++) {
            add(tile);
            if ((tile - begin) % TILES_SUMMED == TILES_SUMMED - 1 || tile + 1 == end) flush(some_.data(), some_.size(), sums);
        }
    }

  private:
    void add(int64_t tile) const {
        const int64_t channels = K::channels(m_.channels), first = tile * TILE, left = m_.pixels - first, at = first * channels;
        const bool inside = is_readable<T>(left, channels);
        const T *v = static_cast<const T*>(m_.v) + at, *g = readable(static_cast<const T*>(m_.g) + at, left, channels, gradient_.data());
        T *rebuilt = m_.rebuilt ? static_cast<T*>(m_.rebuilt) + at : nullptr, *dv = static_cast<T*>(m_.dv) + at;
        if (reverse_.subtract) {
            offset_.subtract_from(v, min(TILE, left), channels, given_.data());
            v = given_.data();
        } else {
            v = readable(v, left, channels, given_.data());
        }
        // Results go to their images at once where the sums may read them there.
        T *mapped = inside && rebuilt ? rebuilt : mapped_.data(), *back = inside ? dv : back_.data();
        if (reverse_.map) mix_tile<K>(v, channels, reverse_.map, reverse_.init, mapped);
        mix_tile<K>(g, channels, reverse_.back, reverse_.zero, back);
        if (!inside) {
            if (rebuilt) store_tile(mapped, min(TILE, left), channels, rebuilt);
            store_tile(back, min(TILE, left), channels, dv);
        }
        const T* weight = m_.inverse ? back : g;
        outer_tile<K>(weight, reverse_.subtract ? mapped : v, channels, some_.data());
        sum_tile(weight, channels, some_.data() + channels * padded<T>(channels));
    }

    const MixVjp& m_;
    const Reverse<T>& reverse_;
    const Offset<T>& offset_;
    const Scratch<T> given_, mapped_, gradient_, back_, some_;
};

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
        const Offset<T> offset(m.offset, channels);
        parallel(threads, ceil_div(m.pixels, TILE), [&](int64_t begin, int64_t end) {
            mix_tiles<K>(m, packed.data(), init.data(), offset, begin, end);
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
        const Offset<T> offset(m.offset, channels);
        parallel(threads, chunks, [&](int64_t begin, int64_t end) {
            const MixVjpTiles<K> loop(m, reverse, offset);
            for (int64_t c = begin; c < end; c++) loop.run(c * chunk, min((c + 1) * chunk, tiles), sums.data() + c * size);
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
