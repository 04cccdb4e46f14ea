#include "../params.h"
#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {
namespace {

constexpr int64_t BLOCK = 4096, STRIP = 128;  // elements per item of work, and per sum

template <class F>
void with_type(Type type, const F& f) {
    if (type == Type::f64) return f(double());
    f(float());
}

// body(begin, end) over all elements, in blocks.
template <class F>
void blockwise(int threads, int64_t size, const F& body) {
    parallel(threads, ceil_div(size, BLOCK), [&](int64_t begin, int64_t end) {
        body(begin * BLOCK, min(end * BLOCK, size));
    });
}

// The sum over all elements of term(begin, end), itself a sum over at most STRIP elements: strips are added within fixed
// blocks, and blocks in order, so that rounding stays small and the thread count changes no bit.
template <class F>
double sum_blockwise(int threads, int64_t size, const F& term) {
    const int64_t blocks = ceil_div(size, BLOCK);
    Scratch<double> partial(blocks);
    parallel(threads, blocks, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) {
            const int64_t last = min((block + 1) * BLOCK, size);
            double sum = 0;
            for (int64_t first = block * BLOCK; first < last; first += STRIP) sum += term(first, min(first + STRIP, last));
            partial.data()[block] = sum;
        }
    });
    double total = 0;
    for (int64_t block = 0; block < blocks; block++) total += partial.data()[block];
    return total;
}

}  // namespace

void shrink(const Shrink& m, int threads) {
    with_type(m.type, [&](auto zero) {
        using T = decltype(zero);
        const T divisor = 1 + *static_cast<const T*>(m.lambda);
        const T *z = static_cast<const T*>(m.z), *g = static_cast<const T*>(m.g);
        T* result = static_cast<T*>(m.result);
        if (!m.dlambda) {
            return blockwise(threads, m.size, [=](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) result[i] = z[i] / divisor;
            });
        }
        const double sum = sum_blockwise(threads, m.size, [=](int64_t begin, int64_t end) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < end; i++) {
                result[i] = g[i] / divisor;
                sum += double(result[i]) * double(z[i]);
            }
            return sum;
        });
        *static_cast<T*>(m.dlambda) = T(-sum / divisor);
    });
}

void consistency_vjp(const Consistency& m, int threads) {
    with_type(m.type, [&](auto zero) {
        using T = decltype(zero);
        const T mu = *static_cast<const T*>(m.mu);
        const T *x = static_cast<const T*>(m.x), *y = static_cast<const T*>(m.y), *g = static_cast<const T*>(m.g);
        T *result = static_cast<T*>(m.result), *dy = static_cast<T*>(m.dy);
        const double sum = sum_blockwise(threads, m.size, [=](int64_t begin, int64_t end) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < end; i++) {
                result[i] = (1 - mu) * g[i];
                dy[i] = mu * g[i];
                sum += double(g[i]) * double(x[i] - y[i]);
            }
            return sum;
        });
        *static_cast<T*>(m.dmu) = T(-sum);
    });
}

}  // namespace flowkern::FLOWKERN_ISA
