// Glow's coupling network, forward and backward, on chunks of pixels whose hidden activations stay in cache.
//
// All work is matrix products over a chunk's pixels (product.h): the 3x3 convolutions gather or scatter their nine taps
// (taps.h). With X the taps of a, D those of dh, and the ReLUs' masks left out:
//     H1 = X W1, H2 = H1 W2, T = H2 W3, h = scatter(T)
//     G2 = D W3', G1 = G2 W2', da = scatter(G1 W1'), dW1 = X' G1, dW2 = G2' H1, dW3 = D' H2.
// The third layer's taps are numbered from last to first, because they are scattered where the first layer's are gathered.
#include "outer.h"
#include "taps.h"
#include "weights.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// Pixels, a multiple of ROWS. Sums over pixels leave a tile after each chunk, which larger chunks make up for.
template <class E>
constexpr int64_t CHUNK = TILED<E> ? 128 : 64;

// Images given by a pointer and strides, or dense ones.
inline auto pixels_of(const Image& image) {
    return [=](int64_t n, int64_t y, int64_t x) {
        return static_cast<const float*>(image.data) + n * image.sample + y * image.row + x * image.pixel;
    };
}
template <class E>
auto dense_pixels(const void* data, const Bands& bands, int64_t channels) {
    return [=](int64_t n, int64_t y, int64_t x) {
        return static_cast<const E*>(data) + ((n * bands.height + y) * bands.width + x) * channels;
    };
}

template <class E>
void trace(const NetworkTrace& m, int threads) {
    const Sizes<E> s(m.few, m.hidden, m.out);
    const Folded<E> folded(s);
    const Bands bands(m.samples, m.height, m.width);
    const float* packed = m.packed;
    const int64_t wide = s.few_units * PER_UNIT<E>, size = bands.bordered() * m.out, row = s.hidden_row();
    const int64_t taps = padded<float>(9 * m.out) | WIDTH;
    Scratch<float> sums(bands.count() * size + WIDTH);
    parallel(threads, bands.count(), [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const Tiles<E> tiles;
        Rows<E> image(bands.bordered(), wide), x(CHUNK<E>, s.row(9 * s.few_units)), h1(CHUNK<E>, row), h2(CHUNK<E>, row);
        Rows<float> sent(CHUNK<E>, taps);
        const auto rectified = [](Rows<E>& to) {  // NaN stays
            return [&](int64_t r, int64_t c, Vector<float> v) { store_numbers(to[r] + c, v < 0 ? Vector<float>{} : v); };
        };
        for (int64_t band = begin; band < end; band++) {
            load_band(bands, band, pixels_of(m.a), m.few, wide, image[0]);
            float* to = sums.data() + band * size;
            memset(to, 0, size * sizeof(float));
            const int64_t pixels = bands.row_count(band) * m.width;
            for (int64_t first = 0; first < pixels; first += CHUNK<E>) {
                const int64_t count = min(CHUNK<E>, pixels - first), rows = ceil_div(count, ROWS<E>) * ROWS<E>;
                gather_taps(image.units().data, m.width, s.few_units, first, count, x.units());
                multiply<E>(x.units(), rows, 9 * s.few_units, packed + folded.w1, m.hidden, packed + folded.b1, rectified(h1));
                multiply<E>(h1.units(), rows, s.hidden_units, packed + folded.w2, m.hidden, packed + folded.b2, rectified(h2));
                multiply<E>(h2.units(), rows, s.hidden_units, packed + folded.w3, 9 * m.out, nullptr,
                            [&](int64_t r, int64_t c, Vector<float> v) { store(sent[r] + c, v); });
                scatter(sent[0], taps, m.width, first, count, m.out, to);
                if (!m.h1) continue;
                const int64_t pixel = bands.first_pixel(band) + first;
                for (int64_t p = 0; p < count; p++) {
                    memcpy(static_cast<E*>(m.h1) + (pixel + p) * m.hidden, h1[p], m.hidden * sizeof(E));
                    memcpy(static_cast<E*>(m.h2) + (pixel + p) * m.hidden, h2[p], m.hidden * sizeof(E));
                }
            }
        }
    });
    const int64_t numbers = m.width * m.out;
    Scratch<float> biases(numbers);  // of a row of pixels
    for (int64_t i = 0; i < numbers; i++) biases.data()[i] = packed[folded.b3 + i % m.out];
    parallel(threads, bands.count(), [&](int64_t begin, int64_t end) {
        const float* bias = biases.data();
        for (int64_t band = begin; band < end; band++) {
            finish_band(bands, band, sums.data(), m.out, [&](int64_t sample, int64_t y, const float* row) {
                E* h = static_cast<E*>(m.h) + (sample * m.height + y) * numbers;
                for (int64_t i = 0; i < numbers; i++) convert(row[i] + bias[i], h[i]);
            });
        }
    });
}

// total += the sums over rows of `columns` columns from the first on, and up to a vector.
template <class E>
void add_rows(const Rows<E>& rows, int64_t first, int64_t count, int64_t columns, float* total) {
    for (int64_t c = 0; c < columns; c += WIDTH) {
        Vector<float> sum{};
        for (int64_t p = 0; p < count; p++) sum += load_numbers(rows[p] + first + c);
        store(total + c, load(total + c) + sum);
    }
}

