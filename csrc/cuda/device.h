// What the kernels share: launches, wide accesses, number formats, sums over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "../formulas.h"
#include "../params.h"

extern __shared__ __align__(16) unsigned char shared_arena[];

namespace flowkern::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs a kernel on `blocks` blocks of `threads` threads with `shared` bytes of shared memory; no blocks is no launch.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   const A&... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    if (shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

inline bool aligned(int64_t bytes, std::initializer_list<const void*> pointers) {
    for (const void* p : pointers) {
        if (reinterpret_cast<uintptr_t>(p) % bytes) return false;
    }
    return true;
}

// The widest vector, in elements of `size` bytes, that divides rows of `row` elements and suits the pointers.
inline int vector_width(int64_t row, int64_t size, std::initializer_list<const void*> pointers) {
    int width = int(16 / size);
    while (row % width || !aligned(width * size, pointers)) width /= 2;
    return width;
}

// V numbers that are read and written by one instruction of up to 16 bytes.
template <class T, int V>
struct __align__(sizeof(T) * V) Pack {
    T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
    return *reinterpret_cast<const Pack<T, V>*>(p);
}

// To shared memory.
template <class T, int V>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

template <int BYTES>
struct VectorOf;
template <>
struct VectorOf<2> {
    using type = unsigned short;
};
template <>
struct VectorOf<4> {
    using type = unsigned;
};
template <>
struct VectorOf<8> {
    using type = uint2;
};
template <>
struct VectorOf<16> {
    using type = uint4;
};

// To global memory, by an intrinsic: an assignment of computed numbers is split into one store each.
template <class T, int V>
__device__ __forceinline__ void store_global(T* p, const Pack<T, V>& pack) {
    using Vector = typename VectorOf<sizeof(T) * V>::type;
    Vector vector;
    memcpy(&vector, &pack, sizeof vector);
    __stwb(reinterpret_cast<Vector*>(p), vector);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

template <int V, class T, class H>
__device__ __forceinline__ void load_as(const H* p, Pack<T, V>& to) {
    const Pack<H, V> from = load<V>(p);
    for (int i = 0; i < V; i++) to.v[i] = widen(from.v[i]);
}

template <int V, class T, class H>
__device__ __forceinline__ void store_as(H* p, const Pack<T, V>& from) {
    Pack<H, V> to;
    for (int i = 0; i < V; i++) narrow(from.v[i], to.v[i]);
    store_global(p, to);
}

// The sum of `value` over the block's threads, added up in a fixed order; thread 0 has it. `scratch` holds a number per
// warp. Every thread of the block must call it, and blocks are whole warps.
template <class T>
__device__ T block_sum(T value, T* scratch) {
    for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned warp = 1; warp < blockDim.x / 32; warp++) value += scratch[warp];
    }
    return value;
}

}  // namespace flowkern::cuda
