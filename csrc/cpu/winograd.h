// 3x3 convolutions with 16 products for four pixels instead of 36: Winograd's minimal filtering F(2x2, 3x3), as Lavin and Gray
// (arXiv:1509.09308) have it, with a sign of theirs moved so that sums of two pixels need none.
//
// An image is divided into tiles of 2x2 pixels. With d the 4x4 pixels around a tile and w the weight's 3x3 taps, in each of the
// two dimensions
//     to_points d = (d0 - d2, d1 + d2, d2 - d1, d3 - d1),   of_taps w = (w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2),
//     combine m = (m0 + m1 + m2, m1 - m2 + m3),             y = combine(of_taps w * to_points d).
// So much for a convolution from few channels to many, whose tile is gathered. One from many to few sends what a tile has to
// the 4x4 pixels around it, which is the transpose: spread(of_taps w * evaluate x), of evaluate = combine' and spread =
// to_points'. What is done to arrays of many channels is then the cheaper of each pair.
#pragma once
#include "factors.h"

namespace flowkern::FLOWKERN_ISA {

constexpr int POINTS = 16;

// For images of even sizes and more tiles than half a block of rows, by networks that multiply fp32 numbers and have enough
// channels for the transforms to be worth it.
template <class E>
bool by_winograd(int64_t hidden, int64_t height, int64_t width) {
    return PER_UNIT<E> == 1 && hidden >= 32 && height % 2 == 0 && width % 2 == 0 && height * width > 16;
}

using Vec = Vector<float>;

inline void to_points(const Vec* d, int64_t stride, Vec* to, int64_t step) {
    const Vec a = d[0], b = d[stride], c = d[2 * stride], e = d[3 * stride];
    to[0] = a - c, to[step] = b + c, to[2 * step] = c - b, to[3 * step] = e - b;
}
inline void spread(const Vec* m, int64_t stride, Vec* to, int64_t step) {
    const Vec a = m[0], b = m[stride], c = m[2 * stride], e = m[3 * stride];
    to[0] = a, to[step] = b - c - e, to[2 * step] = b + c - a, to[3 * step] = e;
}
inline void evaluate(const Vec* x, int64_t stride, Vec* to, int64_t step) {
    const Vec a = x[0], b = x[stride];
    to[0] = a, to[step] = a + b, to[2 * step] = a - b, to[3 * step] = b;
}
inline void combine(const Vec* m, int64_t stride, Vec* to, int64_t step) {
    const Vec a = m[0], b = m[stride], c = m[2 * stride], e = m[3 * stride];
    to[0] = a + b + c, to[step] = b - c + e;
}
inline void of_taps(const Vec* w, int64_t stride, Vec* to, int64_t step) {
    const Vec a = w[0], b = w[stride] * 0.5f, c = w[2 * stride], half = (a + c) * 0.5f;
    to[0] = a, to[step] = half + b, to[2 * step] = half - b, to[3 * step] = c;
}
inline void to_taps(const Vec* u, int64_t stride, Vec* to, int64_t step) {  // of_taps'
    const Vec a = u[0], b = u[stride] * 0.5f, c = u[2 * stride] * 0.5f, e = u[3 * stride];
    to[0] = a + b + c, to[step] = b - c, to[2 * step] = b + c + e;
}

// Any of these in both dimensions, from FROM x FROM numbers to TO x TO.
template <int FROM, int TO, void TRANSFORM(const Vec*, int64_t, Vec*, int64_t)>
inline void in_both(const Vec* from, Vec* to) {
    Vec half[FROM * TO];
#pragma GCC unroll 4
    for (int r = 0; r < FROM; r++) TRANSFORM(from + r * FROM, 1, half + r * TO, 1);
#pragma GCC unroll 4
    for (int c = 0; c < TO; c++) TRANSFORM(half + c, TO, to + c, TO);
}

inline void points_of_taps(const Vec* w, Vec* u) { in_both<3, 4, of_taps>(w, u); }
inline void taps_of_points(const Vec* u, Vec* w) { in_both<4, 3, to_taps>(u, w); }

}  // namespace flowkern::FLOWKERN_ISA
