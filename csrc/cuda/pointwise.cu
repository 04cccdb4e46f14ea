// The unfolded network's maps: one pass over flat arrays, their scalar gradients as sums in two stages of fixed order.
#include "device.h"
#include "launch.h"

namespace flowkern::cuda {
namespace {

constexpr int THREADS = 256, PACKS = 4;  // packs: of a thread, at least
constexpr int64_t MOST_PARTS = 1024;

template <class T, int V>
struct ShrinkMap {
    static constexpr int WIDTH = V;
    Shrink m;
    T divisor;

    __device__ explicit ShrinkMap(const Shrink& m) : m(m), divisor(1 + *static_cast<const T*>(m.lambda)) {}

    __device__ double operator()(int64_t i) const {
        Pack<T, V> z = load<V>(static_cast<const T*>(m.z) + i), result;
        double sum = 0;
        if (m.dlambda) {
            const Pack<T, V> g = load<V>(static_cast<const T*>(m.g) + i);
            for (int j = 0; j < V; j++) {
                result.v[j] = g.v[j] / divisor;
                sum += double(result.v[j]) * double(z.v[j]);
            }
        } else {
            for (int j = 0; j < V; j++) result.v[j] = z.v[j] / divisor;
        }
        store_global(static_cast<T*>(m.result) + i, result);
        return sum;
    }

    __device__ double gradient(double sum) const { return -sum / double(divisor); }
};

template <class T, int V>
struct ConsistencyMap {
    static constexpr int WIDTH = V;
    Consistency m;
    T mu;

    __device__ explicit ConsistencyMap(const Consistency& m) : m(m), mu(*static_cast<const T*>(m.mu)) {}

    __device__ double operator()(int64_t i) const {
        const Pack<T, V> x = load<V>(static_cast<const T*>(m.x) + i), y = load<V>(static_cast<const T*>(m.y) + i);
        Pack<T, V> result, dy;
        double sum = 0;
        if (m.dmu) {
            const Pack<T, V> g = load<V>(static_cast<const T*>(m.g) + i);
            for (int j = 0; j < V; j++) {
                result.v[j] = (1 - mu) * g.v[j];
                dy.v[j] = mu * g.v[j];
                sum += double(g.v[j]) * double(x.v[j] - y.v[j]);
            }
            store_global(static_cast<T*>(m.dy) + i, dy);
        } else {
            for (int j = 0; j < V; j++) result.v[j] = x.v[j] - mu * (x.v[j] - y.v[j]);
        }
        store_global(static_cast<T*>(m.result) + i, result);
        return sum;
    }

    __device__ double gradient(double sum) const { return -sum; }
};

// Applies a map to every V elements. Each block takes one contiguous part, so that parts, and the order within them,
// depend on the size alone.
template <class Map, class M>
__global__ void __launch_bounds__(THREADS) map_kernel(const M m, int64_t packs, int64_t part) {
    const Map map(m);
    const int64_t first = blockIdx.x * part, last = first + part < packs ? first + part : packs;
    double sum = 0;
    for (int64_t i = first + threadIdx.x; i < last; i += THREADS) sum += map(i * Map::WIDTH);
    if (m.workspace) {
        sum = block_sum(sum, reinterpret_cast<double*>(shared_arena));
        if (threadIdx.x == 0) m.workspace[blockIdx.x] = sum;
    }
}

template <class Map, class M, class T>
__global__ void __launch_bounds__(THREADS) gradient_kernel(const M m, int64_t parts, T* gradient) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < parts; i += THREADS) sum += m.workspace[i];
    sum = block_sum(sum, reinterpret_cast<double*>(shared_arena));
    if (threadIdx.x == 0) *gradient = T(Map(m).gradient(sum));
}

template <template <class, int> class Map, class T, int V, class M>
cudaError_t run(const M& m, void* gradient, cudaStream_t stream) {
    constexpr size_t shared = THREADS / 32 * sizeof(double);
    // A part holds the same elements at any width of access.
    const int64_t parts = gradient ? pointwise_parts(m.size) : ceil_div(m.size, V * PACKS * THREADS);
    const int64_t packs = m.size / V, part = parts ? ceil_div(ceil_div(m.size, 4), parts) * 4 / V : 0;
    M plain = m;
    if (!gradient) plain.workspace = nullptr;
    cudaError_t error = launch(map_kernel<Map<T, V>, M>, parts, THREADS, shared, stream, plain, packs, part);
    if (error != cudaSuccess || !gradient) return error;
    return launch(gradient_kernel<Map<T, V>, M, T>, 1, THREADS, shared, stream, m, parts, static_cast<T*>(gradient));
}

template <template <class, int> class Map, class M>
cudaError_t run_typed(const M& m, void* gradient, std::initializer_list<const void*> arrays, cudaStream_t stream) {
    if (m.type == Type::f64) {
        return vector_width(m.size, 8, arrays) == 2 ? run<Map, double, 2>(m, gradient, stream)
                                                    : run<Map, double, 1>(m, gradient, stream);
    }
    return vector_width(m.size, 4, arrays) == 4 ? run<Map, float, 4>(m, gradient, stream)
                                                : run<Map, float, 1>(m, gradient, stream);
}

}  // namespace

int64_t pointwise_parts(int64_t size) {
    const int64_t parts = ceil_div(size, 4 * PACKS * THREADS);
    return parts < MOST_PARTS ? parts : MOST_PARTS;
}

cudaError_t launch_shrink(const Shrink& m, cudaStream_t stream) {
    return run_typed<ShrinkMap>(m, m.dlambda, {m.z, m.g, m.result}, stream);
}

cudaError_t launch_consistency(const Consistency& m, cudaStream_t stream) {
    return run_typed<ConsistencyMap>(m, m.dmu, {m.x, m.y, m.g, m.result, m.dy}, stream);
}

}  // namespace flowkern::cuda
