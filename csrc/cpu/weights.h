// The coupling network's weights: normalisation folded in, packed as right factors (product.h), and the way back from
// gradients of folded weights to those of the parameters.
#pragma once
#include "../formulas.h"
#include "winograd.h"

namespace flowkern::FLOWKERN_ISA {

// Sizes of the factors, in units of E, and what the 3x3 convolutions are products of: taps, or points (winograd.h).
template <class E>
struct Sizes {
    int64_t few, hidden, out;     // channels
    int64_t few_units, hidden_units, out_units;
    Over over;

    Sizes(int64_t few, int64_t hidden, int64_t out, int64_t height, int64_t width)
        : few(few), hidden(hidden), out(out), few_units(ceil_div(few, PER_UNIT<E>)),
          hidden_units(ceil_div(hidden, PER_UNIT<E>)), out_units(ceil_div(out, PER_UNIT<E>)),
          over(sums_over<E>(hidden, height, width)) {}
    explicit Sizes(const NetworkVjp& m) : Sizes(m.network.few, m.network.hidden, m.network.out, m.height, m.width) {}
    // Of the first and third layers' factors: how many there are, rows of a right one, and columns.
    int64_t factors() const {
        int64_t points = 1;
        by_tiles(over, [&](auto tile) { points = decltype(tile)::POINTS; });
        return points;
    }
    // Of their gradients, sums over squares whatever the tiles.
    int64_t summed() const { return over == Over::taps ? 1 : Square::POINTS; }
    int64_t few_depth() const { return over == Over::taps ? 9 * few_units : few; }
    int64_t out_depth() const { return over == Over::taps ? 9 * out_units : out; }
    int64_t few_columns() const { return over == Over::taps ? 9 * few : few; }
    int64_t out_columns() const { return over == Over::taps ? 9 * out : out; }
    // Rows of scratch arrays in numbers of E: whole vectors, and an odd number of cache lines so that columns don't collide.
    static int64_t row(int64_t units) { return PER_UNIT<E> * (padded<float>(units + WIDTH) | WIDTH); }
    int64_t hidden_row() const { return row(hidden_units); }
};

inline float number(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }

// Where a weight's tap lies, from the numbers of its inputs and outputs on.
inline int64_t tap_offset(const Weight& w, int64_t tap) { return tap / 3 * w.row + tap % 3 * w.column; }

// exp of each of n numbers times a factor.
struct Exponentials {
    Exponentials(const void* from, int64_t n, float factor) : values(n) {
        for (int64_t i = 0; i < n; i++) values.data()[i] = exponential(factor * number(from, i));
    }
    float operator[](int64_t i) const { return values.data()[i]; }
    Scratch<float> values;
};

struct Scales {
    Exponentials first, second, third;
    explicit Scales(const Network& n)
        : first(n.scale1, n.hidden, 1), second(n.scale2, n.hidden, 1), third(n.logs, n.out, 3) {}
};

// One dimension of a factor: where its numbers lie in the weight, and what they are multiplied by; 0 for padding.
struct Axis {
    Scratch<int32_t> offset;
    Scratch<float> scale;

    // Numbered (group, channel), `padded` channels a group of which `channels` exist; from(group, channel) is an offset.
    template <class F, class G>
    Axis(int64_t groups, int64_t channels, int64_t padded, const F& from, const G& scale_of)
        : offset(groups * padded + WIDTH), scale(groups * padded + WIDTH) {
        offset.clear(), scale.clear();
        for (int64_t i = 0, g = 0; g < groups; g++) {
            for (int64_t c = 0; c < padded; c++, i++) {
                offset.data()[i] = c < channels ? int32_t(from(g, c)) : 0;
                scale.data()[i] = c < channels ? scale_of(c) : 0;
            }
        }
    }
};

// A right factor to be packed, whose number (i, column) is the weight's at the sum of both offsets, times both scales.
template <class E>
struct Factor {
    const void* weight;
    Axis rows;
    int64_t depth;
    Axis columns;
    int64_t count;  // of columns
    float* packed;
    const int64_t* taps = nullptr;  // where they lie, of a convolution by tiles, which is a factor for each point
    Over over = Over::taps;

