// The two halves of a tile's rows taken apart into compact arrays, and put together again.
//
// For the usual numbers of channels by whole vectors. Halves of rows copied one by one overlap in the vectors that are
// loaded next, so that loads wait for the copies to leave the store buffer: a fifth of a coupling's time.
#pragma once
#include <utility>

#include "mix.h"

namespace flowkern::FLOWKERN_ISA {

// Where element i of a result comes from, among the elements of its sources.
template <int C, int SECOND>
struct HalfOfRows {  // compact, from rows
    static constexpr int from(int i) { return i / (C / 2) * C + SECOND * (C / 2) + i % (C / 2); }
};
template <int C, int SIZE>
struct RowsAndHalf {  // rows, from SIZE elements of rows and their new second halves
    static constexpr int from(int i) { return i % C < C / 2 ? i : SIZE + i / C * (C / 2) + i % C - C / 2; }
};
template <int C, int SIZE>
struct TwoHalves {  // rows, from SIZE elements of first halves and as many of second ones
    static constexpr int from(int i) { return (i % C < C / 2 ? i % C : SIZE + i % C - C / 2) + i / C * (C / 2); }
};

// Vector V of the result that Where describes, from the vectors of its sources: two of them by one shuffle, and one more
// shuffle for each further one.
template <class T, class Where, int V>
class Assembled {
  public:
    static Vector<T> of(const Vector<T>* sources) {
        constexpr int a = next(0), b = next(a + 1);
        if constexpr (b < 0) {
            return shuffled<a, a>(sources[a], sources[a], Lanes());
        } else {
            return completed<b + 1>(sources, shuffled<a, b>(sources[a], sources[b], Lanes()));
        }
    }

  private:
    static constexpr int W = LANES<T>;
    using Lanes = std::make_integer_sequence<int, W>;
    typedef int32_t Indices __attribute__((vector_size(VECTOR_BYTES)));

    // The first source from `first` on that the result has elements of, or -1.
    static constexpr int next(int first) {
        int found = -1;
        for (int l = 0; l < W; l++) {
            const int source = Where::from(V * W + l) / W;
            if (source >= first && (found < 0 || source < found)) found = source;
        }
        return found;
    }

    template <int A, int B>
    static constexpr int index(int l) {
        const int from = Where::from(V * W + l);
        return from / W == B ? W + from % W : from / W == A ? from % W : l;
    }

    template <int A, int B, int... L>
    static Vector<T> shuffled(Vector<T> a, Vector<T> b, std::integer_sequence<int, L...>) {
#ifdef __clang__
        return __builtin_shufflevector(a, b, index<A, B>(L)...);
#else
        return __builtin_shuffle(a, b, Indices{index<A, B>(L)...});
#endif
    }

    template <int FIRST>
    static Vector<T> completed(const Vector<T>* sources, Vector<T> sofar) {
        constexpr int s = next(FIRST);
        if constexpr (s < 0) {
            return sofar;
        } else {
            return completed<s + 1>(sources, shuffled<-1, s>(sofar, sources[s], Lanes()));
        }
    }
};

template <class T, class Where, int... V>
inline void assemble(const Vector<T>* sources, T* result, std::integer_sequence<int, V...>) {
    (store(result + V * LANES<T>, Assembled<T, Where, V>::of(sources)), ...);
}

constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }

// As many rows as fill whole vectors with their halves.
template <class K>
struct Block {
    using T = typename K::Element;
    static constexpr int CHANNELS = K::channels(0), HALF = CHANNELS / 2, PIXELS = LANES<T> / gcd(HALF, LANES<T>);
    static constexpr int ROW_VECTORS = PIXELS * CHANNELS / LANES<T>, HALF_VECTORS = ROW_VECTORS / 2;
    static constexpr int ROWS = PIXELS * CHANNELS, HALVES = PIXELS * HALF;  // elements
    using RowVectors = std::make_integer_sequence<int, ROW_VECTORS>;
    using HalfVectors = std::make_integer_sequence<int, HALF_VECTORS>;
    static_assert(TILE % PIXELS == 0);
};

template <int N, class T>
inline void load_all(const T* from, Vector<T>* vectors) {
#pragma GCC unroll 12
    for (int v = 0; v < N; v++) vectors[v] = load(from + v * LANES<T>);
}

// The rows' first halves, if wanted, and their second ones, as compact arrays.
template <class K, bool FIRST = true, class T>
inline void split(const T* rows, int64_t channels, T* first, T* second) {
    if constexpr (K::channels(0) > 0) {
        using B = Block<K>;
        for (int p = 0; p < TILE; p += B::PIXELS, rows += B::ROWS, second += B::HALVES) {
            Vector<T> vectors[B::ROW_VECTORS];
            load_all<B::ROW_VECTORS>(rows, vectors);
            if constexpr (FIRST) {
                assemble<T, HalfOfRows<B::CHANNELS, 0>>(vectors, first, typename B::HalfVectors());
                first += B::HALVES;
            }
            assemble<T, HalfOfRows<B::CHANNELS, 1>>(vectors, second, typename B::HalfVectors());
        }
    } else {
        const int64_t half = channels / 2, size = half * sizeof(T);
        for (int p = 0; p < TILE; p++) {
            if (FIRST) memcpy(first + p * half, rows + p * channels, size);
            memcpy(second + p * half, rows + p * channels + half, size);
        }
    }
}

template <class K, class T>
inline void second_halves(const T* rows, int64_t channels, T* second) {
    split<K, false>(rows, channels, static_cast<T*>(nullptr), second);
}

// Rows from two compact halves or, with WHOLE, from the first halves of other rows and a compact second half.
template <class K, bool WHOLE, class T>
inline void join(const T* first, const T* second, int64_t channels, T* rows) {
    if constexpr (K::channels(0) > 0) {
        using B = Block<K>;
        constexpr int vectors_first = WHOLE ? B::ROW_VECTORS : B::HALF_VECTORS, size = vectors_first * LANES<T>;
        for (int p = 0; p < TILE; p += B::PIXELS, first += size, second += B::HALVES, rows += B::ROWS) {
            Vector<T> vectors[vectors_first + B::HALF_VECTORS];
            load_all<vectors_first>(first, vectors);
            load_all<B::HALF_VECTORS>(second, vectors + vectors_first);
            if constexpr (WHOLE) {
                assemble<T, RowsAndHalf<B::CHANNELS, size>>(vectors, rows, typename B::RowVectors());
            } else {
                assemble<T, TwoHalves<B::CHANNELS, size>>(vectors, rows, typename B::RowVectors());
            }
        }
    } else {
        const int64_t half = channels / 2, size = half * sizeof(T), stride = WHOLE ? channels : half;
        for (int p = 0; p < TILE; p++) {
            memcpy(rows + p * channels, first + p * stride, size);
            memcpy(rows + p * channels + half, second + p * half, size);
        }
    }
}

}  // namespace flowkern::FLOWKERN_ISA
