// The coupling network forward.
#pragma once
#include "taps_trace.h"
#include "winograd_trace.h"

namespace flowkern::FLOWKERN_ISA {

// The network's output, and hidden activations where they are left, in the order of those loops.
template <class E>
void trace_bands(const NetworkTrace& m, const Bands& bands, const Hidden<E>* kept, int threads) {
    const Sizes<E> sizes(m.few, m.hidden, m.out, m.height, m.width);
    const int64_t numbers = m.width * m.out;
    const Scratch<float> sums(bands.count() * bands.bordered() * m.out + WIDTH), biases(numbers);  // of a row of pixels
    share_out(threads, bands.count(), [&](Shared& left) {
        const auto run = [&](const auto& loop) {
            for (int64_t band; (band = left.take()) >= 0;) loop.run(m, band, sums.data());
        };
        if constexpr (PER_UNIT<E> == 1) {
            if (by_tiles(sizes.over, [&](auto tile) { run(WinogradTrace<E, decltype(tile)>(sizes, bands, kept)); })) return;
        }
        run(TapsTrace<E>(sizes, bands, kept));
    });
    const float* of_channels = m.packed + Folded<E>(sizes).b3;
    for (int64_t i = 0; i < numbers; i++) biases.data()[i] = of_channels[i % m.out];
    parallel(threads, bands.count(), [&](int64_t begin, int64_t end) {
        const float* bias = biases.data();
        for (int64_t band = begin; band < end; band++) {
            finish_band(bands, band, sums.data(), m.out, [&](int64_t sample, int64_t y, const float* row) {
                Stored<E>* h = static_cast<Stored<E>*>(m.h) + (sample * m.height + y) * numbers;
                for (int64_t i = 0; i < numbers; i++) convert(row[i] + bias[i], h[i]);
            });
        }
    });
}

}  // namespace flowkern::FLOWKERN_ISA