    // Threads share slices of panels: one panel of few columns may be half of the work.
    int64_t slices() const { return panel_count<E>(count) * slices_of_panel(); }
    void pack_slice(int64_t i) const {
        const Panel p = panel<E>(count, i / slices_of_panel());
        const int64_t begin = i % slices_of_panel() * SLICE, end = min(begin + SLICE, depth);
        if constexpr (PER_UNIT<E> == 1) {
            if (by_tiles(over, [&](auto tile) { pack_points(tile, p, begin, end); })) return;
        }
        pack_numbers(p, begin, end);
    }

  private:
    static constexpr int64_t SLICE = 32;  // rows
    int64_t slices_of_panel() const { return ceil_div(depth, SLICE); }

    void pack_numbers(const Panel& p, int64_t begin, int64_t end) const {
        const float* data = static_cast<const float*>(weight);
        const int64_t first = p.first * WIDTH, valid = min(p.vectors * WIDTH, count - first);
        float* to = packed + packed_depth<E>(depth) * first + begin * p.vectors * WIDTH;
        const int32_t* offset = columns.offset.data() + first;
        const float* scale = columns.scale.data() + first;
        for (int64_t k = begin; k < end; k++, to += p.vectors * WIDTH) {
            const float* row[2];
            float factor[2];
            for (int n = 0; n < PER_UNIT<E>; n++) {
                row[n] = data + rows.offset.data()[k * PER_UNIT<E> + n];
                factor[n] = rows.scale.data()[k * PER_UNIT<E> + n];
            }
            const auto number = [&](int n, int64_t j) {
                E converted;
                convert(row[n][offset[j]] * factor[n] * scale[j], converted);
                return converted;
            };
            if constexpr (PER_UNIT<E> == 1) {
#pragma omp simd
                for (int64_t j = 0; j < valid; j++) to[j] = unit_of(number(0, j));
            } else {
#pragma omp simd
                for (int64_t j = 0; j < valid; j++) to[j] = unit_of(number(0, j), number(1, j));
            }
            for (int64_t j = valid; j < p.vectors * WIDTH; j++) to[j] = 0;
        }
        if (end == depth) memset(to, 0, (packed_depth<E>(depth) - depth) * p.vectors * WIDTH * sizeof(float));
    }

    template <class Tile>
    void pack_points(Tile, const Panel& p, int64_t begin, int64_t end) const {
        const int64_t first = p.first * WIDTH, size = packed_size<E>(depth, count);
        float* to = packed + depth * first + begin * p.vectors * WIDTH;
        for (int64_t k = begin; k < end; k++) {
            const float* row = static_cast<const float*>(weight) + rows.offset.data()[k];
            const float factor = rows.scale.data()[k];
            for (int64_t j = first; j < first + p.vectors * WIDTH; j += WIDTH, to += WIDTH) {
                const int32_t* offset = columns.offset.data() + j;
                const float* scale = columns.scale.data() + j;
                Vector<float> w[9], u[Tile::POINTS];
                for (int t = 0; t < 9; t++) {
                    const float* tap = row + taps[t];
                    float numbers[WIDTH];
#pragma omp simd
                    for (int l = 0; l < WIDTH; l++) {
                        E number;
                        convert(tap[offset[l]] * factor * scale[l], number);
                        numbers[l] = unit_of(number);
                    }
                    w[t] = load(numbers);
                }
                Tile::of_taps(w, u);
#pragma GCC unroll 24
                for (int n = 0; n < Tile::POINTS; n++) store(to + n * size, u[n]);
            }
        }
    }
};

// Packs a network's three.
template <class E>
void pack_factors(int threads, const Factor<E> (&factors)[3]) {
    share_out(threads, factors[0].slices() + factors[1].slices() + factors[2].slices(), [&](Shared& left) {
        for (int64_t i; (i = left.take()) >= 0;) {
            const Factor<E>* factor = factors;
            for (; i >= factor->slices(); factor++) i -= factor->slices();
            factor->pack_slice(i);
        }
    });
}

// The axes of the three weights as factors. Of what a factor's number is multiplied by, the row's or the column's scale
// is one.
template <class E>
struct Axes {
    const Network& n;
    const Sizes<E>& s;
    const Scales& e;
    int64_t first_taps[9], third_taps[9];

    Axes(const Network& n, const Sizes<E>& s, const Scales& e) : n(n), s(s), e(e) {
        for (int64_t t = 0; t < 9; t++) {
            first_taps[t] = tap_offset(n.weight1, t);
            third_taps[t] = tap_offset(n.weight3, 8 - t);  // from last to first
        }
    }
    static float one(int64_t) { return 1; }

