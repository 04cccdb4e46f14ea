// The coupling by itself and its reverse pass: every number is read once and written once.
#include "coupling.h"
#include "launch.h"
#include "mix.h"

namespace flowkern::cuda {
namespace {

constexpr int THREADS = 256;

// Blocks take the parts of one sample, parts contiguous ranges of pixels.
template <class T, class H, int V>
__global__ void __launch_bounds__(THREADS) couple_kernel(const Couple m) {
    const unsigned parts = unsigned(m.parts), half = unsigned(m.channels) / 2, packs = half / V;
    const int64_t sample = blockIdx.x / parts, part = blockIdx.x % parts, length = ceil_div(m.pixels, m.parts);
    const int64_t first = part * length, left = m.pixels - first;
    const unsigned items = left <= 0 ? 0 : unsigned(left < length ? left : length) * packs;
    const bool additive = m.scale == Scale::additive;
    const int64_t at = sample * m.pixels + first, row = additive ? half : 2 * half;
    const T* x = static_cast<const T*>(m.x) + at * 2 * half;
    const H* h = static_cast<const H*>(m.h) + at * row;
    T* y = static_cast<T*>(m.y) + at * 2 * half;
    const T alpha = T(m.alpha), inverse_alpha = T(1) / alpha;
    double sum = 0;
    for (unsigned item = threadIdx.x; item < items; item += THREADS) {
        const unsigned pixel = item / packs, j = item % packs * V;
        const int64_t here = int64_t(pixel) * 2 * half + j;
        const Pack<T, V> a = load<V>(x + here);
        Pack<T, V> b = load<V>(x + here + half), raw, t;
        load_network<V>(h + pixel * row, half, j, additive, raw, t);
        sum += double(couple_values<V>(m.scale, m.inverse, b, raw, t, alpha, inverse_alpha));
        store_global(y + here, a);
        store_global(y + here + half, b);
    }
    sum = block_sum(sum, reinterpret_cast<double*>(shared_arena));
    if (threadIdx.x == 0) static_cast<T*>(m.logdet)[blockIdx.x] = T(m.inverse ? -sum : sum);
}

template <class T, class H, int V>
__global__ void __launch_bounds__(THREADS) couple_vjp_kernel(const CoupleVjp m, int64_t blocks, int64_t length) {
    const unsigned half = unsigned(m.channels) / 2, packs = half / V;
    const int64_t sample = blockIdx.x / blocks, first = blockIdx.x % blocks * length, left = m.pixels - first;
    const unsigned items = unsigned(left < length ? left : length) * packs;
    const bool additive = m.scale == Scale::additive;
    const int64_t at = sample * m.pixels + first, row = additive ? half : 2 * half;
    const T *v = static_cast<const T*>(m.v) + at * 2 * half, *cotangent = static_cast<const T*>(m.g) + at * 2 * half;
    const H* h = static_cast<const H*>(m.h) + at * row;
    T *rebuilt = m.given_input ? nullptr : static_cast<T*>(m.rebuilt) + at * 2 * half;
    T* dv = static_cast<T*>(m.dv) + at * 2 * half;
    H* dh = static_cast<H*>(m.dh) + at * row;
    const T alpha = T(m.alpha), inverse_alpha = T(1) / alpha, glogdet = static_cast<const T*>(m.glogdet)[sample];
    for (unsigned item = threadIdx.x; item < items; item += THREADS) {
        const unsigned pixel = item / packs, j = item % packs * V;
        const int64_t here = int64_t(pixel) * 2 * half + j;
        const Pack<T, V> ga = load<V>(cotangent + here), a = m.given_input ? ga : load<V>(v + here);
        Pack<T, V> b = load<V>(v + here + half), g = load<V>(cotangent + here + half), raw, t;
        load_network<V>(h + pixel * row, half, j, additive, raw, t);
        couple_vjp_values<V>(m.scale, m.inverse, m.given_input, b, g, raw, t, alpha, inverse_alpha, glogdet);
        store_global(dv + here, ga);
        store_global(dv + here + half, g);
        if (!m.given_input) {
            store_global(rebuilt + here, a);
            store_global(rebuilt + here + half, b);
        }
        H* network = dh + pixel * row + j;
        if (!additive) store_as<V>(network, raw);
        store_as<V>(network + (additive ? 0 : half), t);
    }
}

template <class T, class H, int V>
cudaError_t run(const Couple& m, cudaStream_t stream) {
    return launch(couple_kernel<T, H, V>, m.samples * m.parts, THREADS, THREADS / 32 * sizeof(double), stream, m);
}

template <class T, class H, int V>
cudaError_t run(const CoupleVjp& m, cudaStream_t stream) {
    constexpr int64_t ITEMS = 4 * THREADS;
    const int64_t packs = m.channels / 2 / V, length = ITEMS > packs ? ITEMS / packs : 1;
    const int64_t blocks = ceil_div(m.pixels, length);
    return launch(couple_vjp_kernel<T, H, V>, m.samples * blocks, THREADS, 0, stream, m, blocks, length);
}

// The widest access that half rows and pointers allow.
template <class T, class H, class M>
cudaError_t run_wide(const M& m, std::initializer_list<const void*> states, std::initializer_list<const void*> network,
                     cudaStream_t stream) {
    int width = vector_width(m.channels / 2, sizeof(T), states);
    while (!aligned(width * sizeof(H), network)) width /= 2;
    if constexpr (sizeof(T) == 4) {
        if (width == 4) return run<T, H, 4>(m, stream);
    }
    return width == 2 ? run<T, H, 2>(m, stream) : run<T, H, 1>(m, stream);
}

template <class M>
cudaError_t run_typed(const M& m, std::initializer_list<const void*> states, std::initializer_list<const void*> network,
                      cudaStream_t stream) {
    if (m.type == Type::f64) return run_wide<double, double>(m, states, network, stream);
    if (m.h_type == Type::bf16) return run_wide<float, __nv_bfloat16>(m, states, network, stream);
    if (m.h_type == Type::f16) return run_wide<float, __half>(m, states, network, stream);
    return run_wide<float, float>(m, states, network, stream);
}

}  // namespace

// As many blocks as there are tiles of pixels, until they keep the largest GPU busy several times over: then blocks take
// up to 8 tiles, which share the reading of the mix's matrix.
int64_t couple_parts(int64_t samples, int64_t pixels, int64_t channels) {
    constexpr int64_t BUSY = 1024, MOST_TILES = 8;
    const int64_t tiles = ceil_div(pixels, mix_tile(channels)), each = samples * tiles / BUSY;
    const int64_t parts = ceil_div(tiles, each < 1 ? 1 : each < MOST_TILES ? each : MOST_TILES);
    return parts < 1 ? 1 : parts;
}

cudaError_t launch_couple(const Couple& m, cudaStream_t stream) {
    if (m.matrix.data) return launch_couple_mix(m, stream);
    return run_typed(m, {m.x, m.y}, {m.h}, stream);
}

cudaError_t launch_couple_vjp(const CoupleVjp& m, cudaStream_t stream) {
    return run_typed(m, {m.v, m.g, m.rebuilt, m.dv}, {m.h, m.dh}, stream);
}

}  // namespace flowkern::cuda
