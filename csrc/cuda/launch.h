// CUDA's entry points. Each queues its kernels on the stream and returns at once, with the error of the launch if any.
#pragma once
#include <cuda_runtime.h>

#include "../params.h"

namespace flowkern::cuda {

cudaError_t launch_mix(const Mix&, cudaStream_t);
cudaError_t launch_mix_vjp(const MixVjp&, cudaStream_t);
cudaError_t launch_couple(const Couple&, cudaStream_t);
cudaError_t launch_couple_vjp(const CoupleVjp&, cudaStream_t);
cudaError_t launch_shrink(const Shrink&, cudaStream_t);
cudaError_t launch_consistency(const Consistency&, cudaStream_t);
cudaError_t launch_compose(const Compose&, cudaStream_t);
cudaError_t launch_compose_vjp(const ComposeVjp&, cudaStream_t);

// Into how many partial sums a log-determinant is divided: any number >= 1 is right, this one keeps a GPU busy.
int64_t couple_parts(int64_t samples, int64_t pixels, int64_t channels);
// Bytes of scratch memory.
int64_t mix_vjp_workspace(const MixVjp&);
int64_t pointwise_parts(int64_t size);
// The largest number of channels that launch_compose takes.
constexpr int64_t COMPOSE_CHANNELS = 192;

}  // namespace flowkern::cuda
