// What the coupling network's loops over bands share backward: factors, and sums for the weights' gradients.
#pragma once
#include "hidden.h"
#include "outer.h"

namespace flowkern::FLOWKERN_ISA {

// total += the sums over rows of `columns` columns from the first on, and up to a vector.
template <class E>
void add_rows(const View<E>& rows, int64_t first, int64_t count, int64_t columns, float* total) {
    for (int64_t c = 0; c < columns; c += WIDTH) {
        Vector<float> sum{};
        for (int64_t p = 0; p < count; p++) sum += load_numbers(rows[p] + first + c);
        store(total + c, load(total + c) + sum);
    }
}

// What a product does with its sums: the derivative of a ReLU, whose results these are. As PyTorch's, it lets NaN pass.
template <class E>
auto masked(const View<E>& to, const View<E>& by) {
    return [=](int64_t r, int64_t c, Vector<float> v) {
        store_numbers(to[r] + c, load_numbers(by[r] + c) <= 0 ? Vector<float>{} : v);
    };
}

// What all threads read: the transposed factors; and where each adds up the weights' gradients.
template <class E>
class WeightGradients {
  public:
    WeightGradients(const NetworkVjp& m, int64_t ranges, int threads)
        : s(m), where(s), scales(m.network), back(m.network, s, scales, threads),
          need1(m.gradient.weight1.data || m.gradient.scale1 || m.gradient.bias1),
          need2(m.gradient.weight2.data || m.gradient.scale2 || m.gradient.bias2),
          need3(m.gradient.weight3.data || m.gradient.bias3 || m.gradient.logs), ranges_(ranges), totals_(ranges * where.size) {
        parallel(threads, ranges, [&](int64_t begin, int64_t end) {
            memset(total(begin), 0, (end - begin) * where.size * sizeof(float));
        });
    }
    float* total(int64_t range) const { return totals_.data() + range * where.size; }

    // Writes the parameters' gradients. Ranges are added in order, whoever took them.
    void finish(const NetworkVjp& m, int threads) const {
        float* sum = total(0);
        parallel(threads, ceil_div(where.size, 1024), [&](int64_t begin, int64_t end) {
            for (int64_t r = 1; r < ranges_; r++) {
                const float* other = total(r);
                for (int64_t i = begin * 1024; i < min(end * 1024, where.size); i++) sum[i] += other[i];
            }
        });
        if (s.over != Over::taps) {
            taps_of_sums(sum + where.w1, s.few, threads);
            taps_of_sums(sum + where.w3, s.out, threads);
        }
        unfold(m.network, m.gradient, s, scales, sum, threads);
    }

    const Sizes<E> s;
    const Sums<E> where;
    const Scales scales;
    const Backward<E> back;
    const bool need1, need2, need3;

  private:
    // Gradients of all of a square's points of some channels, (points, channels, hidden), become those of taps, (9, channels, hidden).
    void taps_of_sums(float* sum, int64_t channels, int threads) const {
        const int64_t wide = padded<float>(s.hidden);
        parallel(threads, channels, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * wide; i < end * wide; i += WIDTH) {
                Vector<float> u[Square::POINTS], w[9];
                for (int n = 0; n < Square::POINTS; n++) u[n] = load(sum + n * channels * wide + i);
                Square::to_taps(u, w);
                for (int n = 0; n < 9; n++) store(sum + n * channels * wide + i, w[n]);
            }
        });
    }

    const int64_t ranges_;
    const Scratch<float> totals_;
};

}  // namespace flowkern::FLOWKERN_ISA
