// The channel mix's reverse pass. For the channel counts of colour images' first levels one kernel rebuilds, takes the
// gradient and sums outer products of a tile while it is in shared memory; where matrices no longer fit beside the tile,
// arithmetic outweighs memory, and the pass is made of separate products.
#include "launch.h"
#include "mix.h"
#include "tile.h"

namespace flowkern::cuda {
namespace {

// C channels, N threads; a thread's share are P pixels by 4 outputs of a mix, and S x S entries of the outer products.
template <int C, int N, int P, int S>
struct Tiling {
    static constexpr int CHANNELS = C, THREADS = N, PIXELS = P;
    static constexpr int OUTPUT_GROUPS = C / 4, PIXEL_GROUPS = N / OUTPUT_GROUPS, TILE = PIXEL_GROUPS * P;
    static constexpr int STRIDE = tile_stride<float>(C), MATRIX_STRIDE = C + 4;
    static constexpr int TILES = 2 * TILE * STRIDE, MATRICES = 2 * C * MATRIX_STRIDE;
    static constexpr size_t SHARED = (TILES + MATRICES) * sizeof(float);
    using Outer = OuterProducts<float, S, C / S, N / (C / S * (C / S)), N>;
    static_assert(N % OUTPUT_GROUPS == 0 && TILE % PIXEL_GROUPS == 0 && Outer::SCRATCH <= TILES, "whole groups");
};

using Tiling12 = Tiling<12, 192, 4, 4>;
using Tiling24 = Tiling<24, 144, 8, 4>;
using Tiling48 = Tiling<48, 144, 8, 8>;

// What v is multiplied by, if anything, to reach the other end of the mix; g is multiplied by `back`.
struct Plan {
    bool v_is_x, map;
    Matrix mapping, back;

