// The coupling of V neighbouring channels of one pixel, for every kernel that couples.
#pragma once
#include "device.h"

namespace flowkern::cuda {

// raw and t of channels j ... j + V - 1 of the half that changes. `row` is the pixel's row of the network's output, which
// holds t alone where the coupling is additive.
template <int V, class T, class H>
__device__ __forceinline__ void load_network(const H* row, int half, int j, bool additive, Pack<T, V>& raw,
                                             Pack<T, V>& t) {
    if (additive) {
        load_as<V>(row + j, t);
    } else {
        load_as<V>(row + j, raw);
        load_as<V>(row + half + j, t);
    }
}

template <Scale S, bool INVERSE, int V, class T>
__device__ __forceinline__ T couple_scaled(Pack<T, V>& b, const Pack<T, V>& raw, const Pack<T, V>& t, T alpha,
                                           T inverse_alpha) {
    T sum = 0;
#pragma unroll
    for (int i = 0; i < V; i++) {
        const ScaleTerms<T> terms = scale_terms<S>(raw.v[i], alpha, inverse_alpha);
        b.v[i] = INVERSE ? b.v[i] * terms.inverse_s - t.v[i] : (b.v[i] + t.v[i]) * terms.s;
        sum += terms.log_s;
    }
    return sum;
}

// b <- (b + t) s, or b <- b / s - t. Returns the sum of log s.
template <int V, class T>
__device__ __forceinline__ T couple_values(Scale scale, bool inverse, Pack<T, V>& b, const Pack<T, V>& raw,
                                           const Pack<T, V>& t, T alpha, T inverse_alpha) {
    if (scale == Scale::softclamp) {
        return inverse ? couple_scaled<Scale::softclamp, true>(b, raw, t, alpha, inverse_alpha)
                       : couple_scaled<Scale::softclamp, false>(b, raw, t, alpha, inverse_alpha);
    }
    if (scale == Scale::sigmoid) {
        return inverse ? couple_scaled<Scale::sigmoid, true>(b, raw, t, alpha, inverse_alpha)
                       : couple_scaled<Scale::sigmoid, false>(b, raw, t, alpha, inverse_alpha);
    }
    for (int i = 0; i < V; i++) b.v[i] = inverse ? b.v[i] - t.v[i] : b.v[i] + t.v[i];
    return 0;
}

// x / s. The sigmoid's 1 / s may overflow where x / s does not.
template <Scale S, class T>
__device__ __forceinline__ T unscaled(T x, const ScaleTerms<T>& terms) {
    return S == Scale::sigmoid ? x / terms.s : x * terms.inverse_s;
}

// b and g are the halves of v and of the cotangent; b becomes the rebuilt input (with `given` it is left), g its
// gradient, raw and t their own gradients. `glogdet` is the cotangent of the sample's log-determinant.
template <Scale S, int V, class T>
__device__ __forceinline__ void couple_vjp_scaled(bool inverse, bool given, Pack<T, V>& b, Pack<T, V>& g, Pack<T, V>& raw,
                                                  Pack<T, V>& t, T alpha, T inverse_alpha, T glogdet) {
#pragma unroll
    for (int i = 0; i < V; i++) {
        const ScaleTerms<T> terms = scale_terms<S>(raw.v[i], alpha, inverse_alpha);
        if (inverse) {
            const T shifted = given ? unscaled<S>(b.v[i], terms) : b.v[i] + t.v[i];
            if (!given) b.v[i] = shifted * terms.s;
            raw.v[i] = -(g.v[i] * shifted + glogdet) * terms.slope;
            t.v[i] = -g.v[i];
            g.v[i] = unscaled<S>(g.v[i], terms);
        } else {
            const T out = given ? (b.v[i] + t.v[i]) * terms.s : b.v[i];
            if (!given) b.v[i] = unscaled<S>(b.v[i], terms) - t.v[i];
            raw.v[i] = (g.v[i] * out + glogdet) * terms.slope;
            g.v[i] *= terms.s;
            t.v[i] = g.v[i];
        }
    }
}

template <int V, class T>
__device__ __forceinline__ void couple_vjp_values(Scale scale, bool inverse, bool given, Pack<T, V>& b, Pack<T, V>& g,
                                                  Pack<T, V>& raw, Pack<T, V>& t, T alpha, T inverse_alpha, T glogdet) {
    if (scale == Scale::softclamp) {
        couple_vjp_scaled<Scale::softclamp>(inverse, given, b, g, raw, t, alpha, inverse_alpha, glogdet);
    } else if (scale == Scale::sigmoid) {
        couple_vjp_scaled<Scale::sigmoid>(inverse, given, b, g, raw, t, alpha, inverse_alpha, glogdet);
    } else {
        for (int i = 0; i < V; i++) {
            if (!given) b.v[i] = inverse ? b.v[i] + t.v[i] : b.v[i] - t.v[i];
            t.v[i] = inverse ? -g.v[i] : g.v[i];
        }
    }
}

}  // namespace flowkern::cuda
