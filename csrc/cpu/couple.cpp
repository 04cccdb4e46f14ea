#include "coupling.h"
#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// Pixels of one sample that share a partial log-determinant. Fixed, so that the thread count changes no bit.
constexpr int64_t BLOCK = 2 * TILE;

template <class T>
struct Packed {
    const T *matrix, *init;  // matrix null: the coupling alone
};

template <class T>
class Workspace {
  public:
    explicit Workspace(int64_t channels)
        : half_(TILE * channels / 2), tile_(tile_size<T>(channels)), memory_(3 * tile_ + 5 * half_) {}
    T* tile(int i) const { return memory_.data() + i * tile_; }
    Halves<T> halves() const {
        T* p = memory_.data() + 3 * tile_;
        return {p, p + half_, p + 2 * half_, p + 3 * half_, p + 4 * half_, half_};
    }

  private:
    int64_t half_, tile_;
    Scratch<T> memory_;
};

template <class K, class T>
void couple_blocks(const Couple& m, const Packed<T>& packed, int64_t blocks, int64_t begin, int64_t end, double* logdet) {
    const int64_t channels = K::channels(m.channels), half = channels / 2;
    const bool additive = m.scale == Scale::additive;
    const T *x = static_cast<const T*>(m.x), *offset = static_cast<const T*>(m.offset);
    T* y = static_cast<T*>(m.y);
    const T alpha = T(m.alpha);
    Workspace<T> workspace(channels);
    const Halves<T> halves = workspace.halves();
    T *state = workspace.tile(0), *mixed = workspace.tile(1);
    for (int64_t item = begin; item < end; item++) {
        const int64_t sample = item / blocks * m.pixels, start = item % blocks * BLOCK;
        double sum = 0;
        for (int64_t p = start; p < min(start + BLOCK, m.pixels); p += TILE) {
            const int64_t valid = min(TILE, m.pixels - p), at = (sample + p) * channels;
            load_tile(x + at, valid, channels, state);
            with_network_type<T>(m.h_type, [&](auto number) {
                const auto* h = static_cast<const decltype(number)*>(m.h) + (additive ? at / 2 : at);
                load_network<K>(h, additive, valid, channels, halves.raw, halves.t);
            });
            gather<K>(state, channels, halves.b);
            m.inverse ? couple_halves<true>(halves, m.scale, alpha) : couple_halves<false>(halves, m.scale, alpha);
            scatter<K>(halves.b, channels, state);
            if (!additive) sum += sum_of(halves.log_s, valid * half);
            if (packed.matrix) {
                if (m.inverse) subtract_offset(state, channels, offset);
                mix_tile(state, channels, packed.matrix, packed.init, mixed);
            }
            store_tile(packed.matrix ? mixed : state, valid, channels, y + at);
        }
        logdet[item] = sum;
    }
}

template <class K, class T>
void couple_vjp_blocks(const CoupleVjp& m, int64_t blocks, int64_t begin, int64_t end) {
    const int64_t channels = K::channels(m.channels);
    const bool additive = m.scale == Scale::additive;
    const T *v = static_cast<const T*>(m.v), *g = static_cast<const T*>(m.g);
    const T* glogdet = static_cast<const T*>(m.glogdet);
    T *rebuilt = static_cast<T*>(m.rebuilt), *dv = static_cast<T*>(m.dv);
    const T alpha = T(m.alpha);
    Workspace<T> workspace(channels);
    const Halves<T> halves = workspace.halves();
    T *state = workspace.tile(0), *gradient = workspace.tile(1);
    for (int64_t item = begin; item < end; item++) {
        const int64_t sample = item / blocks, start = item % blocks * BLOCK;
        const T gl = glogdet[sample];
        for (int64_t p = start; p < min(start + BLOCK, m.pixels); p += TILE) {
            const int64_t valid = min(TILE, m.pixels - p), at = (sample * m.pixels + p) * channels;
            const int64_t h_at = additive ? at / 2 : at;
            load_tile(v + at, valid, channels, state);
            load_tile(g + at, valid, channels, gradient);
            with_network_type<T>(m.h_type, [&](auto number) {
                const auto* h = static_cast<const decltype(number)*>(m.h) + h_at;
                load_network<K>(h, additive, valid, channels, halves.raw, halves.t);
            });
            gather<K>(state, channels, halves.b);
            gather<K>(gradient, channels, halves.g);
            if (m.inverse) {
                m.given_input ? couple_vjp_halves<true, true>(halves, m.scale, alpha, gl)
                              : couple_vjp_halves<true, false>(halves, m.scale, alpha, gl);
            } else {
                m.given_input ? couple_vjp_halves<false, true>(halves, m.scale, alpha, gl)
                              : couple_vjp_halves<false, false>(halves, m.scale, alpha, gl);
            }
            if (rebuilt) {
                scatter<K>(halves.b, channels, state);
                store_tile(state, valid, channels, rebuilt + at);
            }
            scatter<K>(halves.g, channels, gradient);
            store_tile(gradient, valid, channels, dv + at);
            with_network_type<T>(m.h_type, [&](auto number) {
                auto* dh = static_cast<decltype(number)*>(m.dh) + h_at;
                store_network<K>(halves.raw, halves.t, additive, valid, channels, dh);
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
        const bool mixing = m.matrix.data != nullptr;
        Scratch<T> matrix(mixing ? channels * width : 0), init(width);
        if (mixing) pack(m.matrix, channels, matrix.data());
        init.clear();
        if (mixing && !m.inverse) memcpy(init.data(), m.offset, channels * sizeof(T));
        const Packed<T> packed{mixing ? matrix.data() : nullptr, init.data()};
        const int64_t blocks = ceil_div(m.pixels, BLOCK);
        Scratch<double> partial(m.samples * blocks);
        parallel(threads, m.samples * blocks, [&](int64_t begin, int64_t end) {
            couple_blocks<K>(m, packed, blocks, begin, end, partial.data());
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
