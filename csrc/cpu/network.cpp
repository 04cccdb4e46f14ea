// Glow's coupling network, forward and backward, on chunks of pixels whose hidden activations stay in cache.
//
// All work is matrix products over a chunk's pixels (product.h): the 3x3 convolutions gather or scatter their nine taps
// (taps.h). With X the taps of a, D those of dh, and the ReLUs' masks left out:
//     H1 = X W1, H2 = H1 W2, T = H2 W3, h = scatter(T)
//     G2 = D W3', G1 = G2 W2', da = scatter(G1 W1'), dW1 = X' G1, dW2 = G2' H1, dW3 = D' H2.
// The third layer's taps are numbered from last to first, because they are scattered where the first layer's are gathered.
// By Winograd (winograd.h, points.h) taps are points instead, which X, D and the arrays of many channels are transformed to.
#include "gradients.h"
#include "trace.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// The ranges over which gradients of weights are summed: several a thread if there are so many pixels that an array of as many
// sums for each is worth it; flowkern/budget.py knows.
Ranges ranges_of(int64_t items, int64_t pixels, int threads) {
    return {items, threads, threads == 1 || items < 2 * threads || pixels < threads * 1024};
}

template <class E>
void vjp(const NetworkVjp& m, int threads) {
    const Bands bands(m.samples, m.height, m.width);
    const Ranges ranges = ranges_of(bands.count(), m.samples * m.height * m.width, threads);
    const WeightGradients<E> weights(m, ranges.count(), threads);
    vjp_bands<E>(m, bands, nullptr, weights, ranges, 0, threads);
    weights.finish(m, threads);
}

inline Image from_sample(Image image, int64_t sample) {
    image.data = static_cast<float*>(image.data) + sample * image.sample;
    return image;
}

// The sizes of a replay, and how it divides its images. `apart` of them threads take one or, if they are small, some
// `at_once` each, so that hidden activations stay in a thread's cache until they are used. The rest, fewer than there are
// threads, all threads take together.
template <class E>
struct Portions {
    int64_t rows, row, outputs;  // of an image: rows of hidden activations, numbers a row, numbers of the network's output
    int64_t rest, apart, at_once;

    Portions(const NetworkVjp& m, int threads)
        : rows(Hidden<E>::rows_of_image(Bands(1, m.height, m.width))),
          row(Sizes<E>(m).hidden_row()),
          outputs(m.height * m.width * m.network.out), rest(m.samples % threads), apart(m.samples - rest),
          at_once(max(1, min(apart / threads, FEW_ROWS / rows))) {}

    // Numbers of one of the two hidden activations, and bytes of everything, for so many images.
    int64_t hidden(int64_t images) const { return Rows<E>::size(images * rows, row); }
    int64_t bytes(int64_t images) const {
        return padded<char>(2 * (hidden(images) * sizeof(E) + images * outputs * sizeof(Stored<E>)));
    }

    static constexpr int64_t FEW_ROWS = 512;  // for which scratch arrays are worth their set-up; flowkern/budget.py knows
};

// Some images of a replay, and their part of its scratch memory.
template <class E>
struct Images {
    Bands bands;
    NetworkTrace trace;
    NetworkVjp vjp;
    Hidden<E> hidden;
    Stored<E>* dh;

    Images(const NetworkReplay& m, const Portions<E>& sizes, int64_t first, int64_t count, char* memory)
        : bands(count, m.vjp.height, m.vjp.width), vjp(m.vjp) {
        E *h1 = reinterpret_cast<E*>(memory), *h2 = h1 + sizes.hidden(count);
        auto* h = reinterpret_cast<Stored<E>*>(h2 + sizes.hidden(count));
        hidden = {{h1, sizes.row}, {h2, sizes.row}};
        vjp.dh = dh = h + count * sizes.outputs;
        vjp.a = from_sample(vjp.a, first);
        vjp.da = from_sample(vjp.da, first);
        vjp.samples = count;
        const Network& n = vjp.network;
        trace = {m.packed, vjp.a, h, nullptr, nullptr, count, vjp.height, vjp.width, n.few, n.hidden, n.out, vjp.type};
        clear_padding(count * sizes.rows);
    }
    // Products read numbers by whole tiles, of which rows get only whole vectors.
    void clear_padding(int64_t rows) const {
        const int64_t written = padded<float>(trace.hidden), read = PER_UNIT<E> * padded<float>(ceil_div(trace.hidden, PER_UNIT<E>));
        for (int64_t r = 0; written < read && r < rows; r++) {
            memset(hidden.first[r] + written, 0, (read - written) * sizeof(E));
            memset(hidden.second[r] + written, 0, (read - written) * sizeof(E));
        }
    }
};

