// What the factors of matrix products are made of (product.h): fp32 or bf16 numbers in 32-bit units, a number of fp32, a number
// of bf16 widened to it, or a pair of bf16 numbers that are neighbours along the dimension that is summed over. So one set of
// loops serves all.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "convert.h"
#include "parallel.h"

namespace flowkern::FLOWKERN_ISA {

template <class E>
constexpr int PER_UNIT = sizeof(float) / sizeof(E);

// The numbers of arrays that callers see.
template <class E>
struct StoredAs {
    using type = E;
};
template <>
struct StoredAs<Widened> {
    using type = BFloat16;
};
template <class E>
using Stored = typename StoredAs<E>::type;

inline float unit_of(float x) { return x; }
inline float unit_of(Widened x) { return x.value; }
inline float unit_of(BFloat16 low, BFloat16 high) { return float_of(low.bits | uint32_t(high.bits) << 16); }

// Whether products of E run on the processor's tiles (tiles.h) instead of its vectors.
#ifdef __AMX_BF16__
template <class E>
constexpr bool TILED = PER_UNIT<E> == 2;
#else
template <class E>
constexpr bool TILED = false;
#endif

constexpr int WIDTH = LANES<float>;
// Of a block of sums.
template <class E>
constexpr int VECTORS = TILED<E> ? 2 : 3;
template <class E>
constexpr int ROWS = TILED<E> ? 2 * WIDTH : ACCUMULATORS / VECTORS<E>;

// A vector's worth of numbers to and from fp32.
inline Vector<float> load_numbers(const float* p) { return load(p); }
inline void store_numbers(float* p, Vector<float> v) { store(p, v); }

typedef uint32_t BitVector __attribute__((vector_size(VECTOR_BYTES)));

inline Vector<float> load_numbers(const Widened* p) { return load(&p->value); }

// As `convert`. Its constants are read each time: compilers would hold them in registers all through a product, which on AVX2
// has no registers to spare for them.
struct Rounding {
    uint32_t half = 0x7FFF, last = 1, upper = 0xFFFF0000, nan = 0x7FC00000;
};
inline void store_numbers(Widened* p, Vector<float> v) {
    static constexpr Rounding rounding;
    const Rounding* by = &rounding;
    __asm__ volatile("" : "+r"(by));
    const BitVector bits = BitVector(v), nearest = (bits + by->half + (bits >> 16 & by->last)) & by->upper;
    store(&p->value, Vector<float>(v == v ? nearest : by->nan - BitVector{}));
}

inline Vector<float> load_numbers(const BFloat16* p) {
    HalfVector<uint16_t> half;
    memcpy(&half, p, sizeof half);
    return Vector<float>(__builtin_convertvector(half, BitVector) << 16);
}

#ifdef __AVX512BF16__
inline void store_numbers(BFloat16* p, Vector<float> v) {
    const __m256bh half = _mm512_cvtneps_pbh(__m512(v));
    memcpy(p, &half, sizeof half);
}
#endif

// Copies numbers that won't be read soon: whole vectors to memory without fetching the lines that they replace. Other
// threads see them after `end_copies_past_cache`.
template <class E>
inline void copy_past_cache(E* to, const E* from, int64_t n) {
    constexpr int64_t VECTOR = VECTOR_BYTES / sizeof(E);
    if (reinterpret_cast<uintptr_t>(to) % VECTOR_BYTES == 0) {
        for (; n >= VECTOR; n -= VECTOR, to += VECTOR, from += VECTOR) {
#ifdef __AVX512F__
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
        }
    }
    memcpy(to, from, n * sizeof(E));
}

inline void copy_past_cache(BFloat16* to, const Widened* from, int64_t n) {
    constexpr int64_t PIECE = 128;
    BFloat16 narrow[PIECE];
    for (; n > 0; n -= PIECE, to += PIECE, from += PIECE) {
        for (int64_t i = 0; i < min(n, PIECE); i++) convert(from[i], narrow[i]);
        copy_past_cache(to, narrow, min(n, PIECE));
    }
}

inline void end_copies_past_cache() { _mm_sfence(); }

// A matrix's units, rows `stride` apart.
struct Units {
    const float* data;
    int64_t stride;
};

// Rows of numbers of E.
template <class E>
struct View {
    E* data;
    int64_t row;

    E* operator[](int64_t i) const { return data + i * row; }
    View from(int64_t first) const { return {data + first * row, row}; }
    Units units() const { return {reinterpret_cast<const float*>(data), row / PER_UNIT<E>}; }
};

// Rows of a length that compilers know, so that one address serves for many of them.
template <int64_t ROW>
struct FixedView {
    float* data;

    float* operator[](int64_t i) const { return data + i * ROW; }
    FixedView from(int64_t first) const { return {data + first * ROW}; }
    Units units() const { return {data, ROW}; }
};

// The fp32 numbers that they are.
inline View<float> widened(const View<float>& rows) { return rows; }
inline View<float> widened(const View<Widened>& rows) { return {&rows.data->value, rows.row}; }

// A scratch array of them, zero at first, that may be read two vectors beyond its end.
template <class E>
class Rows : public View<E> {
  public:
    Rows(int64_t count, int64_t row) : View<E>{nullptr, row}, memory_(size(count, row)) {
        memory_.clear();
        this->data = memory_.data();
    }
    static int64_t size(int64_t count, int64_t row) { return count * row + 2 * WIDTH * PER_UNIT<E>; }

  private:
    Scratch<E> memory_;
};

// How the columns of a right factor are divided into panels of at most VECTORS vectors.
struct Panel {
    int64_t first;  // vector
    int vectors;
};

template <class E>
int64_t panel_count(int64_t columns) {
    return ceil_div(padded<float>(columns), VECTORS<E> * WIDTH);
}

template <class E>
Panel panel(int64_t columns, int64_t i) {
    const int64_t vectors = padded<float>(columns) / WIDTH, count = panel_count<E>(columns);
    return {vectors * i / count, int(vectors * (i + 1) / count - vectors * i / count)};
}

// f(std::integral_constant of its vectors, its first column) for every panel.
template <class E, class F>
inline void each_panel(int64_t columns, const F& f) {
    for (int64_t i = 0; i < panel_count<E>(columns); i++) {
        const Panel p = panel<E>(columns, i);
        if constexpr (VECTORS<E> == 3) {
            if (p.vectors == 3) f(std::integral_constant<int, 3>(), p.first * WIDTH);
        }
        if (p.vectors == 2) f(std::integral_constant<int, 2>(), p.first * WIDTH);
        if (p.vectors == 1) f(std::integral_constant<int, 1>(), p.first * WIDTH);
    }
}

// Right factors are packed panel by panel, each of `depth` rows of its vectors, so that they are read in order. For tiles
// the depth is padded with rows of zeros to whole tiles.
template <class E>
int64_t packed_depth(int64_t depth) {
    return TILED<E> ? padded<float>(depth) : depth;
}

template <class E>
int64_t packed_size(int64_t depth, int64_t columns) {
    return packed_depth<E>(depth) * padded<float>(columns);
}

}  // namespace flowkern::FLOWKERN_ISA
