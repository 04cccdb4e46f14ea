// The parameters of one step's mix, read in double precision.
#pragma once
#include "device.h"

namespace flowkern::cuda {

template <class P>
struct Step {
    const P *lower, *upper, *log_s, *log_scale, *bias, *sign;
    const int64_t* permutation;
    int channels;

    template <class M>
    __device__ Step(const M& m, int64_t step) : channels(int(m.channels)) {
        const int64_t row = step * m.channels, square = row * m.channels;
        lower = static_cast<const P*>(m.lower) + square;
        upper = static_cast<const P*>(m.upper) + square;
        log_s = static_cast<const P*>(m.log_s) + row;
        log_scale = static_cast<const P*>(m.log_scale) + row;
        bias = static_cast<const P*>(m.bias) + row;
        sign = static_cast<const P*>(m.sign) + row;
        permutation = m.permutation + row;
    }

    __device__ double diagonal(int k) const { return double(sign[k]) * exp(double(log_s[k])); }
    __device__ double scale(int k) const { return exp(double(log_scale[k])); }

    // Entry (k, c) of U, given its diagonal.
    __device__ double u(int k, int c, const double* diagonal) const {
        return k < c ? double(upper[int64_t(k) * channels + c]) : k == c ? diagonal[k] : 0.0;
    }

    // Entry (k, c) of the unit lower triangular L.
    __device__ double l(int k, int c) const {
        return k > c ? double(lower[int64_t(k) * channels + c]) : k == c ? 1.0 : 0.0;
    }
};

}  // namespace flowkern::cuda
