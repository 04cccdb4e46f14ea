// The Python module's part for GPUs: integers in, exceptions out. Calls queue work on a stream and return at once.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../arguments.h"
#include "launch.h"

namespace py = pybind11;
using namespace flowkern;

namespace {

void check(cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
    }
}

// Where work is queued. This module has a CUDA runtime of its own beside torch's, and each keeps its own current device.
cudaStream_t queue(int device, Pointer stream) {
    int current = -1;
    check(cudaGetDevice(&current));
    if (current != device) check(cudaSetDevice(device));
    return static_cast<cudaStream_t>(address(stream));
}

void mix(int device, Pointer stream, int type, int64_t pixels, int64_t channels, bool inverse, Pointer x, Pointer matrix, int64_t row,
         int64_t column, Pointer offset, Pointer y) {
    check_sizes(1, pixels, channels);
    check_arrays(pixels, x, y);
    check_arrays(1, matrix, offset);
    check(cuda::launch_mix({address(x), address(offset), {address(matrix), row, column}, address(y), pixels, channels,
                            inverse, state_type(type)},
                           queue(device, stream)));
}

int64_t mix_vjp_workspace(int type, int64_t pixels, int64_t channels, bool inverse, bool given_input) {
    check_sizes(1, pixels, channels);
    MixVjp m = {};
    m.pixels = pixels;
    m.channels = channels;
    m.inverse = inverse;
    m.given_input = given_input;
    m.type = state_type(type);
    return cuda::mix_vjp_workspace(m);
}

void mix_vjp(int device, Pointer stream, int type, int64_t pixels, int64_t channels, bool inverse, bool given_input, Pointer v, Pointer g,
             Pointer matrix, int64_t row, int64_t column, Pointer inverse_matrix, int64_t inverse_row, int64_t inverse_column,
             Pointer offset, Pointer rebuilt, Pointer dv, Pointer dmatrix, Pointer doffset, Pointer workspace) {
    check_sizes(1, pixels, channels);
    check_arrays(pixels, v, g, dv, workspace);
    check_arrays(given_input ? 0 : pixels, rebuilt);
    check_arrays(1, matrix, inverse_matrix, offset, dmatrix, doffset);
    check(cuda::launch_mix_vjp({address(v), address(g), address(offset), {address(matrix), row, column},
                                {address(inverse_matrix), inverse_row, inverse_column},
                                given_input ? nullptr : address(rebuilt), address(dv), address(dmatrix), address(doffset),
                                pixels, channels, inverse, given_input, state_type(type), address(workspace)},
                               queue(device, stream)));
}

int64_t couple_parts(int64_t samples, int64_t pixels, int64_t channels) {
    check_sizes(samples, pixels, channels);
    return cuda::couple_parts(samples, pixels, channels);
}

void couple(int device, Pointer stream, int type, int h_type, int64_t samples, int64_t pixels, int64_t channels, int scale, double alpha,
            bool inverse, Pointer x, Pointer h, Pointer matrix, int64_t row, int64_t column, Pointer offset, Pointer y,
            Pointer logdet, int64_t parts) {
    check_sizes(samples, pixels, channels);
    check_couples(channels);
    check_arrays(samples * pixels, x, h, y);
    check_arrays(samples, logdet);
    check_arrays(matrix ? 1 : 0, offset);
    require(parts >= 1, "a log-determinant has at least 1 part");
    const Type state = state_type(type);
    Couple m{address(x), address(h), address(y), address(logdet), address(offset), {address(matrix), row, column},
             samples, pixels, channels, alpha, scale_of(scale), inverse, state, network_type(h_type, state), parts};
    // An empty image has log-determinants too, and nowhere in particular to be: h tells a coupling from a plain mix.
    if (pixels == 0) m.h = m.logdet;
    check(cuda::launch_couple(m, queue(device, stream)));
}

void couple_vjp(int device, Pointer stream, int type, int h_type, int64_t samples, int64_t pixels, int64_t channels, int scale,
                double alpha, bool inverse, bool given_input, Pointer v, Pointer g, Pointer h, Pointer glogdet,
                Pointer rebuilt, Pointer dv, Pointer dh) {
    check_sizes(samples, pixels, channels);
    check_couples(channels);
    check_arrays(samples * pixels, v, g, h, dv, dh);
    check_arrays(samples, glogdet);
    check_arrays(given_input ? 0 : samples * pixels, rebuilt);
    const Type state = state_type(type);
    check(cuda::launch_couple_vjp({address(v), address(g), address(h), address(glogdet),
                                   given_input ? nullptr : address(rebuilt), address(dv), address(dh), samples, pixels,
                                   channels, alpha, scale_of(scale), inverse, given_input, state,
                                   network_type(h_type, state)},
                                  queue(device, stream)));
}

