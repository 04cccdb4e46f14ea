// The coupling network backward.
#pragma once
#include "taps_vjp.h"
#include "winograd_vjp.h"

namespace flowkern::FLOWKERN_ISA {

// Adds weights' gradients to those of ranges of bands, numbered from `first_range` on, and to the gradient of a. kept: as of
// TapsVjp.
template <class E>
void vjp_bands(const NetworkVjp& m, const Bands& bands, const Hidden<E>* kept, const WeightGradients<E>& weights,
               const Ranges& ranges, int64_t first_range, int threads) {
    const int64_t count = bands.count(), few = m.network.few;
    const Scratch<float> sums(count * bands.bordered() * few + WIDTH);
    share_out(threads, ranges.count(), [&](Shared& left) {
        const auto run = [&](const auto& loop) {
            for (int64_t r; (r = left.take()) >= 0;) {
                for (int64_t band = ranges.begin(r); band < ranges.begin(r + 1); band++) {
                    loop.run(m, band, sums.data(), weights.total(first_range + r));
                }
            }
        };
        if constexpr (PER_UNIT<E> == 1) {
            if (by_tiles(weights.s.over, [&](auto tile) { run(WinogradVjp<E, decltype(tile)>(weights, bands, kept)); })) return;
        }
        run(TapsVjp<E>(weights, bands, kept));
    });
    parallel(threads, count, [&](int64_t begin, int64_t end) {
        float* da = static_cast<float*>(m.da.data);
        for (int64_t band = begin; band < end; band++) {
            finish_band(bands, band, sums.data(), few, [&](int64_t sample, int64_t y, const float* row) {
                float* to = da + sample * m.da.sample + y * m.da.row;
                for (int64_t x = 0; x < bands.width; x++, to += m.da.pixel, row += few) {
                    for (int64_t c = 0; c < few; c++) to[c] += row[c];
                }
            });
        }
    });
}

}  // namespace flowkern::FLOWKERN_ISA
