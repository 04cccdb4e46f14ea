// The gradient of the composition, for all steps of a level in one launch, in double precision.
//
// With S = U diag(scale), M = P L S and D = P^T (dM + dm bias^T), the two products are D S^T, of which the gradient of L
// is the lower triangle, and L^T D, from which the gradients of U, its diagonal and the scale follow. A block takes a
// strip of 32 rows of the first or of 32 columns of the second, square by square.
#include "compose.h"
#include "launch.h"

namespace flowkern::cuda {
namespace {

constexpr int EDGE = 32, STRIDE = EDGE + 1, THREADS = 256, OWN = EDGE * EDGE / THREADS, ROWS = EDGE / OWN;

// Numbers of shared memory: two squares, sums of 32 rows; bias, scale, diag(U), the inverse permutation and P^T dm.
int64_t shared_numbers(int64_t channels) { return 2 * EDGE * STRIDE + EDGE + 5 * channels; }

// Row k of D is row place[k] of dM + dm bias^T.
template <class P>
struct Cotangent {
    const P *dmatrix, *doffset;
    const double *bias, *place;
    int channels;

    __device__ double operator()(int k, int c) const {
        const int64_t row = int64_t(place[k]);
        return double(dmatrix[row * channels + c]) + double(doffset[row]) * bias[c];
    }
};

// sum += a b for squares in shared memory; a thread owns column threadIdx.x % EDGE of rows threadIdx.x / EDGE + i ROWS.
__device__ __forceinline__ void multiply(const double* a, const double* b, double (&sum)[OWN]) {
    const int row = threadIdx.x / EDGE, column = threadIdx.x % EDGE;
    for (int k = 0; k < EDGE; k++) {
        const double factor = b[k * STRIDE + column];
#pragma unroll
        for (int i = 0; i < OWN; i++) sum[i] += a[(row + i * ROWS) * STRIDE + k] * factor;
    }
}

// Fills a square by entry(row, column), zero outside the matrix. `across` says which index runs along memory.
template <class F>
__device__ __forceinline__ void fill(double* square, int channels, int row, int column, bool across, const F& entry) {
    for (int e = threadIdx.x; e < EDGE * EDGE; e += THREADS) {
        const int i = across ? e / EDGE : e % EDGE, j = across ? e % EDGE : e / EDGE;
        square[i * STRIDE + j] = row + i < channels && column + j < channels ? entry(row + i, column + j) : 0.0;
    }
}

template <class P>
__global__ void __launch_bounds__(THREADS) compose_vjp_kernel(const ComposeVjp m) {
    const int channels = int(m.channels), squares = (channels + EDGE - 1) / EDGE;
    double *a = reinterpret_cast<double*>(shared_arena), *b = a + EDGE * STRIDE, *weights = b + EDGE * STRIDE;
    double *bias = weights + EDGE, *scale = bias + channels, *diagonal = scale + channels;
    double *place = diagonal + channels, *image = place + channels;
    const int64_t step = blockIdx.x / (2 * squares), at = step * channels, square = at * channels;
    const int strip = int(blockIdx.x % (2 * squares)) / 2 * EDGE;
    const bool of_lower = blockIdx.x % 2 == 0;
    const Step<P> f(m, step);
    const Cotangent<P> d{static_cast<const P*>(m.dmatrix) + square, static_cast<const P*>(m.doffset) + at, bias, place,
                         channels};
    for (int k = threadIdx.x; k < channels; k += THREADS) {
        bias[k] = double(f.bias[k]);
        scale[k] = f.scale(k);
        diagonal[k] = f.diagonal(k);
        place[f.permutation[k]] = k;
        image[f.permutation[k]] = double(d.doffset[k]);  // P^T dm
    }
    const int row = threadIdx.x / EDGE, column = threadIdx.x % EDGE;
    const auto dense = [&](int k, int c) { return d(k, c); };
    const auto scaled = [&](int k, int c) { return f.u(k, c, diagonal) * scale[c]; };

    if (of_lower) {
        P* dlower = static_cast<P*>(m.dlower) + square;
        for (int other = 0; other < channels; other += EDGE) {
            double sum[OWN] = {};
            for (int k = other; k < channels && other <= strip; k += EDGE) {
                __syncthreads();
                fill(a, channels, strip, k, true, dense);
                fill(b, channels, k, other, false, [&](int c, int i) { return scaled(i, c); });
                __syncthreads();
                multiply(a, b, sum);
            }
            for (int i = 0; i < OWN; i++) {
                const int r = strip + row + i * ROWS, c = other + column;
                if (r < channels && c < channels) dlower[r * channels + c] = P(c < r ? sum[i] : 0.0);
            }
        }
        return;
    }

    P* dupper = static_cast<P*>(m.dupper) + square;
    const double dlogdet = double(*static_cast<const P*>(m.dlogdet));
    const int c = strip + column;
    double dlog_scale = 0, dbias = 0, dlog_s = 0;
    for (int other = 0; other < channels; other += EDGE) {
        double sum[OWN] = {}, weight = 0;
        for (int k = other; k < channels && other <= strip; k += EDGE) {
            __syncthreads();
            fill(a, channels, other, k, false, [&](int r, int i) { return f.l(i, r); });
            fill(b, channels, k, strip, true, dense);
            __syncthreads();
            multiply(a, b, sum);
            // L^T P^T dm for the square's rows, eight threads to a row.
            for (int i = threadIdx.x % 8; i < EDGE && k + i < channels; i += 8) {
                weight += a[threadIdx.x / 8 * STRIDE + i] * image[k + i];
            }
        }
        for (int bits = 4; bits > 0; bits /= 2) weight += __shfl_xor_sync(0xFFFFFFFFu, weight, bits);
        if (threadIdx.x % 8 == 0) weights[threadIdx.x / 8] = weight;
        __syncthreads();
        for (int i = 0; i < OWN; i++) {
            const int r = other + row + i * ROWS;
            if (r >= channels || c >= channels) continue;
            dupper[r * channels + c] = P(r < c ? sum[i] * scale[c] : 0.0);
            if (r > c) continue;
            const double entry = f.u(r, c, diagonal) * scale[c];
            dlog_scale += sum[i] * entry;
            dbias += weights[row + i * ROWS] * entry;
            if (r == c) dlog_s = sum[i] * entry + dlogdet;
        }
        __syncthreads();
    }
    // Sums over the strip's rows, of which a thread has every ROWS-th; one thread has the diagonal's.
    a[row * STRIDE + column] = dlog_scale;
    b[row * STRIDE + column] = dbias;
    if (c < channels && c % EDGE % ROWS == row) static_cast<P*>(m.dlog_s)[at + c] = P(dlog_s);
    __syncthreads();
    if (row > 0 || c >= channels) return;
    for (int r = 1; r < ROWS; r++) {
        dlog_scale += a[r * STRIDE + column];
        dbias += b[r * STRIDE + column];
    }
    static_cast<P*>(m.dlog_scale)[at + c] = P(dlog_scale + dlogdet);
    static_cast<P*>(m.dbias)[at + c] = P(dbias);
}

}  // namespace

cudaError_t launch_compose_vjp(const ComposeVjp& m, cudaStream_t stream) {
    const int64_t blocks = m.steps * ceil_div(m.channels, EDGE) * 2;
    const size_t shared = size_t(shared_numbers(m.channels)) * sizeof(double);
    if (m.type == Type::f64) return launch(compose_vjp_kernel<double>, blocks, THREADS, shared, stream, m);
    return launch(compose_vjp_kernel<float>, blocks, THREADS, shared, stream, m);
}

}  // namespace flowkern::cuda