template <class E>
int64_t replay_bytes(const NetworkReplay& m, int threads) {
    const Portions<E> portions(m.vjp, threads);
    return max(portions.apart ? threads * portions.bytes(portions.at_once) : 0, portions.rest ? portions.bytes(portions.rest) : 0);
}

template <class E>
void replay(const NetworkReplay& m, int threads) {
    const Portions<E> portions(m.vjp, threads);
    const int64_t pixels = m.vjp.height * m.vjp.width;
    const auto ranges_together = [&](int64_t images, int team) {
        return ranges_of(Bands(images, m.vjp.height, m.vjp.width).count(), images * pixels, team);
    };
    const Ranges ranges = ranges_of(portions.apart, portions.apart * pixels, threads);
    const WeightGradients<E> weights(m.vjp, max(ranges.count(), ranges_together(portions.rest, threads).count()), threads);
    const auto run = [&](int64_t first, int64_t count, char* memory, int64_t range, int team) {
        const Images<E> images(m, portions, first, count, memory);
        trace_bands<E>(images.trace, images.bands, &images.hidden, team);
        m.between(m.context, first, count, images.trace.h, images.dh, team);
        vjp_bands<E>(images.vjp, images.bands, &images.hidden, weights, ranges_together(count, team), range, team);
    };
    char* memory = static_cast<char*>(m.memory);
    if (portions.apart) {
        share_out(threads, ranges.count(), [&](Shared& left) {
            for (int64_t r; (r = left.take()) >= 0;) {
                const int64_t end = ranges.begin(r + 1);
                for (int64_t i = ranges.begin(r); i < end; i += portions.at_once) {
                    run(i, min(portions.at_once, end - i), memory + left.own() * portions.bytes(portions.at_once), r, 1);
                }
            }
        });
    }
    if (portions.rest) run(portions.apart, portions.rest, memory, 0, threads);
    weights.finish(m.vjp, threads);
}

// f(number of the type that the network multiplies).
template <class F>
auto with_factor_type(Type type, const F& f) {
#ifdef __AVX512BF16__
    using Bf16 = BFloat16;
#else
    using Bf16 = Widened;
#endif
    return type == Type::bf16 ? f(Bf16()) : f(float());
}

}  // namespace

int64_t network_packed_size(Type type, int64_t few, int64_t hidden, int64_t out, int64_t height, int64_t width) {
    return with_factor_type(type, [&](auto number) {
        using E = decltype(number);
        return Folded<E>(Sizes<E>(few, hidden, out, height, width)).size;
    });
}

void network_fold(const NetworkFold& m, int threads) {
    with_factor_type(m.type, [&](auto number) { fold<decltype(number)>(m, threads); });
}

void network_trace(const NetworkTrace& m, int threads) {
    with_factor_type(m.type, [&](auto number) {
        trace_bands<decltype(number)>(m, Bands(m.samples, m.height, m.width), nullptr, threads);
    });
}

void network_vjp(const NetworkVjp& m, int threads) {
    with_factor_type(m.type, [&](auto number) { vjp<decltype(number)>(m, threads); });
}

int64_t network_replay_bytes(const NetworkReplay& m, int threads) {
    return with_factor_type(m.vjp.type, [&](auto number) { return replay_bytes<decltype(number)>(m, threads); });
}

void network_replay(const NetworkReplay& m, int threads) {
    with_factor_type(m.vjp.type, [&](auto number) { replay<decltype(number)>(m, threads); });
}

}  // namespace flowkern::FLOWKERN_ISA
