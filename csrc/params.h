// The arguments of every pixel op, as plain structs: pointers, sizes, strides in elements. No behaviour.
//
// Images are channels-last: `samples` x `pixels` rows of `channels` contiguous numbers. Which op, direction and element
// type is data, so that a backend has one entry point per struct. What only CUDA uses comes last and may be left out.
#pragma once
#include <cstdint>

namespace flowkern {

enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Scale : int { softclamp = 0, sigmoid = 1, additive = 2 };

struct Matrix {
    const void* data;
    int64_t row, column;  // strides
};

struct Mix {
    const void *x, *offset;
    Matrix matrix;
    void* y;
    int64_t pixels;  // of all samples together
    int64_t channels;
    bool inverse;    // y = matrix (x - offset) rather than matrix x + offset
    Type type;
};

// The coupling, alone or followed by a channel mix (`matrix.data` not null).
struct Couple {
    const void *x, *h;
    void *y, *logdet;
    const void* offset;
    Matrix matrix;
    int64_t samples, pixels, channels;
    double alpha;
    Scale scale;
    bool inverse;
    Type type, h_type;  // h_type: that of the network's output h
    int64_t parts = 1;  // CUDA: `logdet` is samples x parts partial sums
};

struct CoupleVjp {
    const void *v, *g, *h, *glogdet;
    void *rebuilt, *dv, *dh;  // rebuilt is null with given_input
    int64_t samples, pixels, channels;
    double alpha;
    Scale scale;
    bool inverse, given_input;
    Type type, h_type;
};

struct MixVjp {
    const void *v, *g, *offset;
    Matrix matrix, inverse_matrix;
    void *rebuilt, *dv, *dmatrix, *doffset;  // rebuilt is null with given_input; dmatrix is row-major
    int64_t pixels, channels;
    bool inverse, given_input;
    Type type;
    void* workspace = nullptr;  // CUDA: of mix_vjp_workspace() bytes
};

// An image's blocks of 2x2 pixels, with their distances: of samples, channels, rows and columns within a block, and of rows and
// columns of blocks. `y` is dense, channels-last, of samples x height x width blocks.
struct Squeeze {
    const void* x;
    void* y;
    int64_t samples, channels, height, width;
    int64_t sample, channel, in_row, in_column, row, column;
    Type type;
};

// z / (1 + lambda), or with `dlambda` not null its gradients: `result` is then that of z.
struct Shrink {
    const void *z, *g, *lambda;
    void *result, *dlambda;
    int64_t size;
    Type type;
    double* workspace = nullptr;  // CUDA, with `dlambda`: pointwise_parts() sums
};

// x - mu (x - y), or with `dmu` not null (on the CPU always) its gradients: `result` is then that of x.
struct Consistency {
    const void *x, *y, *g, *mu;
    void *result, *dy, *dmu;
    int64_t size;
    Type type;
    double* workspace = nullptr;  // CUDA, with `dmu`: pointwise_parts() sums
};

// The mixes M = P L (U + diag(sign exp(log_s))) diag(exp(log_scale)) of `steps` steps, all arrays stacked and dense:
// `lower`, `upper`, `matrix`, `inverse` of channels x channels numbers a step, the others of `channels`.
struct Compose {
    const void *lower, *upper, *log_s, *log_scale, *bias, *sign;
    const int64_t* permutation;
    void *matrix, *offset, *inverse, *logdet;
    int64_t steps, channels;
    Type type;
};

struct ComposeVjp {
    const void *lower, *upper, *log_s, *log_scale, *bias, *sign;
    const int64_t* permutation;
    const void *dmatrix, *doffset, *dlogdet;
    void *dlower, *dupper, *dlog_s, *dlog_scale, *dbias;
    int64_t steps, channels;
    Type type;
};

// Images of fp32 numbers whose channels are contiguous, with the distances of their samples, rows and pixels.
struct Image {
    void* data;
    int64_t sample, row, pixel;
};

// A convolution's weight (out, in, rows, columns) of fp32 numbers, with its strides.
struct Weight {
    void* data;
    int64_t out, in, row, column;
};

// The coupling network's nine parameters, or their gradients (null where not wanted): 3x3 -> ActNorm -> ReLU -> 1x1 ->
// ActNorm -> ReLU -> 3x3 times exp(3 logs). `few` channels in, `out` channels out. All vectors are dense.
struct Network {
    Weight weight1, weight2, weight3;
    void *scale1, *bias1, *scale2, *bias2, *bias3, *logs;
    int64_t few, hidden, out;
};

// The weights as the forward pass multiplies by them, normalisation folded in: `packed` has network_packed_size() numbers. How
// depends on the images' size.
struct NetworkFold {
    Network network;
    float* packed;
    int64_t height, width;  // of the images
    Type type;  // of the factors: fp32 or bf16
};

struct NetworkTrace {
    const float* packed;
    Image a;
    void *h, *h1, *h2;  // of `type`, dense, channels-last; h1 and h2 are null unless kept
    int64_t samples, height, width, few, hidden, out;
    Type type;
};

struct NetworkVjp {
    Network network, gradient;
    Image a, da;  // the gradient of a is added to da
    const void *h1, *h2, *dh;
    int64_t samples, height, width;
    Type type;
};

// The network evaluated again together with its gradients, some images at a time: `between` makes of the output h of `count`
// images from `first` on its gradient dh, both of `type`, on several threads or within one of them.
struct NetworkReplay {
    NetworkVjp vjp;  // h1, h2 and dh are unused
    const float* packed;
    void* memory;    // of network_replay_bytes()
    void (*between)(const void* context, int64_t first, int64_t count, const void* h, void* dh, int threads);
    const void* context;
};

// The steps of flow of a level, or in `reverse` their inverses, with fp32 states. Arrays are dense, images channels-last.
struct Chain {
    const Network* networks;                 // one a step
    const float *matrix, *offset, *inverse;  // of the channel mixes, stacked over steps
    int64_t steps, samples, height, width, channels;
    double alpha;
    Scale scale;
    bool reverse;
    Type type;    // of what the networks compute
    bool stored;  // steps' inputs are kept, rather than rebuilt
};

// What a step leaves for backward; null where it doesn't. state: its input, or, in reverse and not stored, that of its
// channel mix. h1, h2: both or none.
struct Kept {
    void *state, *h, *h1, *h2;
};

struct ChainRun {
    Chain chain;
    const float* x;
    const Kept* kept;  // in running order
    float *out, *logdet;
};

struct ChainVjp {
    Chain chain;
    const float *boundary, *g, *glogdet;  // boundary: the chain's input if stored, else its output
    const Kept* kept;
    const Network* gradients;
    float *dmatrix, *doffset, *dx, *rebuilt;  // rebuilt: the input, null if stored
};

}  // namespace flowkern