    __host__ __device__ explicit Plan(const MixVjp& m)
        : v_is_x(m.inverse != m.given_input),
          map(!(v_is_x && m.given_input)),
          mapping(v_is_x ? m.matrix : m.inverse_matrix),
          back(m.inverse ? m.inverse_matrix : m.matrix) {
        const int64_t row = back.row;
        back.row = back.column;
        back.column = row;
    }
};

// Pixels of v less the offset, if that is to be taken off, and of g; the rest of the tiles is zero.
template <class K>
__device__ __forceinline__ void load_tiles(const float* v, const float* g, int pixels, const float* offset, float* v_tile,
                                           float* g_tile) {
    constexpr int ROW = K::CHANNELS / 4, STEP = K::THREADS / ROW, COUNT = K::TILE / STEP;
    const int first = threadIdx.x / ROW, channel = threadIdx.x % ROW * 4;
    Pack<float, 4> subtrahend = {};
    if (offset) {
        for (int i = 0; i < 4; i++) subtrahend.v[i] = offset[channel + i];
    }
    Pack<float, 4> vs[COUNT], gs[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int p = first + i * STEP, at = p * K::CHANNELS + channel;
        vs[i] = gs[i] = {};
        if (p < pixels) {
            vs[i] = load<4>(v + at);
            gs[i] = load<4>(g + at);
            for (int j = 0; j < 4; j++) vs[i].v[j] -= subtrahend.v[j];
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int at = (first + i * STEP) * K::STRIDE + channel;
        store(v_tile + at, vs[i]);
        store(g_tile + at, gs[i]);
    }
}

// A thread's results into the image, and into a tile that every thread has finished reading.
template <class K>
__device__ __forceinline__ void store_image(const Products<float, K::PIXELS, 4>& products, int pixel, int output,
                                            int pixels, float* image) {
#pragma unroll
    for (int i = 0; i < K::PIXELS; i++) {
        const int p = pixel + i * K::PIXEL_GROUPS;
        if (p < pixels) store_global(image + p * K::CHANNELS + output * 4, products.sum[i][0]);
    }
}

template <class K>
__device__ __forceinline__ void replace_tile(const Products<float, K::PIXELS, 4>& products, int pixel, int output,
                                             float* tile) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < K::PIXELS; i++) {
        store(tile + (pixel + i * K::PIXEL_GROUPS) * K::STRIDE + output * 4, products.sum[i][0]);
    }
}

template <class K>
__global__ void __launch_bounds__(K::THREADS) mix_vjp_kernel(const MixVjp m, int64_t length) {
    constexpr int C = K::CHANNELS;
    float *v_tile = reinterpret_cast<float*>(shared_arena), *g_tile = v_tile + K::TILE * K::STRIDE;
    float *mapping = v_tile + K::TILES, *back = mapping + C * K::MATRIX_STRIDE;
    const Plan plan(m);
    if (plan.map) load_transposed<C, K::MATRIX_STRIDE, K::THREADS>(plan.mapping, mapping);
    load_transposed<C, K::MATRIX_STRIDE, K::THREADS>(plan.back, back);
    const int output = threadIdx.x % K::OUTPUT_GROUPS, pixel = threadIdx.x / K::OUTPUT_GROUPS;
    const float* offset = static_cast<const float*>(m.offset);
    const int64_t begin = blockIdx.x * length, end = begin + length < m.pixels ? begin + length : m.pixels;
    typename K::Outer sums;
    for (int64_t first = begin; first < end; first += K::TILE) {
        const int pixels = end - first < K::TILE ? int(end - first) : K::TILE;
        const int64_t at = first * C;
        load_tiles<K>(static_cast<const float*>(m.v) + at, static_cast<const float*>(m.g) + at, pixels,
                      plan.v_is_x ? nullptr : offset, v_tile, g_tile);
        __syncthreads();
        if (plan.map) {
            Products<float, K::PIXELS, 4> products;
            Pack<float, 4> start = {};
            if (plan.v_is_x) {
                for (int i = 0; i < 4; i++) start.v[i] = offset[output * 4 + i];
            }
            products.set(0, start);
            products.template add<C, K::STRIDE, K::MATRIX_STRIDE, K::PIXEL_GROUPS, K::OUTPUT_GROUPS>(v_tile, mapping, pixel,
                                                                                                      output);
            if (!m.given_input) store_image<K>(products, pixel, output, pixels, static_cast<float*>(m.rebuilt) + at);
            if (!plan.v_is_x) replace_tile<K>(products, pixel, output, v_tile);
        }
        Products<float, K::PIXELS, 4> products;
        products.set(0, {});
        products.template add<C, K::STRIDE, K::MATRIX_STRIDE, K::PIXEL_GROUPS, K::OUTPUT_GROUPS>(g_tile, back, pixel, output);
        store_image<K>(products, pixel, output, pixels, static_cast<float*>(m.dv) + at);
        if (m.inverse) replace_tile<K>(products, pixel, output, g_tile);
        __syncthreads();
        sums.add(g_tile, v_tile, K::STRIDE, K::TILE);
        sums.add_weights(g_tile, K::STRIDE, K::TILE);
        __syncthreads();
    }
    float* to = static_cast<float*>(m.workspace) + blockIdx.x * (C * (C + 1));
    sums.finish(
        v_tile, [=](int o, int i, float sum) { to[o * C + i] = sum; }, [=](int o, float sum) { to[C * C + o] = sum; });
}

constexpr int REDUCE_THREADS = 512, REDUCE_ROWS = REDUCE_THREADS / 32;

// Adds up the parts of 32 neighbouring numbers: every warp a share of the parts, then the first warp the shares.
template <class T>
__global__ void __launch_bounds__(REDUCE_THREADS) reduce_kernel(const T* sums, int64_t parts, int64_t size, int64_t entries,
                                                                double sign, T* dmatrix, T* doffset) {
    double* shares = reinterpret_cast<double*>(shared_arena);
    const int64_t entry = blockIdx.x * int64_t(32) + threadIdx.x % 32;
    double sum = 0;
    if (entry < size) {
#pragma unroll 4
        for (int64_t part = threadIdx.x / 32; part < parts; part += REDUCE_ROWS) sum += double(sums[part * size + entry]);
    }
    shares[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || entry >= size) return;
    for (int row = 1; row < REDUCE_ROWS; row++) sum += shares[row * 32 + threadIdx.x];
    (entry < entries ? dmatrix[entry] : doffset[entry - entries]) = T(sign * sum);
}

bool one_kernel(Type type, int64_t channels) {
    return type == Type::f32 && (channels == 12 || channels == 24 || channels == 48);
}

// Not more parts than keep the largest GPU busy, nor than fit into 16 MiB.
int64_t count_parts(int64_t pixels, int64_t channels) {
    constexpr int64_t MOST = 512, NUMBERS = int64_t(1) << 22;
    const int64_t sums = channels * (channels + 1), fit = NUMBERS > sums ? NUMBERS / sums : 1;
    const int64_t tile = channels == 24 ? Tiling24::TILE : channels == 48 ? Tiling48::TILE : Tiling12::TILE;
    const int64_t wanted = ceil_div(pixels, tile);
    const int64_t parts = wanted < MOST ? wanted : MOST;
    return parts < fit ? parts : fit;
}

template <class T>
cudaError_t reduce(const MixVjp& m, int64_t parts, cudaStream_t stream) {
    const int64_t entries = m.channels * m.channels, size = entries + m.channels;
    return launch(reduce_kernel<T>, ceil_div(size, 32), REDUCE_THREADS, REDUCE_THREADS * sizeof(double), stream,
                  static_cast<const T*>(m.workspace), parts, size, entries, m.inverse ? -1.0 : 1.0,
                  static_cast<T*>(m.dmatrix), static_cast<T*>(m.doffset));
}

template <class K>
cudaError_t run(const MixVjp& m, cudaStream_t stream) {
    int64_t parts = count_parts(m.pixels, m.channels);
    const int64_t length = parts ? ceil_div(ceil_div(m.pixels, parts), K::TILE) * K::TILE : 0;
    parts = parts ? ceil_div(m.pixels, length) : 0;
    const cudaError_t error = launch(mix_vjp_kernel<K>, parts, K::THREADS, K::SHARED, stream, m, length);
    return error != cudaSuccess ? error : reduce<float>(m, parts, stream);
}

// The pass as separate products. `x` is the forward mix's input.
cudaError_t run_separately(const MixVjp& m, cudaStream_t stream) {
    const Plan plan(m);
    const int64_t parts = count_parts(m.pixels, m.channels);
    const int64_t size = m.type == Type::f64 ? 8 : 4, sums = parts * m.channels * (m.channels + 1) * size;
    void* scratch = static_cast<char*>(m.workspace) + ceil_div(sums, 16) * 16;
    void* mapped = m.given_input ? scratch : m.rebuilt;
    cudaError_t error = cudaSuccess;
    if (plan.map) {
        error = launch_mix({m.v, m.offset, plan.mapping, mapped, m.pixels, m.channels, !plan.v_is_x, m.type}, stream);
        if (error != cudaSuccess) return error;
    }
    error = launch_mix({m.g, nullptr, plan.back, m.dv, m.pixels, m.channels, false, m.type}, stream);
    if (error != cudaSuccess) return error;
    error = launch_outer(m.type, m.inverse ? m.dv : m.g, plan.v_is_x ? m.v : mapped, m.pixels, m.channels, parts, m.workspace,
                         stream);
    if (error != cudaSuccess) return error;
    return m.type == Type::f64 ? reduce<double>(m, parts, stream) : reduce<float>(m, parts, stream);
}

}  // namespace

int64_t mix_vjp_workspace(const MixVjp& m) {
    const int64_t size = m.type == Type::f64 ? 8 : 4;
    const int64_t sums = count_parts(m.pixels, m.channels) * m.channels * (m.channels + 1) * size;
    const bool scratch = m.inverse && m.given_input && !one_kernel(m.type, m.channels);
    return ceil_div(sums, 16) * 16 + (scratch ? m.pixels * m.channels * size : 0);
}

cudaError_t launch_mix_vjp(const MixVjp& m, cudaStream_t stream) {
    if (!one_kernel(m.type, m.channels)) return run_separately(m, stream);
    if (!aligned(16, {m.v, m.g, m.rebuilt, m.dv})) return cudaErrorMisalignedAddress;
    if (m.channels == 12) return run<Tiling12>(m, stream);
    return m.channels == 24 ? run<Tiling24>(m, stream) : run<Tiling48>(m, stream);
}

}  // namespace flowkern::cuda
