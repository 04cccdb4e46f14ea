// 3x3 convolutions with fewer products than nine a pixel: Winograd's minimal filtering, as Lavin and Gray (arXiv:1509.09308)
// have it.
//
// An image is divided into tiles. With d the pixels of a tile and those around it, and w the weight's 3x3 taps, in each of the
// two dimensions
//     y = combine(of_taps w * to_points d).
// So much for a convolution from few channels to many, whose tile is gathered. One from many to few sends what a tile has to
// the pixels around it, which is the transpose: spread(of_taps w * evaluate x), of evaluate = combine' and spread =
// to_points'. What is done to arrays of many channels is then the cheaper of each pair.
#pragma once
#include "factors.h"

namespace flowkern::FLOWKERN_ISA {

using Vec = Vector<float>;

// F(N, 3), which filters N numbers with N + 2 products. Numbers are `stride` apart, results `step`.
template <int N>
struct Filter;

// With polynomials' values at 0, 1, -1 and infinity, and a sign of Lavin and Gray's moved so that sums of two pixels need none.
template <>
struct Filter<2> {
    static void to_points(const Vec* d, int64_t stride, Vec* to, int64_t step) {
        const Vec a = d[0], b = d[stride], c = d[2 * stride], e = d[3 * stride];
        to[0] = a - c, to[step] = b + c, to[2 * step] = c - b, to[3 * step] = e - b;
    }
    static void spread(const Vec* m, int64_t stride, Vec* to, int64_t step) {
        const Vec a = m[0], b = m[stride], c = m[2 * stride], e = m[3 * stride];
        to[0] = a, to[step] = b - c - e, to[2 * step] = b + c - a, to[3 * step] = e;
    }
    static void evaluate(const Vec* x, int64_t stride, Vec* to, int64_t step) {
        const Vec a = x[0], b = x[stride];
        to[0] = a, to[step] = a + b, to[2 * step] = a - b, to[3 * step] = b;
    }
    static void combine(const Vec* m, int64_t stride, Vec* to, int64_t step) {
        const Vec a = m[0], b = m[stride], c = m[2 * stride], e = m[3 * stride];
        to[0] = a + b + c, to[step] = b - c + e;
    }
    static void of_taps(const Vec* w, int64_t stride, Vec* to, int64_t step) {
        const Vec a = w[0], b = w[stride] * 0.5f, c = w[2 * stride], half = (a + c) * 0.5f;
        to[0] = a, to[step] = half + b, to[2 * step] = half - b, to[3 * step] = c;
    }
    static void to_taps(const Vec* u, int64_t stride, Vec* to, int64_t step) {  // of_taps'
        const Vec a = u[0], b = u[stride] * 0.5f, c = u[2 * stride] * 0.5f, e = u[3 * stride];
        to[0] = a + b + c, to[step] = b - c, to[2 * step] = b + c + e;
    }
};

// With values at 0, A, -A, B, -B and infinity, of which these A and B lose half as much precision as 1 and 2.
template <>
struct Filter<4> {
    static constexpr float A = 0.75f, B = 1.5f, AA = A * A, BB = B * B;
    static constexpr float AT_0 = 1 / (AA * BB), AT_A = 1 / (2 * AA * (AA - BB)), AT_B = 1 / (2 * BB * (BB - AA));

    static void to_points(const Vec* d, int64_t stride, Vec* to, int64_t step) {
        const Vec d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride], d5 = d[5 * stride];
        const Vec even_a = d4 - BB * d2, odd_a = d3 - BB * d1, even_b = d4 - AA * d2, odd_b = d3 - AA * d1;
        to[0] = AA * BB * d0 - (AA + BB) * d2 + d4;
        to[step] = even_a + A * odd_a, to[2 * step] = even_a - A * odd_a;
        to[3 * step] = even_b + B * odd_b, to[4 * step] = even_b - B * odd_b;
        to[5 * step] = AA * BB * d1 - (AA + BB) * d3 + d5;
    }
    static void spread(const Vec* m, int64_t stride, Vec* to, int64_t step) {
        const Vec m0 = m[0], a = m[stride], b = m[2 * stride], c = m[3 * stride], e = m[4 * stride], m5 = m[5 * stride];
        const Vec even_a = a + b, odd_a = A * (a - b), even_b = c + e, odd_b = B * (c - e);
        to[0] = AA * BB * m0;
        to[step] = AA * BB * m5 - BB * odd_a - AA * odd_b;
        to[2 * step] = -(AA + BB) * m0 - BB * even_a - AA * even_b;
        to[3 * step] = odd_a + odd_b - (AA + BB) * m5;
        to[4 * step] = m0 + even_a + even_b;
        to[5 * step] = m5;
    }
    static void evaluate(const Vec* x, int64_t stride, Vec* to, int64_t step) {
        const Vec x0 = x[0], x1 = x[stride], x2 = x[2 * stride], x3 = x[3 * stride];
        const Vec even_a = x0 + AA * x2, odd_a = x1 + AA * x3, even_b = x0 + BB * x2, odd_b = x1 + BB * x3;
        to[0] = x0, to[5 * step] = x3;
        to[step] = even_a + A * odd_a, to[2 * step] = even_a - A * odd_a;
        to[3 * step] = even_b + B * odd_b, to[4 * step] = even_b - B * odd_b;
    }
    static void combine(const Vec* m, int64_t stride, Vec* to, int64_t step) {
        const Vec a = m[stride], b = m[2 * stride], c = m[3 * stride], e = m[4 * stride];
        const Vec even_a = a + b, odd_a = A * (a - b), even_b = c + e, odd_b = B * (c - e);
        to[0] = m[0] + even_a + even_b, to[step] = odd_a + odd_b;
        to[2 * step] = AA * even_a + BB * even_b, to[3 * step] = AA * odd_a + BB * odd_b + m[5 * stride];
    }
    static void of_taps(const Vec* w, int64_t stride, Vec* to, int64_t step) {
        const Vec a = w[0], b = w[stride], c = w[2 * stride];
        const Vec even_a = AT_A * (a + AA * c), odd_a = AT_A * A * b, even_b = AT_B * (a + BB * c), odd_b = AT_B * B * b;
        to[0] = AT_0 * a, to[5 * step] = c;
        to[step] = even_a + odd_a, to[2 * step] = even_a - odd_a;
        to[3 * step] = even_b + odd_b, to[4 * step] = even_b - odd_b;
    }
};

