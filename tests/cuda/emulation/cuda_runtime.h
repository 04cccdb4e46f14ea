// CUDA's runtime for one CPU thread: with this folder on the include path, .cu files compile as ordinary C++ and their
// kernels run here, block after block. The threads of a block are fibers that run one after the other, each until it
// meets a barrier or a shuffle. What a GPU leaves to chance is checked or made visible:
//  - shared memory is filled with NaN before each block, and under AddressSanitizer ends where the launch said it would;
//  - a barrier that not all threads of a block reach, or that they reach in different places, ends the program;
//  - so does a shuffle whose mask names a thread that doesn't take part, or leaves out one that does;
//  - FLOWKERN_EMULATE=reverse runs threads from last to first: a result that changes shows a missing barrier.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct __align__(8) uint2 {
    unsigned x, y;
};
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorMisalignedAddress = 716,
};
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);

typedef struct CUstream_st* cudaStream_t;

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidValue; }  // there is one

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulation {

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, int bytes);
void barrier(const char* file, int line);

// Hands `value` (of `size` bytes) to the warp's other threads and overwrites it by that of lane `source`.
void shuffle(unsigned mask, void* value, size_t size, int source, const char* file, int line);
int lane();

}  // namespace emulation

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    return emulation::run(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(P(arguments)...); });
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
    return emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <class T>
void __stwb(T* p, T value) {
    *p = value;
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::barrier(file, line);
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    char none = 0;
    emulation::shuffle(mask, &none, sizeof none, emulation::lane(), file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::shuffle(mask, &value, sizeof value, source & 31, file, line);
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::shuffle(mask, &value, sizeof value, emulation::lane() ^ bits, file, line);
    return value;
}
