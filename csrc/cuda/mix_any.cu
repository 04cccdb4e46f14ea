// The channel mix, by itself or after a coupling, for any number of channels: the product is cut into panels of DEPTH
// channels in and OUTPUTS channels out. Where there are more than OUTPUTS channels a pixel is read more than once, from
// the cache.
#include "coupling.h"
#include "mix.h"
#include "tile.h"

namespace flowkern::cuda {
namespace {

constexpr int THREADS = 256, DEPTH = 16;

template <class T, int OUTPUTS>
struct Panels {
    static constexpr int OWN = 4, OUTPUT_GROUPS = OUTPUTS / OWN, PIXEL_GROUPS = THREADS / OUTPUT_GROUPS;
    static constexpr int TILE = OWN * PIXEL_GROUPS, STRIDE = tile_stride<T>(DEPTH);
    static constexpr size_t SHARED = (TILE * STRIDE + DEPTH * OUTPUTS) * sizeof(T);
};

// Channel c of a pixel after the coupling, and what the coupling adds to the log-determinant.
template <class T, class H>
__device__ __forceinline__ T coupled(const Couple& m, const T* x, const H* h, int half, int c, double& logdet) {
    if (c < half) return x[c];
    const T alpha = T(m.alpha);
    Pack<T, 1> b = load<1>(x + c), raw, t;
    load_network<1>(h, half, c - half, m.scale == Scale::additive, raw, t);
    logdet += double(couple_values<1>(m.scale, m.inverse, b, raw, t, alpha, T(1) / alpha));
    return b.v[0];
}

template <class T, class H, int OUTPUTS>
__global__ void __launch_bounds__(THREADS, 2) mix_any_kernel(const Couple m) {
    using K = Panels<T, OUTPUTS>;
    constexpr int W = LANES<T>;
    T *tile = reinterpret_cast<T*>(shared_arena), *panel = tile + K::TILE * K::STRIDE;
    const int channels = int(m.channels), half = channels / 2;
    const int64_t row = m.scale == Scale::additive ? half : channels;
    const int64_t sample = blockIdx.x / m.parts, part = blockIdx.x % m.parts, length = ceil_div(m.pixels, m.parts);
    const int64_t last = (part + 1) * length < m.pixels ? (part + 1) * length : m.pixels;
    const int output = threadIdx.x % K::OUTPUT_GROUPS, pixel = threadIdx.x / K::OUTPUT_GROUPS;
    const T *matrix = static_cast<const T*>(m.matrix.data), *offset = static_cast<const T*>(m.offset);
    double logdet = 0;
    for (int64_t first = part * length; first < last; first += K::TILE) {
        const int pixels = last - first < K::TILE ? int(last - first) : K::TILE;
        const int64_t at = sample * m.pixels + first;
        const T* x = static_cast<const T*>(m.x) + at * channels;
        T* y = static_cast<T*>(m.y) + at * channels;
        for (int out = 0; out < channels; out += OUTPUTS) {
            Products<T, K::OWN, K::OWN> products;
            for (int v = 0; v < K::OWN / W; v++) {
                Pack<T, W> start;
                for (int i = 0; i < W; i++) {
                    const int o = out + (output + v * K::OUTPUT_GROUPS) * W + i;
                    start.v[i] = m.inverse || !offset || o >= channels ? T(0) : offset[o];
                }
                products.set(v, start);
            }
            double counted = 0;
            for (int in = 0; in < channels; in += DEPTH) {
#pragma unroll(same<H, NoNetwork> && sizeof(T) == 4 ? 4 : 1)
                for (int e = threadIdx.x; e < K::TILE * DEPTH; e += THREADS) {
                    const int p = e / DEPTH, c = in + e % DEPTH;
                    T value = 0;
                    if (p < pixels && c < channels) {
                        const T* from = x + int64_t(p) * channels;
                        if constexpr (same<H, NoNetwork>) {
                            value = from[c];
                        } else {
                            value = coupled(m, from, static_cast<const H*>(m.h) + (at + p) * row, half, c, counted);
                        }
                        if (m.inverse && offset) value -= offset[c];
                    }
                    tile[p * K::STRIDE + e % DEPTH] = value;
                }
                for (int e = threadIdx.x; e < DEPTH * OUTPUTS; e += THREADS) {
                    const int c = in + e / OUTPUTS, o = out + e % OUTPUTS;
                    panel[e] = c < channels && o < channels ? matrix[o * m.matrix.row + c * m.matrix.column] : T(0);
                }
                __syncthreads();
                products.template add<DEPTH, K::STRIDE, OUTPUTS, K::PIXEL_GROUPS, K::OUTPUT_GROUPS>(tile, panel, pixel, output);
                __syncthreads();
            }
            if (out == 0) logdet += counted;
            const bool wide = channels % W == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
#pragma unroll
            for (int i = 0; i < K::OWN; i++) {
                const int64_t p = pixel + i * K::PIXEL_GROUPS;
                if (p >= pixels) break;
#pragma unroll
                for (int v = 0; v < K::OWN / W; v++) {
                    const int o = out + (output + v * K::OUTPUT_GROUPS) * W;
                    if (wide && o < channels) {
                        store_global(y + p * channels + o, products.sum[i][v]);
                    } else {
#pragma unroll
                        for (int j = 0; j < W; j++) {
                            if (o + j < channels) y[p * channels + o + j] = products.sum[i][v].v[j];
                        }
                    }
                }
            }
        }
    }
    if constexpr (!same<H, NoNetwork>) {
        logdet = block_sum(logdet, reinterpret_cast<double*>(shared_arena));
        if (threadIdx.x == 0) static_cast<T*>(m.logdet)[blockIdx.x] = T(m.inverse ? -logdet : logdet);
    }
}

template <class T, class H>
cudaError_t run(const Couple& m, cudaStream_t stream) {
    const int64_t blocks = m.samples * m.parts;
    if (m.channels <= 16) return launch(mix_any_kernel<T, H, 16>, blocks, THREADS, Panels<T, 16>::SHARED, stream, m);
    return launch(mix_any_kernel<T, H, 64>, blocks, THREADS, Panels<T, 64>::SHARED, stream, m);
}

}  // namespace

cudaError_t launch_mix_any(const Couple& m, cudaStream_t stream) {
    if (m.type == Type::f64) return m.h ? run<double, double>(m, stream) : run<double, NoNetwork>(m, stream);
    if (!m.h) return run<float, NoNetwork>(m, stream);
    if (m.h_type == Type::bf16) return run<float, __nv_bfloat16>(m, stream);
    if (m.h_type == Type::f16) return run<float, __half>(m, stream);
    return run<float, float>(m, stream);
}

}  // namespace flowkern::cuda