void shrink(int device, Pointer stream, int type, int64_t size, Pointer z, Pointer g, Pointer lambda, Pointer result, Pointer dlambda,
            Pointer workspace) {
    check_sizes(1, size, 1);
    check_arrays(size, z, result);
    check_arrays(1, lambda);
    check_arrays(dlambda ? size : 0, g, workspace);
    check(cuda::launch_shrink({address(z), address(g), address(lambda), address(result), address(dlambda), size,
                               state_type(type), static_cast<double*>(address(workspace))},
                              queue(device, stream)));
}

void consistency(int device, Pointer stream, int type, int64_t size, Pointer x, Pointer y, Pointer g, Pointer mu, Pointer result,
                 Pointer dy, Pointer dmu, Pointer workspace) {
    check_sizes(1, size, 1);
    check_arrays(size, x, y, result);
    check_arrays(1, mu);
    check_arrays(dmu ? size : 0, g, dy, workspace);
    check(cuda::launch_consistency({address(x), address(y), address(g), address(mu), address(result), address(dy),
                                    address(dmu), size, state_type(type), static_cast<double*>(address(workspace))},
                                   queue(device, stream)));
}

void compose(int device, Pointer stream, int type, int64_t steps, int64_t channels, Pointer lower, Pointer upper, Pointer log_s,
             Pointer log_scale, Pointer bias, Pointer sign, Pointer permutation, Pointer matrix, Pointer offset,
             Pointer inverse, Pointer logdet) {
    check_sizes(steps, 1, channels);
    require(steps >= 1, "there must be at least 1 step");
    check_arrays(1, lower, upper, log_s, log_scale, bias, sign, permutation, matrix, offset, inverse, logdet);
    check(cuda::launch_compose({address(lower), address(upper), address(log_s), address(log_scale), address(bias),
                                address(sign), static_cast<const int64_t*>(address(permutation)), address(matrix),
                                address(offset), address(inverse), address(logdet), steps, channels, state_type(type)},
                               queue(device, stream)));
}

void compose_vjp(int device, Pointer stream, int type, int64_t steps, int64_t channels, Pointer lower, Pointer upper, Pointer log_s,
                 Pointer log_scale, Pointer bias, Pointer sign, Pointer permutation, Pointer dmatrix, Pointer doffset,
                 Pointer dlogdet, Pointer dlower, Pointer dupper, Pointer dlog_s, Pointer dlog_scale, Pointer dbias) {
    check_sizes(steps, 1, channels);
    check_arrays(1, lower, upper, log_s, log_scale, bias, sign, permutation, dmatrix, doffset, dlogdet, dlower, dupper,
                 dlog_s, dlog_scale, dbias);
    check(cuda::launch_compose_vjp({address(lower), address(upper), address(log_s), address(log_scale), address(bias),
                                    address(sign), static_cast<const int64_t*>(address(permutation)), address(dmatrix),
                                    address(doffset), address(dlogdet), address(dlower), address(dupper), address(dlog_s),
                                    address(dlog_scale), address(dbias), steps, channels, state_type(type)},
                                   queue(device, stream)));
}

// Why the runtime that is linked in finds no device: it need not be of the version that torch has.
std::string runtime_error() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

void bind_cuda(py::module_ module) {
    module.def("runtime_error", &runtime_error, "Why the CUDA runtime finds no device; empty where it does.");
    module.def("mix", &mix);
    module.def("mix_vjp", &mix_vjp);
    module.def("mix_vjp_workspace", &mix_vjp_workspace, "Bytes of scratch memory that mix_vjp needs.");
    module.def("couple", &couple);
    module.def("couple_parts", &couple_parts, "Into how many partial sums a log-determinant is best divided.");
    module.def("couple_vjp", &couple_vjp);
    module.def("shrink", &shrink);
    module.def("consistency", &consistency);
    module.def("pointwise_parts", &cuda::pointwise_parts, "How many partial sums a scalar gradient is made of.");
    module.def("compose", &compose);
    module.def("compose_vjp", &compose_vjp);
    module.attr("COMPOSE_CHANNELS") = cuda::COMPOSE_CHANNELS;
}