    // The first layer's inputs and the third one's outputs, for every tap, or once for all.
    Axis few(int64_t padded) const {
        return {groups(), n.few, padded, [&](int64_t t, int64_t c) { return (groups() == 1 ? 0 : first_taps[t]) + c * n.weight1.in; }, one};
    }
    Axis out(int64_t padded) const {
        return {groups(), n.out, padded, [&](int64_t t, int64_t c) { return (groups() == 1 ? 0 : third_taps[t]) + c * n.weight3.out; },
                [&](int64_t c) { return e.third[c]; }};
    }
    int64_t groups() const { return s.over == Over::taps ? 9 : 1; }
    Axis hidden(int64_t stride, const Exponentials* scale) const {
        return {1, n.hidden, s.hidden_units * PER_UNIT<E>, [=](int64_t, int64_t c) { return c * stride; },
                [=](int64_t c) { return scale ? (*scale)[c] : 1; }};
    }
};

// Where the folded weights lie in NetworkFold's `packed`: factors of the three layers, then their biases.
template <class E>
struct Folded {
    int64_t w1 = 0, w2, w3, b1, b2, b3, size;
    explicit Folded(const Sizes<E>& s) {
        w2 = w1 + s.factors() * packed_size<E>(s.few_depth(), s.hidden);
        w3 = w2 + packed_size<E>(s.hidden_units, s.hidden);
        b1 = w3 + s.factors() * packed_size<E>(s.hidden_units, s.out_columns());
        b2 = b1 + padded<float>(s.hidden);
        b3 = b2 + padded<float>(s.hidden);
        size = b3 + padded<float>(s.out);
    }
};

template <class E>
void fold(const NetworkFold& m, int threads) {
    const Network& n = m.network;
    float* packed = m.packed;
    const Sizes<E> s(n.few, n.hidden, n.out, m.height, m.width);
    const Folded<E> to(s);
    const Scales e(n);
    const Axes<E> axes(n, s, e);
    pack_factors<E>(threads, {
        {n.weight1.data, axes.few(s.few_units * PER_UNIT<E>), s.few_depth(), axes.hidden(n.weight1.out, &e.first), n.hidden,
         packed + to.w1, axes.first_taps, s.over},
        {n.weight2.data, axes.hidden(n.weight2.in, nullptr), s.hidden_units, axes.hidden(n.weight2.out, &e.second), n.hidden,
         packed + to.w2},
        {n.weight3.data, axes.hidden(n.weight3.in, nullptr), s.hidden_units, axes.out(n.out), s.out_columns(), packed + to.w3,
         axes.third_taps, s.over},
    });
    memset(packed + to.b1, 0, (to.size - to.b1) * sizeof(float));
    for (int64_t i = 0; i < n.hidden; i++) {
        packed[to.b1 + i] = e.first[i] * number(n.bias1, i);
        packed[to.b2 + i] = e.second[i] * number(n.bias2, i);
    }
    for (int64_t i = 0; i < n.out; i++) packed[to.b3 + i] = e.third[i] * number(n.bias3, i);
}

// The transposed factors, for the way back.
template <class E>
struct Backward {
    Scratch<float> w3, w2, w1;
    Backward(const Network& n, const Sizes<E>& s, const Scales& e, int threads)
        : w3(s.factors() * packed_size<E>(s.out_depth(), n.hidden)), w2(packed_size<E>(s.hidden_units, n.hidden)),
          w1(s.factors() * packed_size<E>(s.hidden_units, s.few_columns())) {
        const Axes<E> axes(n, s, e);
        pack_factors<E>(threads, {
            {n.weight3.data, axes.out(s.out_units * PER_UNIT<E>), s.out_depth(), axes.hidden(n.weight3.in, nullptr), n.hidden,
             w3.data(), axes.third_taps, s.over},
            {n.weight2.data, axes.hidden(n.weight2.out, &e.second), s.hidden_units, axes.hidden(n.weight2.in, nullptr),
             n.hidden, w2.data()},
            {n.weight1.data, axes.hidden(n.weight1.out, &e.first), s.hidden_units, axes.few(n.few), s.few_columns(), w1.data(),
             axes.first_taps, s.over},
        });
    }
};

// What each thread sums over its pixels: gradients of the three folded factors, their rows padded to whole tiles, and of the
// biases.
template <class E>
struct Sums {
    int64_t w1 = 0, w2, w3, b1, b2, b3, size;
    explicit Sums(const Sizes<E>& s) {
        const int64_t hidden = padded<float>(s.hidden);
        w2 = w1 + padded<float>(s.summed() * s.few_depth() * PER_UNIT<E>) * hidden;
        w3 = w2 + padded<float>(s.hidden) * hidden;
        b1 = w3 + padded<float>(s.summed() * s.out_depth() * PER_UNIT<E>) * hidden;
        b2 = b1 + hidden;
        b3 = b2 + hidden;
        size = b3 + padded<float>(s.out);
    }
};

// From those sums to the gradients of the parameters: for a folded weight w exp(s) and bias exp(s) b, what is found for
// them becomes the gradients of w, s and b. Those that are not wanted have no data.
template <class E>
void unfold(const Network& n, const Network& gradient, const Sizes<E>& s, const Scales& scales, const float* total, int threads) {
    const Sums<E> where(s);
    const int64_t few = s.few_units * PER_UNIT<E>, out = s.out_units * PER_UNIT<E>;
    const int64_t wide = padded<float>(n.hidden);
    // `count` outputs from o on of a layer. Term i of all of them lies at dw(i) and belongs to the weight's number at
    // offset(weight, i) from its output's start.
    const auto rows = [](const Weight& w, const Weight& g, int64_t o, int64_t count, int64_t terms, const auto& dw,
                         const auto& offset, const Exponentials& e, double* sum) {
        for (int64_t i = 0; i < terms; i++) {
            const float *d = dw(i), *from = static_cast<const float*>(w.data) + o * w.out + offset(w, i);
            for (int64_t j = 0; j < count; j++) sum[j] += double(d[j]) * from[j * w.out];
            if (!g.data) continue;
            float* to = static_cast<float*>(g.data) + o * g.out + offset(g, i);
            for (int64_t j = 0; j < count; j++) to[j * g.out] = d[j] * e[o + j];
        }
    };
    const auto finish = [](int64_t o, int64_t count, const float* db, const void* bias, const double* sum, const Exponentials& e,
                           double factor, void* dscale, void* dbias) {
        for (int64_t j = o; j < o + count; j++) {
            const double all = sum[j - o] + double(db[j]) * number(bias, j);
            if (dscale) static_cast<float*>(dscale)[j] = float(factor * e[j] * all);
            if (dbias) static_cast<float*>(dbias)[j] = e[j] * db[j];
        }
    };
    parallel(threads, ceil_div(n.hidden, WIDTH), [&](int64_t begin, int64_t end) {
        for (int64_t o = begin * WIDTH; o < min(end * WIDTH, n.hidden); o += WIDTH) {
            const int64_t count = min(WIDTH, n.hidden - o);
            double first[WIDTH] = {}, second[WIDTH] = {};
            for (int64_t tap = 0; tap < 9; tap++) {
                rows(n.weight1, gradient.weight1, o, count, n.few,
                     [&](int64_t i) { return total + where.w1 + (tap * few + i) * wide + o; },
                     [&](const Weight& w, int64_t i) { return i * w.in + tap_offset(w, tap); }, scales.first, first);
            }
            for (int64_t j = 0; j < count; j++) {
                rows(n.weight2, gradient.weight2, o + j, 1, n.hidden,
                     [&](int64_t i) { return total + where.w2 + (o + j) * wide + i; },
                     [&](const Weight& w, int64_t i) { return i * w.in; }, scales.second, second + j);
            }
            finish(o, count, total + where.b1, n.bias1, first, scales.first, 1, gradient.scale1, gradient.bias1);
            finish(o, count, total + where.b2, n.bias2, second, scales.second, 1, gradient.scale2, gradient.bias2);
        }
    });
    parallel(threads, n.out, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++) {
            double sum = 0;
            for (int64_t tap = 0; tap < 9; tap++) {
                rows(n.weight3, gradient.weight3, o, 1, n.hidden,
                     [&](int64_t i) { return total + where.w3 + ((8 - tap) * out + o) * wide + i; },
                     [&](const Weight& w, int64_t i) { return i * w.in + tap_offset(w, tap); }, scales.third, &sum);
            }
            finish(o, 1, total + where.b3, n.bias3, &sum, scales.third, 3, gradient.logs, gradient.bias3);
        }
    });
}

}  // namespace flowkern::FLOWKERN_ISA
