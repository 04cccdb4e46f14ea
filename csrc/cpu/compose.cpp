// ActNorm and invertible 1x1 convolution composed into one mix a step, and the gradient of that: see flowkern/mix.py. In
// double precision throughout, because these matrices are tiny and the error of M^-1 M - I is the drift of the whole chain.
#include <cmath>

#include "../params.h"
#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

// A square matrix of doubles in scratch memory, zero at first, in rows of whole vectors.
class Square {
  public:
    explicit Square(int64_t n) : row_(padded<double>(n)), memory_(n * row_) { memory_.clear(); }
    double* operator[](int64_t i) const { return memory_.data() + i * row_; }

  private:
    int64_t row_;
    Scratch<double> memory_;
};

// to += factor * from, two rows of such a matrix, whose numbers before `begin` and from `end` on are zero in `from`: whole
// vectors, as rows are short.
inline void add_row(double* to, const double* from, double factor, int64_t begin, int64_t end) {
    constexpr int64_t W = LANES<double>;
    for (int64_t j = begin / W * W; j < end; j += W) store(to + j, load(to + j) + factor * load(from + j));
}

inline double dot(const double* a, const double* b, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

// One step's parameters, in whole: L with its unit diagonal, U with its own, U with ActNorm's scale.
template <class T>
struct Factors {
    int64_t n;
    const int64_t* permutation;
    const T *log_s, *log_scale, *bias;
    Square low, up, scaled;
    Scratch<double> scale;

    template <class M>
    Factors(const M& m, int64_t step)
        : n(m.channels), permutation(m.permutation + step * n), log_s(static_cast<const T*>(m.log_s) + step * n),
          log_scale(static_cast<const T*>(m.log_scale) + step * n), bias(static_cast<const T*>(m.bias) + step * n),
          low(n), up(n), scaled(n), scale(n) {
        const T *lower = static_cast<const T*>(m.lower) + step * n * n, *upper = static_cast<const T*>(m.upper) + step * n * n;
        const T* sign = static_cast<const T*>(m.sign) + step * n;
        for (int64_t j = 0; j < n; j++) scale.data()[j] = std::exp(double(log_scale[j]));
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < i; j++) low[i][j] = lower[i * n + j];
            low[i][i] = 1;
            up[i][i] = sign[i] * std::exp(double(log_s[i]));
            for (int64_t j = i + 1; j < n; j++) up[i][j] = upper[i * n + j];
            for (int64_t j = i; j < n; j++) scaled[i][j] = up[i][j] * scale.data()[j];
        }
    }

    // L U diag(scale), before rows are permuted. Added to `result`, as below.
    void add_product(const Square& result) const {
        for (int64_t i = 0; i < n; i++) {
            for (int64_t k = 0; k <= i; k++) add_row(result[i], scaled[k], low[i][k], k, n);
        }
    }

    // Its inverse, before columns are permuted.
    void add_inverse(const Square& result) const {
        Square low_inverse(n), up_inverse(n);
        for (int64_t i = 0; i < n; i++) {
            low_inverse[i][i] = 1;
            for (int64_t k = 0; k < i; k++) add_row(low_inverse[i], low_inverse[k], -low[i][k], 0, k + 1);
        }
        for (int64_t i = n - 1; i >= 0; i--) {
            up_inverse[i][i] = 1;
            for (int64_t k = i + 1; k < n; k++) add_row(up_inverse[i], up_inverse[k], -up[i][k], k, n);
            for (int64_t j = i; j < n; j++) up_inverse[i][j] /= up[i][i];
        }
        for (int64_t i = 0; i < n; i++) {
            for (int64_t k = i; k < n; k++) add_row(result[i], low_inverse[k], up_inverse[i][k] / scale.data()[i], 0, k + 1);
        }
    }
};

template <class T>
void compose_steps(const Compose& m, int threads) {
    const int64_t n = m.channels;
    parallel(threads, m.steps, [&](int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; step++) {
            const Factors<T> f(m, step);
            T *matrix = static_cast<T*>(m.matrix) + step * n * n, *inverse = static_cast<T*>(m.inverse) + step * n * n;
            T* offset = static_cast<T*>(m.offset) + step * n;
            const Square product(n), back(n);
            f.add_product(product);
            f.add_inverse(back);
            for (int64_t i = 0; i < n; i++) {
                const double* row = product[f.permutation[i]];
                double sum = 0;
                for (int64_t j = 0; j < n; j++) {
                    sum += row[j] * f.bias[j];
                    matrix[i * n + j] = T(row[j]);
                    inverse[i * n + j] = T(back[i][f.permutation[j]]);
                }
                offset[i] = T(sum);
            }
        }
    });
    double sum = 0;
    for (int64_t i = 0; i < m.steps * n; i++) {
        sum += double(static_cast<const T*>(m.log_s)[i]) + double(static_cast<const T*>(m.log_scale)[i]);
    }
    *static_cast<T*>(m.logdet) = T(sum);
}

template <class T>
void compose_vjp_steps(const ComposeVjp& m, int threads) {
    const int64_t n = m.channels;
    const double dlogdet = *static_cast<const T*>(m.dlogdet);
    parallel(threads, m.steps, [&](int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; step++) {
            const Factors<T> f(m, step);
            const T *dmatrix = static_cast<const T*>(m.dmatrix) + step * n * n, *doffset = static_cast<const T*>(m.doffset) + step * n;
            T *dlower = static_cast<T*>(m.dlower) + step * n * n, *dupper = static_cast<T*>(m.dupper) + step * n * n;
            T *dlog_s = static_cast<T*>(m.dlog_s) + step * n, *dlog_scale = static_cast<T*>(m.dlog_scale) + step * n;
            T* dbias = static_cast<T*>(m.dbias) + step * n;
            const Square product(n), dproduct(n), dscaled(n);
            f.add_product(product);
            Scratch<double> sums(2 * padded<double>(n));
            sums.clear();
            double *to_bias = sums.data(), *to_scale = sums.data() + padded<double>(n);
            for (int64_t i = 0; i < n; i++) {
                const int64_t row = f.permutation[i];
                add_row(to_bias, product[row], doffset[i], 0, n);
                for (int64_t j = 0; j < n; j++) dproduct[row][j] = double(dmatrix[i * n + j]) + double(doffset[i]) * f.bias[j];
            }
            for (int64_t i = 0; i < n; i++) {
                for (int64_t k = 0; k <= i; k++) add_row(dscaled[k], dproduct[i], f.low[i][k], 0, n);
            }
            for (int64_t i = 0; i < n; i++) {
                for (int64_t j = 0; j < n; j++) {
                    dlower[i * n + j] = T(j < i ? dot(dproduct[i] + j, f.scaled[j] + j, n - j) : 0);
                    dupper[i * n + j] = T(j > i ? dscaled[i][j] * f.scale.data()[j] : 0);
                    to_scale[j] += dscaled[i][j] * f.scaled[i][j];
                }
                dlog_s[i] = T(dscaled[i][i] * f.scaled[i][i] + dlogdet);
            }
            for (int64_t j = 0; j < n; j++) {
                dlog_scale[j] = T(to_scale[j] + dlogdet);
                dbias[j] = T(to_bias[j]);
            }
        }
    });
}

}  // namespace

void compose(const Compose& m, int threads) {
    m.type == Type::f64 ? compose_steps<double>(m, threads) : compose_steps<float>(m, threads);
}

void compose_vjp(const ComposeVjp& m, int threads) {
    m.type == Type::f64 ? compose_vjp_steps<double>(m, threads) : compose_vjp_steps<float>(m, threads);
}

}  // namespace flowkern::FLOWKERN_ISA
