// Glow's coupling network, forward and backward, on chunks of pixels whose hidden activations stay in cache.
//
// All work is matrix products over a chunk's pixels (product.h): the 3x3 convolutions gather or scatter their nine taps
// (taps.h). With X the taps of a, D those of dh, and the ReLUs' masks left out:
//     H1 = X W1, H2 = H1 W2, T = H2 W3, h = scatter(T)
//     G2 = D W3', G1 = G2 W2', da = scatter(G1 W1'), dW1 = X' G1, dW2 = G2' H1, dW3 = D' H2.
// The third layer's taps are numbered from last to first, because they are scattered where the first layer's are gathered.
#include "gradients.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// Whether gradients of weights are worth summing over more ranges than there are threads, which costs an array of as many
// sums a thread.
bool worth_small_ranges(const NetworkVjp& m, int threads) { return threads > 1 && m.samples * m.height * m.width >= threads * 1024; }

template <class E>
void vjp(const NetworkVjp& m, int threads) {
    const Bands bands(m.samples, m.height, m.width);
    const Ranges ranges{bands.count(), threads, !worth_small_ranges(m, threads)};
    const WeightGradients<E> weights(m, ranges.count(), threads);
    vjp_bands<E>(m, bands, nullptr, weights, ranges, 0, threads);
    weights.finish(m, threads);
}

// How a replay divides its images. `whole` of them each thread takes for itself, `at_once` at a time, so that hidden
// activations stay in its cache until they are used. The rest, fewer than there are threads, all threads take together.
struct Portions {
    int64_t rest, whole, at_once;

    // rows: of an image's hidden activations.
    Portions(const NetworkVjp& m, int64_t rows, int threads)
        : rest(m.samples % threads), whole(m.samples - rest), at_once(max(1, min(whole / threads, FEW_ROWS / rows))) {}
    static constexpr int64_t FEW_ROWS = 512;  // for which scratch arrays are worth their set-up; flowkern/budget.py knows
};

inline Image from_sample(Image image, int64_t sample) {
    image.data = static_cast<float*>(image.data) + sample * image.sample;
    return image;
}

// Some images of a replay, and their part of its scratch memory.
template <class E>
struct Images {
    Bands bands;
    int64_t hidden_size, outputs;
    NetworkTrace trace;
    NetworkVjp vjp;
    Hidden<E> hidden;
    E* dh;

    Images(const NetworkReplay& m, int64_t first, int64_t count, void* memory)
        : bands(count, m.vjp.height, m.vjp.width), outputs(m.vjp.height * m.vjp.width * m.vjp.network.out), vjp(m.vjp) {
        const Network& n = vjp.network;
        const int64_t row = Sizes<E>(n.few, n.hidden, n.out).hidden_row(), rows = Hidden<E>::rows_of(bands);
        hidden_size = Rows<E>::size(bands.count() * rows, row);
        E *h1 = static_cast<E*>(memory), *h2 = h1 + hidden_size, *h = h2 + hidden_size;
        dh = h + count * outputs;
        hidden = {{h1, row}, {h2, row}, rows};
        vjp.a = from_sample(vjp.a, first);
        vjp.da = from_sample(vjp.da, first);
        vjp.dh = dh;
        vjp.samples = count;
        trace = {m.packed, vjp.a, h, nullptr, nullptr, count, vjp.height, vjp.width, n.few, n.hidden, n.out, vjp.type};
    }
    // Products read numbers by whole tiles, of which rows hold only whole vectors.
    void clear_padding() const {
        const int64_t written = padded<float>(trace.hidden), read = PER_UNIT<E> * padded<float>(ceil_div(trace.hidden, PER_UNIT<E>));
        for (int64_t r = 0; written < read && r < bands.count() * hidden.rows; r++) {
            memset(hidden.first[r] + written, 0, (read - written) * sizeof(E));
            memset(hidden.second[r] + written, 0, (read - written) * sizeof(E));
        }
    }
    int64_t bytes() const { return padded<char>((2 * (hidden_size + trace.samples * outputs)) * sizeof(E)); }
};

template <class E>
Portions portions_of(const NetworkReplay& m, int threads) {
    const Bands image(1, m.vjp.height, m.vjp.width);
    return {m.vjp, image.count() * Hidden<E>::rows_of(image), threads};
}

template <class E>
int64_t replay_bytes(const NetworkReplay& m, int threads) {
    const Portions portions = portions_of<E>(m, threads);
    const auto bytes = [&](int64_t images) { return images ? Images<E>(m, 0, images, nullptr).bytes() : 0; };
    return max(portions.whole ? threads * bytes(portions.at_once) : 0, bytes(portions.rest));
}

template <class E>
void replay(const NetworkReplay& m, int threads) {
    const Portions portions = portions_of<E>(m, threads);
    const bool whole = !worth_small_ranges(m.vjp, threads);
    const Ranges ranges{portions.whole, threads, whole};
    const WeightGradients<E> weights(m.vjp, whole ? threads : 2 * threads, threads);
    const auto run = [&](int64_t first, int64_t count, char* memory, int64_t range, int team) {
        const Images<E> images(m, first, count, memory);
        images.clear_padding();
        trace_bands<E>(images.trace, images.bands, &images.hidden, team);
        m.between(m.context, first, count, images.trace.h, images.dh, team);
        vjp_bands<E>(images.vjp, images.bands, &images.hidden, weights, Ranges{images.bands.count(), team, team == 1 || whole}, range, team);
    };
    char* memory = static_cast<char*>(m.memory);
    const int64_t bytes = Images<E>(m, 0, portions.at_once, memory).bytes();
    if (portions.whole) {
        share_out(threads, ranges.count(), [&](Shared& left) {
            for (int64_t r; (r = left.take()) >= 0;) {
                const int64_t end = ranges.begin(r + 1);
                for (int64_t i = ranges.begin(r); i < end; i += portions.at_once) {
                    run(i, min(portions.at_once, end - i), memory + left.own() * bytes, r, 1);
                }
            }
        });
    }
    if (portions.rest) run(portions.whole, portions.rest, memory, 0, threads);
    weights.finish(m.vjp, threads);
}

// f(number of the type that the network multiplies).
template <class F>
auto with_factor_type([[maybe_unused]] Type type, const F& f) {
#ifdef __AVX512BF16__
    if (type == Type::bf16) return f(BFloat16());
#endif
    return f(float());
}

}  // namespace

int64_t network_packed_size(Type type, int64_t few, int64_t hidden, int64_t out) {
    return with_factor_type(type, [&](auto number) {
        using E = decltype(number);
        return Folded<E>(Sizes<E>(few, hidden, out)).size;
    });
}

void network_fold(const NetworkFold& m, int threads) {
    with_factor_type(m.type, [&](auto number) { fold<decltype(number)>(m.network, m.packed, threads); });
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
