#include "coupling.h"
#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// Pixels of one sample that share a partial log-determinant. Fixed, so that the thread count changes no bit.
constexpr int64_t BLOCK = 2 * TILE;

// The matrix and starting values of the mix that follows a coupling; null where none does.
template <class T>
struct Mixing {
    const T *packed, *init;
    const Offset<T>* offset;
};

// Scratch memory of one thread: tiles of rows, and compact arrays of half rows.
template <class T>
class Workspace {
  public:
    explicit Workspace(int64_t channels)
        : half_(TILE * channels / 2), tile_(tile_size<T>(channels)), memory_(3 * tile_ + 4 * half_) {}
    T* tile(int i) const { return memory_.data() + i * tile_; }
    T* compact(int i) const { return memory_.data() + 3 * tile_ + i * half_; }
    int64_t half() const { return half_; }

  private:
    int64_t half_, tile_;
    Scratch<T> memory_;
};

// The tile's rows: the image itself where it is complete, else a copy completed by zeros.
template <class T>
const T* complete(const T* image, int64_t valid, int64_t channels, T* tile) {
    if (valid == TILE) return image;
    load_tile(image, valid, channels, tile);
    return tile;
}

// Rows with new second halves, in the image; by way of a tile where the image is incomplete.
template <class K, class T>
void join_into(const T* first, const T* second, int64_t valid, int64_t channels, T* tile, T* image) {
    join<K, true>(first, second, channels, valid == TILE ? image : tile);
    if (valid < TILE) store_tile(tile, valid, channels, image);
}

template <class K, class T>
void couple_blocks(const Couple& m, const Mixing<T>& mixing, int64_t blocks, int64_t begin, int64_t end, double* logdet) {
    const int64_t channels = K::channels(m.channels), half = channels / 2;
    const bool additive = m.scale == Scale::additive;
    const int64_t row = additive ? half : channels;
    const T *images = static_cast<const T*>(m.x), alpha = T(m.alpha);
    T* y = static_cast<T*>(m.y);
    Workspace<T> workspace(channels);
    T *tile = workspace.tile(0), *mixed = workspace.tile(1);
    T *b = workspace.compact(0), *raw = workspace.compact(1), *shift = workspace.compact(2);
    for (int64_t item = begin; item < end; item++) {
        const int64_t sample = item / blocks * m.pixels, start = item % blocks * BLOCK;
        double sum = 0;
        for (int64_t p = start; p < min(start + BLOCK, m.pixels); p += TILE) {
            const int64_t valid = min(TILE, m.pixels - p), at = (sample + p) * channels;
            const T* t = network_rows(m.h, m.h_type, (sample + p) * row, valid, row, m.scale, workspace.tile(2));
            if (!additive) {
                split<K>(t, channels, raw, shift);
                t = shift;
            }
            const T* x = complete(images + at, valid, channels, mixed);
            second_halves<K>(x, channels, b);
            sum += m.inverse ? couple_halves<true>(b, raw, t, workspace.half(), m.scale, alpha)
                             : couple_halves<false>(b, raw, t, workspace.half(), m.scale, alpha);
            if (!mixing.packed) {
                join_into<K>(x, b, valid, channels, tile, y + at);
                continue;
            }
            join<K, true>(x, b, channels, tile);
            if (m.inverse) mixing.offset->subtract_from(tile, TILE, channels, tile);
            mix_into<K>(tile, channels, mixing.packed, mixing.init, valid, mixed, y + at);
        }
        logdet[item] = sum;
    }
}

