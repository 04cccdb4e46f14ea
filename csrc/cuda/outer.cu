// The sum over pixels of outer products for any number of channels, in squares of the result, and in parts of the pixels.
#include "mix.h"
#include "tile.h"

namespace flowkern::cuda {
namespace {

constexpr int DEPTH = 32;  // pixels in shared memory at a time

template <class T, int SIDE, int GRID, int GROUPS>
struct Squares : OuterProducts<T, SIDE, GRID, GROUPS, GRID * GRID * GROUPS> {
    static constexpr int THREADS = GRID * GRID * GROUPS, EDGE = SIDE * GRID, PANELS = 2 * DEPTH * EDGE;
    using Base = OuterProducts<T, SIDE, GRID, GROUPS, THREADS>;
    static constexpr size_t SHARED = (Base::SCRATCH > PANELS ? Base::SCRATCH : PANELS) * sizeof(T);
};

template <class K, class T>
__global__ void __launch_bounds__(K::THREADS) outer_kernel(const T* w, const T* x, int64_t pixels, int channels,
                                                           int64_t length, T* sums) {
    constexpr int EDGE = K::EDGE;
    T *w_panel = reinterpret_cast<T*>(shared_arena), *x_panel = w_panel + DEPTH * EDGE;
    const int squares = (channels + EDGE - 1) / EDGE, square = blockIdx.x % (squares * squares);
    const int o = square / squares * EDGE, i = square % squares * EDGE;
    const int64_t part = blockIdx.x / (squares * squares), begin = part * length;
    const int64_t end = begin + length < pixels ? begin + length : pixels;
    K products;
    for (int64_t first = begin; first < end; first += DEPTH) {
        for (int e = threadIdx.x; e < DEPTH * EDGE; e += K::THREADS) {
            const int64_t p = first + e / EDGE;
            const int c = e % EDGE;
            w_panel[e] = p < end && o + c < channels ? w[p * channels + o + c] : T(0);
            x_panel[e] = p < end && i + c < channels ? x[p * channels + i + c] : T(0);
        }
        __syncthreads();
        products.add(w_panel, x_panel, EDGE, DEPTH);
        if (i == 0) products.add_weights(w_panel, EDGE, DEPTH);
        __syncthreads();
    }
    T* to = sums + part * channels * (channels + 1);
    products.finish(
        w_panel,
        [=](int a, int b, T sum) {
            if (o + a < channels && i + b < channels) to[(o + a) * channels + i + b] = sum;
        },
        [=](int a, T sum) {
            if (i == 0 && o + a < channels) to[channels * channels + o + a] = sum;
        });
}

template <class K, class T>
cudaError_t run(const void* w, const void* x, int64_t pixels, int64_t channels, int64_t parts, void* sums,
                cudaStream_t stream) {
    const int64_t squares = ceil_div(channels, K::EDGE), length = parts ? ceil_div(pixels, parts) : 0;
    return launch(outer_kernel<K, T>, parts * squares * squares, K::THREADS, K::SHARED, stream, static_cast<const T*>(w),
                  static_cast<const T*>(x), pixels, int(channels), length, static_cast<T*>(sums));
}

}  // namespace

cudaError_t launch_outer(Type type, const void* w, const void* x, int64_t pixels, int64_t channels, int64_t parts,
                         void* sums, cudaStream_t stream) {
    if (type == Type::f64) {
        return channels <= 16 ? run<Squares<double, 4, 4, 8>, double>(w, x, pixels, channels, parts, sums, stream)
                              : run<Squares<double, 4, 16, 1>, double>(w, x, pixels, channels, parts, sums, stream);
    }
    if (channels <= 16) return run<Squares<float, 4, 4, 16>, float>(w, x, pixels, channels, parts, sums, stream);
    if (channels % 96 == 0) return run<Squares<float, 8, 12, 1>, float>(w, x, pixels, channels, parts, sums, stream);
    return run<Squares<float, 4, 16, 1>, float>(w, x, pixels, channels, parts, sums, stream);
}

}  // namespace flowkern::cuda
