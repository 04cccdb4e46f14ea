// Products of tiles of pixels in shared memory: pixels by a matrix, and the sum over pixels of outer products.
//
// A tile is pixels x stride, a pixel's channels contiguous. A thread's operands are read as vectors of 16 bytes, and
// its results stay in registers.
#pragma once
#include "device.h"

namespace flowkern::cuda {

template <class T>
constexpr int LANES = 16 / sizeof(T);  // numbers in 16 bytes

// The distance of rows of `row` numbers such that reading the same vector of 8 neighbouring rows meets no bank twice.
template <class T>
constexpr int tile_stride(int row) {
    return (row + LANES<T> - 1) / LANES<T> % 2 ? (row + LANES<T> - 1) / LANES<T> * LANES<T>
                                               : ((row + LANES<T> - 1) / LANES<T> + 1) * LANES<T>;
}

// PIXELS x OUTPUTS results of a thread. Threads stand in a grid of `pixel_groups` x `output_groups`; one of them takes
// pixels pixel, pixel + pixel_groups, ..., and vectors output, output + output_groups, ... of a row.
template <class T, int PIXELS, int OUTPUTS>
struct Products {
    static constexpr int W = LANES<T>, VECTORS = OUTPUTS / W;
    Pack<T, W> sum[PIXELS][VECTORS];

    __device__ __forceinline__ void set(int vector, const Pack<T, W>& value) {
#pragma unroll
        for (int p = 0; p < PIXELS; p++) sum[p][vector] = value;
    }

    // sum += tile times matrix, for DEPTH channels; row i of `matrix` holds the factors of channel i.
    template <int DEPTH, int STRIDE, int MATRIX_STRIDE, int PIXEL_GROUPS, int OUTPUT_GROUPS>
    __device__ __forceinline__ void add(const T* tile, const T* matrix, int pixel, int output) {
        static_assert(DEPTH % W == 0 && OUTPUTS % W == 0, "whole vectors");
#pragma unroll(DEPTH <= 24 ? DEPTH / W : 2)
        for (int first = 0; first < DEPTH; first += W) {
            Pack<T, W> x[PIXELS];
#pragma unroll
            for (int p = 0; p < PIXELS; p++) x[p] = load<W>(tile + (pixel + p * PIXEL_GROUPS) * STRIDE + first);
#pragma unroll
            for (int i = 0; i < W; i++) {
#pragma unroll
                for (int v = 0; v < VECTORS; v++) {
                    const Pack<T, W> row = load<W>(matrix + (first + i) * MATRIX_STRIDE + (output + v * OUTPUT_GROUPS) * W);
#pragma unroll
                    for (int p = 0; p < PIXELS; p++) {
#pragma unroll
                        for (int j = 0; j < W; j++) sum[p][v].v[j] += x[p].v[i] * row.v[j];
                    }
                }
            }
        }
    }
};

// Row i of `to` gets column i of a channels x channels matrix, in the order of its memory. THREADS: those of the
// block, all of which load.
template <int CHANNELS, int STRIDE, int THREADS, class T>
__device__ __forceinline__ void load_transposed(const Matrix& matrix, T* to) {
    const T* from = static_cast<const T*>(matrix.data);
    const bool rows = matrix.column == 1;
    for (int e = threadIdx.x; e < CHANNELS * CHANNELS; e += THREADS) {
        const int outer = e / CHANNELS, inner = e % CHANNELS, o = rows ? outer : inner, i = rows ? inner : outer;
        to[i * STRIDE + o] = from[o * matrix.row + i * matrix.column];
    }
}

// The sum over pixels of w x^T, EDGE x EDGE numbers, and of w alone. Threads stand in GROUPS x GRID x GRID: a thread owns
// a square of SIDE x SIDE numbers for every GROUPS-th pixel. Without groups it would add too many pixels one by one for
// rounding errors to stay small: then what is added at a time is summed apart.
template <class T, int SIDE, int GRID, int GROUPS, int THREADS>
struct OuterProducts {
    static constexpr int W = LANES<T>, VECTORS = SIDE / W, EDGE = SIDE * GRID, ROWS = THREADS / EDGE;
    static constexpr bool APART = GROUPS == 1;
    static_assert(GRID * GRID * GROUPS <= THREADS && SIDE % W == 0, "a thread for every square");
    T total[SIDE][SIDE] = {};
    T total_w = 0;  // of column threadIdx.x % EDGE, every ROWS-th pixel

    __device__ __forceinline__ void add(const T* w, const T* x, int stride, int pixels) {
        const int group = threadIdx.x / (GRID * GRID), square = threadIdx.x % (GRID * GRID);
        if (group < GROUPS) {
            const T *wo = w + square / GRID * SIDE, *xi = x + square % GRID * SIDE;
            T apart[SIDE][SIDE] = {};
            T(&sum)[SIDE][SIDE] = APART ? apart : total;
#pragma unroll 2
            for (int p = group; p < pixels; p += GROUPS) {
                Pack<T, W> a[VECTORS], b[VECTORS];
#pragma unroll
                for (int v = 0; v < VECTORS; v++) {
                    a[v] = load<W>(wo + p * stride + v * W);
                    b[v] = load<W>(xi + p * stride + v * W);
                }
#pragma unroll
                for (int i = 0; i < SIDE; i++) {
#pragma unroll
                    for (int j = 0; j < SIDE; j++) sum[i][j] += a[i / W].v[i % W] * b[j / W].v[j % W];
                }
            }
            if (APART) {
#pragma unroll
                for (int i = 0; i < SIDE; i++) {
#pragma unroll
                    for (int j = 0; j < SIDE; j++) total[i][j] += apart[i][j];
                }
            }
        }
    }

    __device__ __forceinline__ void add_weights(const T* w, int stride, int pixels) {
        const int row = threadIdx.x / EDGE;
        if (row >= ROWS) return;
        T sum = 0;
        for (int p = row; p < pixels; p += ROWS) sum += w[p * stride + threadIdx.x % EDGE];
        total_w += sum;
    }

    // Numbers of scratch memory that `finish` needs.
    static constexpr int SCRATCH = GROUPS * EDGE * EDGE > ROWS * EDGE ? GROUPS * EDGE * EDGE : ROWS * EDGE;

    // Calls result(o, i, number) for every entry of w x^T and weight(o, number) for every one of w, each in one thread.
    template <class R, class S>
    __device__ __forceinline__ void finish(T* scratch, const R& result, const S& weight) {
        const int group = threadIdx.x / (GRID * GRID), square = threadIdx.x % (GRID * GRID);
        const int o = square / GRID * SIDE, i = square % GRID * SIDE;
        __syncthreads();
        if (group < GROUPS) {
            for (int a = 0; a < SIDE; a++) {
                for (int b = 0; b < SIDE; b++) scratch[(group * EDGE + o + a) * EDGE + i + b] = total[a][b];
            }
        }
        __syncthreads();
        for (int e = threadIdx.x; e < EDGE * EDGE; e += THREADS) {
            T sum = scratch[e];
            for (int g = 1; g < GROUPS; g++) sum += scratch[g * EDGE * EDGE + e];
            result(e / EDGE, e % EDGE, sum);
        }
        __syncthreads();
        if (threadIdx.x / EDGE < ROWS) scratch[threadIdx.x] = total_w;
        __syncthreads();
        if (threadIdx.x < EDGE) {
            T sum = scratch[threadIdx.x];
            for (int row = 1; row < ROWS; row++) sum += scratch[row * EDGE + threadIdx.x];
            weight(int(threadIdx.x), sum);
        }
    }
};

}  // namespace flowkern::cuda