// Both dimensions, from FROM_Y x FROM_X numbers to TO_Y x TO_X: columns first, then rows.
template <int FROM_Y, int FROM_X, int TO_Y, int TO_X, auto OF_COLUMNS, auto OF_ROWS>
inline void in_both(const Vec* from, Vec* to) {
    Vec half[TO_Y * FROM_X];
#pragma GCC unroll 6
    for (int x = 0; x < FROM_X; x++) OF_COLUMNS(from + x, FROM_X, half + x, FROM_X);
#pragma GCC unroll 6
    for (int y = 0; y < TO_Y; y++) OF_ROWS(half + y * FROM_X, 1, to + y * TO_X, 1);
}

// Tiles of Y x X pixels, which hidden activations have in the order of squares of 2x2, so that it is one for all tiles.
template <int ROW_COUNT, int COLUMN_COUNT>
struct Tile {
    static constexpr int Y = ROW_COUNT, X = COLUMN_COUNT, PIXELS = Y * X;
    static constexpr int PATCH_Y = Y + 2, PATCH_X = X + 2, POINTS = PATCH_Y * PATCH_X;

    static constexpr int place_of(int pixel) { return pixel % X / 2 * (2 * Y) + pixel / X * 2 + pixel % 2; }

    using Down = Filter<Y>;
    using Along = Filter<X>;
    static void to_points(const Vec* d, Vec* p) { in_both<PATCH_Y, PATCH_X, PATCH_Y, PATCH_X, Down::to_points, Along::to_points>(d, p); }
    static void spread(const Vec* m, Vec* to) { in_both<PATCH_Y, PATCH_X, PATCH_Y, PATCH_X, Down::spread, Along::spread>(m, to); }
    static void evaluate(const Vec* x, Vec* p) { in_both<Y, X, PATCH_Y, PATCH_X, Down::evaluate, Along::evaluate>(x, p); }
    static void combine(const Vec* m, Vec* y) { in_both<PATCH_Y, PATCH_X, Y, X, Down::combine, Along::combine>(m, y); }
    static void of_taps(const Vec* w, Vec* u) { in_both<3, 3, PATCH_Y, PATCH_X, Down::of_taps, Along::of_taps>(w, u); }
    // Of squares alone, which weights' gradients are sums over.
    static void to_taps(const Vec* u, Vec* w) { in_both<PATCH_Y, PATCH_X, 3, 3, Down::to_taps, Along::to_taps>(u, w); }

    // Whether an image is made of them, and of more than four.
    static bool suits(int64_t height, int64_t width) { return height % Y == 0 && width % X == 0 && height * width > 4 * PIXELS; }
};
using Square = Tile<2, 2>;  // 16 products for 4 pixels instead of 36
using Broad = Tile<2, 4>;   // 24 for 8 instead of 72

// What the 3x3 convolutions are sums over.
enum class Over { taps, squares, broad };

// Tiles where networks multiply fp32 numbers and have enough channels for the transforms to be worth it.
template <class E>
Over sums_over(int64_t hidden, int64_t height, int64_t width) {
    if (PER_UNIT<E> != 1 || hidden < 32) return Over::taps;
    if (Broad::suits(height, width)) return Over::broad;
    return Square::suits(height, width) ? Over::squares : Over::taps;
}

// f(a tile), if sums are over tiles; whether they are.
template <class F>
inline bool by_tiles(Over over, const F& f) {
    if (over == Over::broad) f(Broad());
    if (over == Over::squares) f(Square());
    return over != Over::taps;
}

}  // namespace flowkern::FLOWKERN_ISA
