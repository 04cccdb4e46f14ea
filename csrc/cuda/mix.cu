// The channel mix, by itself or after a coupling, for the channel counts of colour images: a block keeps the whole matrix
// in shared memory and takes a few tiles of pixels, each read once and written once in accesses of 16 bytes.
#include "mix.h"

#include "coupling.h"
#include "launch.h"
#include "tile.h"

namespace flowkern::cuda {
namespace {

template <int C, int N, int P, int O, int B>
struct Tiling {
    static constexpr int CHANNELS = C, THREADS = N, PIXELS = P, OUTPUTS = O, BLOCKS = B;
    static constexpr int OUTPUT_GROUPS = C / O, PIXEL_GROUPS = N / OUTPUT_GROUPS, TILE = PIXEL_GROUPS * P;
    static constexpr int STRIDE = tile_stride<float>(C), MATRIX_STRIDE = C + 4;
    static constexpr int COUPLED = C / 2 % 4 ? 2 : 4;  // width of accesses to half rows
    static constexpr size_t SHARED = (C * MATRIX_STRIDE + TILE * STRIDE) * sizeof(float);
    static_assert(C % O == 0 && N % OUTPUT_GROUPS == 0, "a whole number of groups");
    static_assert(N % (C / 4) == 0 && N % (C / 2 / COUPLED) == 0, "a thread always loads the same channels");
};

// What a thread subtracts from the V channels that it loads: the offset, if the mix is an inverse.
template <int V>
__device__ __forceinline__ Pack<float, V> subtracted(const Couple& m, int channel) {
    Pack<float, V> offset;
    for (int i = 0; i < V; i++) {
        offset.v[i] = m.inverse && m.offset ? static_cast<const float*>(m.offset)[channel + i] : 0.0f;
    }
    return offset;
}

template <int V>
__device__ __forceinline__ Pack<float, V> difference(const Pack<float, V>& a, const Pack<float, V>& b) {
    Pack<float, V> result;
    for (int i = 0; i < V; i++) result.v[i] = a.v[i] - b.v[i];
    return result;
}

template <class K>
__device__ __forceinline__ void load_tile(const Couple& m, const float* x, int pixels, float* tile) {
    constexpr int ROW = K::CHANNELS / 4, STEP = K::THREADS / ROW, COUNT = K::TILE / STEP, BATCH = COUNT < 8 ? COUNT : 8;
    const int first = threadIdx.x / ROW, channel = threadIdx.x % ROW * 4;
    const Pack<float, 4> offset = subtracted<4>(m, channel);
    for (int done = 0; done < COUNT; done += BATCH) {
        Pack<float, 4> values[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int p = first + (done + i) * STEP;
            if (p < pixels) values[i] = load<4>(x + p * K::CHANNELS + channel);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int p = first + (done + i) * STEP;
            if (p < pixels) store(tile + p * K::STRIDE + channel, difference(values[i], offset));
        }
    }
}

// The same with the coupling on the way. Returns the sum of log s.
template <class K, class H>
__device__ __forceinline__ double load_coupled(const Couple& m, const float* x, const H* h, int pixels, float* tile) {
    constexpr int V = K::COUPLED, HALF = K::CHANNELS / 2, ROW = HALF / V, STEP = K::THREADS / ROW;
    const int first = threadIdx.x / ROW, j = threadIdx.x % ROW * V;
    const bool additive = m.scale == Scale::additive;
    const int row = additive ? HALF : 2 * HALF;
    const float alpha = float(m.alpha), inverse_alpha = 1.0f / alpha;
    const Pack<float, V> offset_a = subtracted<V>(m, j), offset_b = subtracted<V>(m, HALF + j);
    double sum = 0;
#pragma unroll 1
    for (int p = first; p < pixels; p += STEP) {
        const float* pixel = x + p * K::CHANNELS + j;
        const Pack<float, V> a = load<V>(pixel);
        Pack<float, V> b = load<V>(pixel + HALF), raw, t;
        load_network<V>(h + p * row, HALF, j, additive, raw, t);
        sum += double(couple_values<V>(m.scale, m.inverse, b, raw, t, alpha, inverse_alpha));
        store(tile + p * K::STRIDE + j, difference(a, offset_a));
        store(tile + p * K::STRIDE + HALF + j, difference(b, offset_b));
    }
    return sum;
}

template <class K, class H>
__global__ void __launch_bounds__(K::THREADS, K::BLOCKS) mix_kernel(const Couple m) {
    constexpr int C = K::CHANNELS;
    float *matrix = reinterpret_cast<float*>(shared_arena), *tile = matrix + C * K::MATRIX_STRIDE;
    const int64_t sample = blockIdx.x / m.parts, part = blockIdx.x % m.parts;
    const int64_t length = ceil_div(ceil_div(m.pixels, m.parts), K::TILE) * K::TILE;
    const int64_t last = (part + 1) * length < m.pixels ? (part + 1) * length : m.pixels;
    const int output = threadIdx.x % K::OUTPUT_GROUPS, pixel = threadIdx.x / K::OUTPUT_GROUPS;
    load_transposed<C, K::MATRIX_STRIDE, K::THREADS>(m.matrix, matrix);
    Products<float, K::PIXELS, K::OUTPUTS> products;
    constexpr int VECTORS = K::OUTPUTS / 4;
    Pack<float, 4> start[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        for (int i = 0; i < 4; i++) {
            const int o = (output + v * K::OUTPUT_GROUPS) * 4 + i;
            start[v].v[i] = m.inverse || !m.offset ? 0.0f : static_cast<const float*>(m.offset)[o];
        }
    }
    double logdet = 0;
    for (int64_t first = part * length; first < last; first += K::TILE) {
        const int pixels = last - first < K::TILE ? int(last - first) : K::TILE;
        const int64_t at = sample * m.pixels + first;
        const float* x = static_cast<const float*>(m.x) + at * C;
        if constexpr (same<H, NoNetwork>) {
            load_tile<K>(m, x, pixels, tile);
        } else {
            const H* h = static_cast<const H*>(m.h) + at * (m.scale == Scale::additive ? C / 2 : C);
            logdet += load_coupled<K>(m, x, h, pixels, tile);
        }
        __syncthreads();
        for (int v = 0; v < VECTORS; v++) products.set(v, start[v]);
        products.template add<C, K::STRIDE, K::MATRIX_STRIDE, K::PIXEL_GROUPS, K::OUTPUT_GROUPS>(tile, matrix, pixel, output);
        float* y = static_cast<float*>(m.y) + at * C;
#pragma unroll
        for (int i = 0; i < K::PIXELS; i++) {
            const int p = pixel + i * K::PIXEL_GROUPS;
            if (p >= pixels) break;
#pragma unroll
            for (int v = 0; v < VECTORS; v++) store_global(y + p * C + (output + v * K::OUTPUT_GROUPS) * 4, products.sum[i][v]);
        }
        __syncthreads();
    }
    if constexpr (!same<H, NoNetwork>) {
        __syncthreads();
        logdet = block_sum(logdet, reinterpret_cast<double*>(shared_arena));
        if (threadIdx.x == 0) static_cast<float*>(m.logdet)[blockIdx.x] = float(m.inverse ? -logdet : logdet);
    }
}

// Threads, the pixels and outputs of one, and the blocks for which a multiprocessor's registers must suffice. More results
// for a thread are more arithmetic for every operand that it reads, which is what bounds the wider mixes; narrow ones are
// bounded by memory, and rather have more threads.
using Tiling12 = Tiling<12, 192, 4, 4, 5>;
using Tiling24 = Tiling<24, 96, 8, 4, 5>;
using Tiling48 = Tiling<48, 96, 8, 8, 4>;
using Tiling96 = Tiling<96, 192, 8, 8, 2>;

template <class K>
cudaError_t run(const Couple& m, cudaStream_t stream) {
    const int64_t blocks = m.samples * m.parts;
    if (!m.h) return launch(mix_kernel<K, NoNetwork>, blocks, K::THREADS, K::SHARED, stream, m);
    if (m.h_type == Type::bf16) return launch(mix_kernel<K, __nv_bfloat16>, blocks, K::THREADS, K::SHARED, stream, m);
    if (m.h_type == Type::f16) return launch(mix_kernel<K, __half>, blocks, K::THREADS, K::SHARED, stream, m);
    return launch(mix_kernel<K, float>, blocks, K::THREADS, K::SHARED, stream, m);
}

}  // namespace

int64_t mix_tile(int64_t channels) {
    switch (channels) {
        case 12: return Tiling12::TILE;
        case 24: return Tiling24::TILE;
        case 48: return Tiling48::TILE;
        case 96: return Tiling96::TILE;
        default: return channels < 6144 ? 6144 / channels : 1;
    }
}

cudaError_t launch_couple_mix(const Couple& m, cudaStream_t stream) {
    if (m.type == Type::f32 && aligned(16, {m.x, m.h, m.y})) {
        switch (m.channels) {
            case 12: return run<Tiling12>(m, stream);
            case 24: return run<Tiling24>(m, stream);
            case 48: return run<Tiling48>(m, stream);
            case 96: return run<Tiling96>(m, stream);
        }
    }
    return launch_mix_any(m, stream);
}

cudaError_t launch_mix(const Mix& m, cudaStream_t stream) {
    Couple couple = {};
    couple.x = m.x;
    couple.y = m.y;
    couple.offset = m.offset;
    couple.matrix = m.matrix;
    couple.samples = 1;
    couple.pixels = m.pixels;
    couple.channels = m.channels;
    couple.inverse = m.inverse;
    couple.type = m.type;
    couple.parts = couple_parts(1, m.pixels, m.channels);
    return launch_couple_mix(couple, stream);
}

}  // namespace flowkern::cuda
