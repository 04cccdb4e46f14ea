// Composition of ActNorm and the invertible 1x1 convolution, for all steps of a level in one launch, in double precision.
//
// A warp works on whole columns, COLUMNS at a time, a lane holding every 32nd number of each. One pass over L multiplies
// by it and solves with it at the same time; a pass over U from the end completes the inverse. The factors come through
// shared memory in panels of DEPTH columns.
#include "compose.h"
#include "launch.h"

namespace flowkern::cuda {
namespace {

constexpr int WARPS = 8, COLUMNS = 2, THREADS = 32 * WARPS, DEPTH = 16, PANEL = DEPTH + 1;
constexpr int COLUMNS_PER_BLOCK = WARPS * COLUMNS;
constexpr unsigned ALL = 0xFFFFFFFFu;

// Numbers of shared memory: a panel, diag(U) and its inverse, the scale, the inverse permutation, scratch for sums.
int64_t shared_numbers(int64_t channels) { return channels * (PANEL + 4) + WARPS; }

// Columns first ... first + DEPTH - 1 of a factor, strictly below or above its diagonal.
template <class P>
__device__ void load_panel(const P* factor, int channels, int first, bool below, double* panel) {
    for (int e = threadIdx.x; e < channels * DEPTH; e += THREADS) {
        const int k = e / DEPTH, c = first + e % DEPTH;
        const bool inside = c < channels && (below ? k > c : k < c);
        panel[k * PANEL + e % DEPTH] = inside ? double(factor[int64_t(k) * channels + c]) : 0.0;
    }
}

template <class P, int ROWS>
__global__ void __launch_bounds__(THREADS) compose_kernel(const Compose m) {
    const int channels = int(m.channels), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double *panel = reinterpret_cast<double*>(shared_arena), *diagonal = panel + channels * PANEL;
    double *reciprocal = diagonal + channels, *scale = reciprocal + channels, *place = scale + channels;
    double* scratch = place + channels;
    const int64_t tiles = ceil_div(channels + 1, COLUMNS_PER_BLOCK), step = blockIdx.x / tiles;
    const Step<P> f(m, step);
    const int column = int(blockIdx.x % tiles) * COLUMNS_PER_BLOCK + warp * COLUMNS;

    for (int k = threadIdx.x; k < channels; k += THREADS) {
        diagonal[k] = f.diagonal(k);
        reciprocal[k] = 1.0 / diagonal[k];
        scale[k] = f.scale(k);
        place[f.permutation[k]] = k;  // the row of M that holds row permutation[k] of L U
    }
    if (blockIdx.x == 0) {
        double sum = 0;
        for (int64_t e = threadIdx.x; e < m.steps * channels; e += THREADS) {
            sum += double(static_cast<const P*>(m.log_s)[e]) + double(static_cast<const P*>(m.log_scale)[e]);
        }
        sum = block_sum(sum, scratch);
        if (threadIdx.x == 0) *static_cast<P*>(m.logdet) = P(sum);
    }
    __syncthreads();

    // `product` becomes a column of L U diag(scale), `solved` one of the inverse. Column `channels` is the offset's:
    // there the product is that of L and U (scale bias).
    double product[COLUMNS][ROWS], factor[COLUMNS][ROWS], solved[COLUMNS][ROWS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        const int c = column + j;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int k = lane + 32 * r;
            factor[j][r] = k <= c && c < channels ? f.u(k, c, diagonal) * scale[c] : 0.0;
            solved[j][r] = c < channels && k == f.permutation[c] ? 1.0 : 0.0;
        }
        if (c == channels) {
            for (int k = 0; k < channels; k++) {
                double sum = 0;
                for (int i = k / 32 * 32 + lane; i < channels; i += 32) {
                    if (i >= k) sum += f.u(k, i, diagonal) * scale[i] * double(f.bias[i]);
                }
                for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(ALL, sum, bits);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    if (k == lane + 32 * r) factor[j][r] = sum;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) product[j][r] = factor[j][r];
    }

#pragma unroll
    for (int slot = 0; slot < ROWS; slot++) {
        for (int first = 32 * slot; first < 32 * (slot + 1) && first < channels; first += DEPTH) {
            __syncthreads();
            load_panel(f.lower, channels, first, true, panel);
            __syncthreads();
#pragma unroll 1
            for (int i = 0; i < DEPTH && first + i < channels; i++) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    const double known = __shfl_sync(ALL, solved[j][slot], (first + i) % 32);
                    const double times = __shfl_sync(ALL, factor[j][slot], (first + i) % 32);
#pragma unroll
                    for (int r = slot; r < ROWS; r++) {
                        const int k = lane + 32 * r;
                        const double entry = k < channels ? panel[k * PANEL + i] : 0.0;
                        solved[j][r] -= entry * known;
                        product[j][r] += entry * times;
                    }
                }
            }
        }
    }
#pragma unroll
    for (int slot = ROWS - 1; slot >= 0; slot--) {
        for (int first = 32 * slot + 32 - DEPTH; first >= 32 * slot; first -= DEPTH) {
            if (first >= channels) continue;
            __syncthreads();
            load_panel(f.upper, channels, first, false, panel);
            __syncthreads();
#pragma unroll 1
            for (int i = (channels - first < DEPTH ? channels - first : DEPTH) - 1; i >= 0; i--) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    const double known = __shfl_sync(ALL, solved[j][slot], (first + i) % 32) * reciprocal[first + i];
#pragma unroll
                    for (int r = 0; r <= slot; r++) {
                        const int k = lane + 32 * r;
                        const double entry = k < channels ? panel[k * PANEL + i] : 0.0;
                        solved[j][r] = k == first + i ? known : solved[j][r] - entry * known;
                    }
                }
            }
        }
    }

    P* matrix = static_cast<P*>(m.matrix) + step * m.channels * m.channels;
    P* inverse = static_cast<P*>(m.inverse) + step * m.channels * m.channels;
    P* offset = static_cast<P*>(m.offset) + step * m.channels;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        const int c = column + j;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int k = lane + 32 * r;
            if (k >= channels || c > channels) continue;
            const int row = int(place[k]);
            if (c == channels) {
                offset[row] = P(product[j][r]);
            } else {
                matrix[row * channels + c] = P(product[j][r]);
                inverse[k * channels + c] = P(solved[j][r] / scale[k]);
            }
        }
    }
}

template <class P>
cudaError_t run(const Compose& m, cudaStream_t stream) {
    const int64_t blocks = m.steps * ceil_div(m.channels + 1, COLUMNS_PER_BLOCK);
    const size_t shared = size_t(shared_numbers(m.channels)) * sizeof(double);
    if constexpr (sizeof(P) == sizeof(float)) {  // what is trained
        if (m.channels <= 32) return launch(compose_kernel<P, 1>, blocks, THREADS, shared, stream, m);
        if (m.channels <= 96) return launch(compose_kernel<P, 3>, blocks, THREADS, shared, stream, m);
    }
    return launch(compose_kernel<P, 6>, blocks, THREADS, shared, stream, m);
}

}  // namespace

cudaError_t launch_compose(const Compose& m, cudaStream_t stream) {
    if (m.channels > COMPOSE_CHANNELS) return cudaErrorInvalidValue;
    return m.type == Type::f64 ? run<double>(m, stream) : run<float>(m, stream);
}

}  // namespace flowkern::cuda