template <class E>
void vjp(const NetworkVjp& m, int threads) {
    const Network& n = m.network;
    const Sizes<E> s(n.few, n.hidden, n.out);
    const Sums<E> where(s);
    const Scales scales(n);
    const Backward<E> back(n, s, scales, threads);
    const Bands bands(m.samples, m.height, m.width);
    const bool need1 = m.gradient.weight1.data || m.gradient.scale1 || m.gradient.bias1;
    const bool need2 = m.gradient.weight2.data || m.gradient.scale2 || m.gradient.bias2;
    const bool need3 = m.gradient.weight3.data || m.gradient.bias3 || m.gradient.logs;
    const int64_t few = s.few_units * PER_UNIT<E>, out = s.out_units * PER_UNIT<E>, row = s.hidden_row();
    const int64_t x_row = s.row(9 * s.few_units), d_row = s.row(9 * s.out_units), size = bands.bordered() * n.few;
    const int64_t taps = padded<float>(9 * n.few) | WIDTH, ranges = max(1, min(threads, bands.count()));
    Scratch<float> sent_sums(bands.count() * size + WIDTH), totals(ranges * where.size);
    totals.clear();
    parallel(threads, bands.count(), [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const Tiles<E> tiles;
        float* total = totals.data() + ceil_div(begin * ranges, bands.count()) * where.size;
        Rows<E> image(bands.bordered(), few), gradient(bands.bordered(), out), x(CHUNK<E>, x_row), d(CHUNK<E>, d_row);
        Rows<E> h1(CHUNK<E>, row), h2(CHUNK<E>, row), g1(CHUNK<E>, row), g2(CHUNK<E>, row);
        Rows<float> sent(CHUNK<E>, taps);
        const OuterProduct<E> outer(CHUNK<E>, max(max(9 * few, 9 * out), n.hidden), n.hidden);
        const auto masked = [](Rows<E>& to, const Rows<E>& by) {
            return [&](int64_t r, int64_t c, Vector<float> v) {
                store_numbers(to[r] + c, load_numbers(by[r] + c) > 0 ? v : Vector<float>{});
            };
        };
        for (int64_t band = begin; band < end; band++) {
            load_band(bands, band, pixels_of(m.a), n.few, few, image[0]);
            load_band(bands, band, dense_pixels<E>(m.dh, bands, n.out), n.out, out, gradient[0]);
            float* to = sent_sums.data() + band * size;
            memset(to, 0, size * sizeof(float));
            const int64_t pixels = bands.row_count(band) * m.width;
            for (int64_t first = 0; first < pixels; first += CHUNK<E>) {
                const int64_t count = min(CHUNK<E>, pixels - first), rows = ceil_div(count, ROWS<E>) * ROWS<E>;
                const int64_t pixel = bands.first_pixel(band) + first;
                for (int64_t p = 0; p < count; p++) {
                    memcpy(h1[p], static_cast<const E*>(m.h1) + (pixel + p) * n.hidden, n.hidden * sizeof(E));
                    memcpy(h2[p], static_cast<const E*>(m.h2) + (pixel + p) * n.hidden, n.hidden * sizeof(E));
                }
                gather_taps(gradient.units().data, m.width, s.out_units, first, count, d.units());
                // Sums are over whole blocks of pixels: gradients are zero beyond the last, so that nothing comes of the rest.
                for (int64_t p = count; p < rows; p++) memset(d[p], 0, d_row * sizeof(E));
                multiply<E>(d.units(), rows, 9 * s.out_units, back.w3.data(), n.hidden, nullptr, masked(g2, h2));
                if (need3) {
                    outer.add(d, 9 * out, h2, n.hidden, rows, total + where.w3);
                    add_rows(d, 4 * out, count, n.out, total + where.b3);
                }
                multiply<E>(g2.units(), rows, s.hidden_units, back.w2.data(), n.hidden, nullptr, masked(g1, h1));
                if (need2) {
                    outer.add(g2, n.hidden, h1, n.hidden, rows, total + where.w2);
                    add_rows(g2, 0, count, s.hidden, total + where.b2);
                }
                if (need1) {
                    gather_taps(image.units().data, m.width, s.few_units, first, count, x.units());
                    for (int64_t p = count; p < rows; p++) memset(x[p], 0, x_row * sizeof(E));
                    outer.add(x, 9 * few, g1, n.hidden, rows, total + where.w1);
                    add_rows(g1, 0, count, s.hidden, total + where.b1);
                }
                multiply<E>(g1.units(), rows, s.hidden_units, back.w1.data(), 9 * n.few, nullptr,
                            [&](int64_t r, int64_t c, Vector<float> v) { store(sent[r] + c, v); });
                scatter(sent[0], taps, m.width, first, count, n.few, to);
            }
        }
    });
    parallel(threads, bands.count(), [&](int64_t begin, int64_t end) {
        float* da = static_cast<float*>(m.da.data);
        for (int64_t band = begin; band < end; band++) {
            finish_band(bands, band, sent_sums.data(), n.few, [&](int64_t sample, int64_t y, const float* row) {
                float* to = da + sample * m.da.sample + y * m.da.row;
                for (int64_t x = 0; x < bands.width; x++, to += m.da.pixel, row += n.few) {
                    for (int64_t c = 0; c < n.few; c++) to[c] += row[c];
                }
            });
        }
    });
    float* total = totals.data();
    parallel(threads, ceil_div(where.size, 1024), [&](int64_t begin, int64_t end) {
        for (int64_t r = 1; r < ranges; r++) {
            const float* other = total + r * where.size;
            for (int64_t i = begin * 1024; i < min(end * 1024, where.size); i++) total[i] += other[i];
        }
    });
    unfold(n, m.gradient, s, scales, total, threads);
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
    with_factor_type(m.type, [&](auto number) { trace<decltype(number)>(m, threads); });
}

void network_vjp(const NetworkVjp& m, int threads) {
    with_factor_type(m.type, [&](auto number) { vjp<decltype(number)>(m, threads); });
}

}  // namespace flowkern::FLOWKERN_ISA
