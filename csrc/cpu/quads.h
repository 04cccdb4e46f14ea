// A convolution to few channels by Winograd (points.h), where their numbers would leave a vector partly empty: four tiles side by
// side, so that a vector is four channels of four tiles. 12 channels are three vectors for four tiles then, instead of four.
#pragma once
#include "points.h"

namespace flowkern::FLOWKERN_ISA {

constexpr int64_t QUAD = 4;              // tiles
constexpr int64_t QUADS = TILES / QUAD;  // of a chunk

#ifdef __AVX512F__

// Whether they take fewer operations of processors that execute a vector of 64 bytes as two halves (Zen 4); hidden channels
// are taken by whole vectors.
constexpr bool by_quads(int64_t hidden, int64_t channels) {
    return hidden % WIDTH == 0 && 2 * ceil_div(channels, 4) < QUAD * ceil_div(channels, WIDTH / 2) && channels <= 3 * 4;
}

// A chunk's quads for each point: rows of four times as many numbers as there are channels, which for 16 of them are in the
// order of `interleave`.
using QuadsView = EvaluatedView;
inline float* quad_of(const QuadsView& points, int64_t point, int64_t quad) { return points[point][QUAD * quad]; }

// Vector j becomes, for each i < 4, number 4 i + j of the four.
inline void interleave(Vec* v) {
    const __m512 a(v[0]), b(v[1]), c(v[2]), d(v[3]);
    const __m512d low_ab(_mm512_castps_pd(_mm512_unpacklo_ps(a, b))), high_ab(_mm512_castps_pd(_mm512_unpackhi_ps(a, b)));
    const __m512d low_cd(_mm512_castps_pd(_mm512_unpacklo_ps(c, d))), high_cd(_mm512_castps_pd(_mm512_unpackhi_ps(c, d)));
    v[0] = Vec(_mm512_castpd_ps(_mm512_unpacklo_pd(low_ab, low_cd)));
    v[1] = Vec(_mm512_castpd_ps(_mm512_unpackhi_pd(low_ab, low_cd)));
    v[2] = Vec(_mm512_castpd_ps(_mm512_unpacklo_pd(high_ab, high_cd)));
    v[3] = Vec(_mm512_castpd_ps(_mm512_unpackhi_pd(high_ab, high_cd)));
}

// As evaluate_points. A quad that the chunk's tiles don't fill has its last one again.
template <class Tile>
void evaluate_quads(const View<float>& rows, int64_t first, int64_t channels, int64_t count, const QuadsView& points) {
    for (int64_t q = 0; q < ceil_div(count, QUAD); q++) {
        for (int64_t c = 0; c < channels; c += WIDTH) {
            Vec x[Tile::PIXELS][QUAD];
#pragma GCC unroll 8
            for (int i = 0; i < Tile::PIXELS; i++) {
#pragma GCC unroll 4
                for (int t = 0; t < QUAD; t++) {
                    x[i][t] = load(rows[Tile::PIXELS * min(QUAD * q + t, count - 1) + Tile::place_of(i)] + first + c);
                }
                interleave(x[i]);
            }
#pragma GCC unroll 4
            for (int j = 0; j < QUAD; j++) {
                Vec pixels[Tile::PIXELS], p[Tile::POINTS];
#pragma GCC unroll 8
                for (int i = 0; i < Tile::PIXELS; i++) pixels[i] = x[i][j];
                Tile::evaluate(pixels, p);
#pragma GCC unroll 24
                for (int i = 0; i < Tile::POINTS; i++) store(quad_of(points, i, q) + QUAD * c + j * WIDTH, p[i]);
            }
        }
    }
}

// Up to three vectors of a quad's sums for each point.
template <class Tile>
struct QuadSums {
    QuadSums() : memory_(Tile::POINTS * QUADS * 3 * WIDTH) {}
    float* at(int64_t point, int64_t quad, int64_t vector) const {
        return memory_.data() + ((point * QUADS + quad) * 3 + vector) * WIDTH;
    }

  private:
    const Scratch<float> memory_;
};

// As add_products.
template <class Tile, int V>
void add_quads(const QuadsView& points, int64_t first, int64_t count, int64_t depth, const float* packed, const QuadSums<Tile>& sums) {
    __m512i column[V];
    for (int v = 0; v < V; v++) {
        column[v] = _mm512_add_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_set1_epi32(4 * v));
    }
    for (int i = 0; i < Tile::POINTS; i++) {
        Vec sum[QUADS][V];
#pragma GCC unroll 4
        for (int q = 0; q < QUADS; q++) {
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[q][v] = first ? load(sums.at(i, q, v)) : Vec{};
        }
        const float *left = points[i][0], *right = packed + (i * depth + first) * WIDTH;
        for (int64_t c = 0; c < count; c += WIDTH, left += QUAD * WIDTH, right += WIDTH * WIDTH) {
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++) {
                const __m512 row(load(right + k * WIDTH));
                Vec weights[V];
#pragma GCC unroll 3
                for (int v = 0; v < V; v++) weights[v] = Vec(_mm512_permutexvar_ps(column[v], row));
#pragma GCC unroll 4
                for (int q = 0; q < QUADS; q++) {
                    const float* at = left + q * QUAD * EVALUATED + k % 4 * WIDTH + k / 4 * QUAD;
                    const Vec four(_mm512_broadcast_f32x4(_mm_loadu_ps(at)));
#pragma GCC unroll 3
                    for (int v = 0; v < V; v++) sum[q][v] += four * weights[v];
                }
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < QUADS; q++) {
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) store(sums.at(i, q, v), sum[q][v]);
        }
    }
}

// The sums as rows of tiles.
template <class Tile>
void part_quads(const QuadSums<Tile>& sums, int64_t channels, int64_t count, const PointsView& products) {
    const __m512i transposed = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int i = 0; i < Tile::POINTS; i++) {
        for (int64_t q = 0; q < ceil_div(count, QUAD); q++) {
            for (int64_t v = 0; v < ceil_div(channels, 4); v++) {
                const Vec four(_mm512_permutexvar_ps(transposed, __m512(load(sums.at(i, q, v)))));
                for (int64_t t = 0; t < QUAD; t++) memcpy(products[i][QUAD * q + t] + 4 * v, reinterpret_cast<const float*>(&four) + 4 * t, 16);
            }
        }
    }
}

#endif

}  // namespace flowkern::FLOWKERN_ISA
