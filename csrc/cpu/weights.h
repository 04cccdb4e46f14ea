// The coupling network's weights: normalisation folded in, packed as right factors (product.h), and the way back from
// gradients of folded weights to those of the parameters.
#pragma once
#include "../formulas.h"
#include "parallel.h"
#include "product.h"

namespace flowkern::FLOWKERN_ISA {

// Sizes of the factors, in units of E.
template <class E>
struct Sizes {
    int64_t few, hidden, out;     // channels
    int64_t few_units, hidden_units, out_units;

    Sizes(int64_t few, int64_t hidden, int64_t out)
        : few(few), hidden(hidden), out(out), few_units(ceil_div(few, PER_UNIT<E>)),
          hidden_units(ceil_div(hidden, PER_UNIT<E>)), out_units(ceil_div(out, PER_UNIT<E>)) {}
    // Rows of scratch arrays in numbers of E: whole vectors, and an odd number of cache lines so that columns don't collide.
    static int64_t row(int64_t units) { return PER_UNIT<E> * (padded<float>(units + WIDTH) | WIDTH); }
    int64_t hidden_row() const { return row(hidden_units); }
};

inline float number(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
inline float at(const Weight& w, int64_t o, int64_t i, int64_t tap) {
    return number(w.data, o * w.out + i * w.in + tap / 3 * w.row + tap % 3 * w.column);
}

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

inline uint32_t unit_of(const float* numbers, float) { return bits_of(numbers[0]); }
inline uint32_t unit_of(const float* numbers, BFloat16) {
    BFloat16 low, high;
    convert(numbers[0], low);
    convert(numbers[1], high);
    return low.bits | uint32_t(high.bits) << 16;
}

// Packs a right factor in which element(i, column) is row i's number, i < depth * PER_UNIT.
template <class E, class F>
void pack_factor(int threads, int64_t depth, int64_t columns, float* packed, const F& element) {
    parallel(threads, panel_count(columns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const Panel p = panel(columns, i);
            float* to = packed + depth * p.first * WIDTH;
            for (int64_t k = 0; k < depth; k++, to += p.vectors * WIDTH) {
                for (int64_t j = 0; j < p.vectors * WIDTH; j++) {
                    const int64_t column = p.first * WIDTH + j;
                    float numbers[2] = {0, 0};
                    if (column < columns) {
                        for (int n = 0; n < PER_UNIT<E>; n++) numbers[n] = element(k * PER_UNIT<E> + n, column);
                    }
                    to[j] = float_of(unit_of(numbers, E()));
                }
            }
        }
    });
}

// Where the folded weights lie in NetworkFold's `packed`: factors of the three layers, then their biases.
template <class E>
struct Folded {
    int64_t w1 = 0, w2, w3, b1, b2, b3, size;
    explicit Folded(const Sizes<E>& s) {
        w2 = w1 + packed_size(9 * s.few_units, s.hidden);
        w3 = w2 + packed_size(s.hidden_units, s.hidden);
        b1 = w3 + packed_size(s.hidden_units, 9 * s.out);
        b2 = b1 + padded<float>(s.hidden);
        b3 = b2 + padded<float>(s.hidden);
        size = b3 + padded<float>(s.out);
    }
};

template <class E>
void fold(const Network& n, float* packed, int threads) {
    const Sizes<E> s(n.few, n.hidden, n.out);
    const Folded<E> to(s);
    const Scales e(n);
    const int64_t wide = s.few_units * PER_UNIT<E>;
    pack_factor<E>(threads, 9 * s.few_units, n.hidden, packed + to.w1, [&](int64_t k, int64_t o) {
        return k % wide < n.few ? at(n.weight1, o, k % wide, k / wide) * e.first[o] : 0;
    });
    pack_factor<E>(threads, s.hidden_units, n.hidden, packed + to.w2, [&](int64_t k, int64_t o) {
        return k < n.hidden ? number(n.weight2.data, o * n.weight2.out + k * n.weight2.in) * e.second[o] : 0;
    });
    pack_factor<E>(threads, s.hidden_units, 9 * n.out, packed + to.w3, [&](int64_t k, int64_t column) {
        const int64_t o = column % n.out;
        return k < n.hidden ? at(n.weight3, o, k, 8 - column / n.out) * e.third[o] : 0;
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
        : w3(packed_size(9 * s.out_units, n.hidden)), w2(packed_size(s.hidden_units, n.hidden)),
          w1(packed_size(s.hidden_units, 9 * n.few)) {
        const int64_t wide = s.out_units * PER_UNIT<E>;
        pack_factor<E>(threads, 9 * s.out_units, n.hidden, w3.data(), [&](int64_t k, int64_t i) {
            const int64_t o = k % wide;
            return o < n.out ? at(n.weight3, o, i, 8 - k / wide) * e.third[o] : 0;
        });
        pack_factor<E>(threads, s.hidden_units, n.hidden, w2.data(), [&](int64_t k, int64_t i) {
            return k < n.hidden ? number(n.weight2.data, k * n.weight2.out + i * n.weight2.in) * e.second[k] : 0;
        });
        pack_factor<E>(threads, s.hidden_units, 9 * n.few, w1.data(), [&](int64_t k, int64_t column) {
            return k < n.hidden ? at(n.weight1, k, column % n.few, column / n.few) * e.first[k] : 0;
        });
    }
};

// What each thread sums over its pixels: gradients of the three folded factors and biases.
template <class E>
struct Sums {
    int64_t w1 = 0, w2, w3, b1, b2, b3, size;
    explicit Sums(const Sizes<E>& s) {
        const int64_t hidden = padded<float>(s.hidden);
        w2 = w1 + 9 * s.few_units * PER_UNIT<E> * hidden;
        w3 = w2 + s.hidden * hidden;
        b1 = w3 + 9 * s.out_units * PER_UNIT<E> * hidden;
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
    const auto set = [](void* to, int64_t i, float value) {
        if (to) static_cast<float*>(to)[i] = value;
    };
    const auto set_weight = [](const Weight& g, int64_t o, int64_t i, int64_t tap, float value) {
        if (g.data) static_cast<float*>(g.data)[o * g.out + i * g.in + tap / 3 * g.row + tap % 3 * g.column] = value;
    };
    parallel(threads, n.hidden, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++) {
            const float e = scales.first[o], db = total[where.b1 + o];
            double sum = double(db) * number(n.bias1, o);
            for (int64_t i = 0; i < n.few; i++) {
                for (int64_t tap = 0; tap < 9; tap++) {
                    const float dw = total[where.w1 + (tap * few + i) * wide + o];
                    sum += double(dw) * at(n.weight1, o, i, tap);
                    set_weight(gradient.weight1, o, i, tap, e * dw);
                }
            }
            set(gradient.scale1, o, float(e * sum));
            set(gradient.bias1, o, e * db);
        }
    });
    parallel(threads, n.hidden, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++) {
            const float e = scales.second[o], db = total[where.b2 + o];
            double sum = double(db) * number(n.bias2, o);
            for (int64_t i = 0; i < n.hidden; i++) {
                const float dw = total[where.w2 + o * wide + i];
                sum += double(dw) * number(n.weight2.data, o * n.weight2.out + i * n.weight2.in);
                set_weight(gradient.weight2, o, i, 0, e * dw);
            }
            set(gradient.scale2, o, float(e * sum));
            set(gradient.bias2, o, e * db);
        }
    });
    parallel(threads, n.out, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++) {
            const float e = scales.third[o], db = total[where.b3 + o];
            double sum = double(db) * number(n.bias3, o);
            for (int64_t i = 0; i < n.hidden; i++) {
                for (int64_t tap = 0; tap < 9; tap++) {
                    const float dw = total[where.w3 + ((8 - tap) * out + o) * wide + i];
                    sum += double(dw) * at(n.weight3, o, i, tap);
                    set_weight(gradient.weight3, o, i, tap, e * dw);
                }
            }
            set(gradient.bias3, o, e * db);
            set(gradient.logs, o, float(3 * e * sum));
        }
    });
}

}  // namespace flowkern::FLOWKERN_ISA
