// Between the units that implement the channel mix.
#pragma once
#include "device.h"

namespace flowkern::cuda {

// A coupling, or with `h` null none, followed by a mix; an offset may be null. For any number of channels.
cudaError_t launch_mix_any(const Couple&, cudaStream_t);
// The same, by the kernel that fits best, and the number of pixels of which its blocks take a multiple.
cudaError_t launch_couple_mix(const Couple&, cudaStream_t);
int64_t mix_tile(int64_t channels);
// Partial sums over parts of the pixels of w x^T and of w, as rows of channels * (channels + 1) numbers.
cudaError_t launch_outer(Type, const void* w, const void* x, int64_t pixels, int64_t channels, int64_t parts, void* sums,
                         cudaStream_t);

// Stands for the network's element type where there is no coupling.
struct NoNetwork {};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

}  // namespace flowkern::cuda
