#include "squeeze.h"

#include "parallel.h"

namespace flowkern::cpu {
namespace {

// One row of blocks. In planes a block's two columns lie beside each other, in the image as in the result.
template <class T>
void squeeze_row(const Squeeze& m, const T* image, T* to) {
    const int64_t out = 4 * m.channels;
    if (m.in_column == 1) {
        for (int64_t c = 0; c < m.channels; c++) {
            for (int64_t y = 0; y < 2; y++) {
                const T* from = image + c * m.channel + y * m.in_row;
                T* pairs = to + 4 * c + 2 * y;
                for (int64_t x = 0; x < m.width; x++) memcpy(pairs + x * out, from + x * m.column, 2 * sizeof(T));
            }
        }
        return;
    }
    for (int64_t x = 0; x < m.width; x++) {
        for (int64_t i = 0; i < 4; i++) {
            const T* from = image + x * m.column + i / 2 * m.in_row + i % 2 * m.in_column;
            for (int64_t c = 0; c < m.channels; c++) to[x * out + 4 * c + i] = from[c * m.channel];
        }
    }
}

template <class T>
void squeeze_rows(const Squeeze& m, int threads) {
    const T* image = static_cast<const T*>(m.x);
    T* y = static_cast<T*>(m.y);
    baseline::parallel(threads, m.samples * m.height, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            squeeze_row(m, image + i / m.height * m.sample + i % m.height * m.row, y + i * m.width * 4 * m.channels);
        }
    });
}

}  // namespace

void squeeze(const Squeeze& m, int threads) {
    m.type == Type::f64 ? squeeze_rows<double>(m, threads) : squeeze_rows<float>(m, threads);
}

}  // namespace flowkern::cpu