template <class K, class T>
void couple_vjp_blocks(const CoupleVjp& m, int64_t blocks, int64_t begin, int64_t end) {
    const int64_t channels = K::channels(m.channels), half = channels / 2;
    const bool additive = m.scale == Scale::additive;
    const int64_t row = additive ? half : channels;
    const T *vs = static_cast<const T*>(m.v), *gs = static_cast<const T*>(m.g), alpha = T(m.alpha);
    const T* glogdet = static_cast<const T*>(m.glogdet);
    T *rebuilt = static_cast<T*>(m.rebuilt), *dv = static_cast<T*>(m.dv);
    Workspace<T> workspace(channels);
    T *tile = workspace.tile(0), *network = workspace.tile(2);
    T *b = workspace.compact(0), *raw = workspace.compact(1), *t = workspace.compact(2), *gb = workspace.compact(3);
    for (int64_t item = begin; item < end; item++) {
        const int64_t sample = item / blocks, start = item % blocks * BLOCK, size = workspace.half();
        const T gl = glogdet[sample];
        for (int64_t p = start; p < min(start + BLOCK, m.pixels); p += TILE) {
            const int64_t valid = min(TILE, m.pixels - p), pixel = sample * m.pixels + p, at = pixel * channels;
            const T* h = network_rows(m.h, m.h_type, pixel * row, valid, row, m.scale, network);
            if (additive) {
                memcpy(t, h, size * sizeof(T));
            } else {
                split<K>(h, channels, raw, t);
            }
            const T* v = complete(vs + at, valid, channels, tile);
            const T* g = complete(gs + at, valid, channels, workspace.tile(1));
            second_halves<K>(v, channels, b);
            second_halves<K>(g, channels, gb);
            if (m.inverse) {
                m.given_input ? couple_vjp_halves<true, true>(b, gb, raw, t, size, m.scale, alpha, gl)
                              : couple_vjp_halves<true, false>(b, gb, raw, t, size, m.scale, alpha, gl);
            } else {
                m.given_input ? couple_vjp_halves<false, true>(b, gb, raw, t, size, m.scale, alpha, gl)
                              : couple_vjp_halves<false, false>(b, gb, raw, t, size, m.scale, alpha, gl);
            }
            if (rebuilt) join_into<K>(v, b, valid, channels, network, rebuilt + at);
            join_into<K>(g, gb, valid, channels, network, dv + at);
            with_network_type<T>(m.h_type, [&](auto number) {
                auto* dh = static_cast<decltype(number)*>(m.dh) + pixel * row;
                const T* rows = t;
                if (!additive) {
                    if constexpr (sizeof number == sizeof(T)) {
                        if (valid == TILE) return join<K, false>(raw, t, channels, dh);
                    }
                    join<K, false>(raw, t, channels, network);
                    rows = network;
                }
                for (int64_t j = 0; j < valid * row; j++) convert(rows[j], dh[j]);
            });
        }
    }
}

}  // namespace

void couple(const Couple& m, int threads) {
    specialise(m.type, m.channels, [&](auto kind) {
        using K = decltype(kind);
        using T = typename K::Element;
        const int64_t channels = m.channels, width = padded<T>(channels);
        const bool mixes = m.matrix.data != nullptr;
        Scratch<T> packed(mixes ? channels * width : 0), init(width);
        if (mixes) pack(m.matrix, channels, packed.data());
        init.clear();
        if (mixes && !m.inverse) memcpy(init.data(), m.offset, channels * sizeof(T));
        const Offset<T> offset(mixes ? m.offset : init.data(), channels);
        const Mixing<T> mixing{mixes ? packed.data() : nullptr, init.data(), &offset};
        const int64_t blocks = ceil_div(m.pixels, BLOCK);
        Scratch<double> partial(m.samples * blocks);
        parallel(threads, m.samples * blocks, [&](int64_t begin, int64_t end) {
            couple_blocks<K>(m, mixing, blocks, begin, end, partial.data());
        });
        T* logdet = static_cast<T*>(m.logdet);
        for (int64_t n = 0; n < m.samples; n++) {
            double sum = 0;
            for (int64_t b = 0; b < blocks; b++) sum += partial.data()[n * blocks + b];
            logdet[n] = T(m.inverse ? -sum : sum);
        }
    });
}

void couple_vjp(const CoupleVjp& m, int threads) {
    specialise(m.type, m.channels, [&](auto kind) {
        using K = decltype(kind);
        using T = typename K::Element;
        const int64_t blocks = ceil_div(m.pixels, BLOCK);
        parallel(threads, m.samples * blocks, [&](int64_t begin, int64_t end) {
            couple_vjp_blocks<K, T>(m, blocks, begin, end);
        });
    });
}

}  // namespace flowkern::FLOWKERN_ISA
