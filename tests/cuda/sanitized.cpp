// Runs every kernel on arrays of exactly the size that it may touch, and prints a hash of the results. Built with
// sanitizers over the emulation, an access one element too far, or at an address that doesn't suit it, ends the program;
// built by nvcc it is what compute-sanitizer watches on a GPU.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "../../csrc/cuda/launch.h"
#include "../arrays.h"

using namespace flowkern;

namespace {

uint64_t hash = 14695981039346656037u;
int64_t launches = 0;

[[noreturn]] void fail(cudaError_t error) {
    std::printf("launch %lld: %s\n", static_cast<long long>(launches), cudaGetErrorName(error));
    std::exit(3);
}

void check(cudaError_t error) {
    if (error != cudaSuccess) fail(error);
}

#ifdef __CUDACC__
// An array in the GPU's memory.
class Memory {
  public:
    Memory(int64_t count, Type type, int64_t skipped = 0) : host_(skipped + count, type), bytes_(host_.bytes()) {
        start_ = count + skipped ? bytes_ / (count + skipped) * skipped : 0;
        if (bytes_) check(cudaMalloc(&device_, bytes_));
        upload();
    }
    ~Memory() { cudaFree(device_); }
    Memory(const Memory&) = delete;
    void* get() const { return static_cast<char*>(device_) + start_; }
    void* host() const { return host_.get(); }
    int64_t bytes() const { return bytes_; }
    void upload() { check(cudaMemcpy(device_, host_.get(), bytes_, cudaMemcpyHostToDevice)); }
    void download() const { check(cudaMemcpy(host_.get(), device_, bytes_, cudaMemcpyDeviceToHost)); }

  private:
    Array host_;
    int64_t bytes_, start_;
    void* device_ = nullptr;
};
#else
class Memory : public Array {
  public:
    using Array::Array;
    void* host() const { return get(); }
    void upload() {}
    void download() const {}
};
#endif

void record(cudaError_t error, std::initializer_list<const Memory*> results) {
    check(error);
    launches++;
    for (const Memory* result : results) {
        result->download();
        const unsigned char* bytes = static_cast<const unsigned char*>(result->host());
        for (int64_t i = 0; i < result->bytes(); i++) hash = (hash ^ bytes[i]) * 1099511628211u;
    }
}

void mixes(Type type, int64_t pixels, int64_t c) {
    Memory x(pixels * c, type), g(pixels * c, type), y(pixels * c, type), dv(pixels * c, type), matrix(c * c, type),
        inverse_matrix(c * c, type), offset(c, type), dmatrix(c * c, type), doffset(c, type);
    for (bool inverse : {false, true}) {
        record(cuda::launch_mix({x.get(), offset.get(), {matrix.get(), c, 1}, y.get(), pixels, c, inverse, type}, nullptr),
               {&y});
        for (bool given : {false, true}) {
            MixVjp m{x.get(), g.get(), offset.get(), {matrix.get(), c, 1}, {inverse_matrix.get(), 1, c},
                     given ? nullptr : y.get(), dv.get(), dmatrix.get(), doffset.get(), pixels, c, inverse, given, type};
            Memory workspace(cuda::mix_vjp_workspace(m) / 4, Type::f32);
            m.workspace = workspace.get();
            record(cuda::launch_mix_vjp(m, nullptr), {&y, &dv, &dmatrix, &doffset});
        }
    }
}

void couplings(Type type, Type h_type, Scale scale, int64_t samples, int64_t pixels, int64_t c) {
    const int64_t all = samples * pixels, row = scale == Scale::additive ? c / 2 : c;
    const int64_t parts = cuda::couple_parts(samples, pixels, c) + 1;
    Memory x(all * c, type), g(all * c, type), y(all * c, type), dv(all * c, type), h(all * row, h_type), dh(all * row, h_type),
        glogdet(samples, type), logdet(samples * parts, type), matrix(c * c, type), offset(c, type);
    for (bool inverse : {false, true}) {
        for (void* mixing : {static_cast<void*>(nullptr), matrix.get()}) {
            record(cuda::launch_couple({x.get(), h.get(), y.get(), logdet.get(), offset.get(), {mixing, c, 1}, samples,
                                        pixels, c, 1.0, scale, inverse, type, h_type, parts},
                                       nullptr),
                   {&y, &logdet});
        }
        for (bool given : {false, true}) {
            record(cuda::launch_couple_vjp({x.get(), g.get(), h.get(), glogdet.get(), given ? nullptr : y.get(), dv.get(),
                                            dh.get(), samples, pixels, c, 1.0, scale, inverse, given, type, h_type},
                                           nullptr),
                   {&y, &dv, &dh});
        }
    }
}

void pointwise(Type type, int64_t size, int64_t skipped) {
    Memory x(size, type, skipped), y(size, type, skipped), g(size, type, skipped), result(size, type, skipped),
        other(size, type, skipped), strength(1, type), gradient(1, type), sums(cuda::pointwise_parts(size), Type::f64);
    double* workspace = static_cast<double*>(sums.get());
    for (void* d : {static_cast<void*>(nullptr), gradient.get()}) {
        record(cuda::launch_shrink({x.get(), g.get(), strength.get(), result.get(), d, size, type, workspace}, nullptr),
               {&result, &gradient});
        record(cuda::launch_consistency({x.get(), y.get(), g.get(), strength.get(), result.get(), other.get(), d, size, type,
                                         workspace},
                                        nullptr),
               {&result, &other, &gradient});
    }
}

void compositions(Type type, int64_t steps, int64_t c) {
    const int64_t squares = steps * c * c, rows = steps * c;
    Memory lower(squares, type), upper(squares, type), log_s(rows, type), log_scale(rows, type), bias(rows, type),
        sign(rows, type), matrix(squares, type), inverse(squares, type), offset(rows, type), logdet(1, type),
        dlower(squares, type), dupper(squares, type), dlog_s(rows, type), dlog_scale(rows, type), dbias(rows, type);
    Memory turned(rows, Type::f64);  // of 8 bytes each
    for (int64_t i = 0; i < rows; i++) static_cast<int64_t*>(turned.host())[i] = (i % c + 1) % c;
    turned.upload();
    const int64_t* permutation = static_cast<const int64_t*>(turned.get());
    record(cuda::launch_compose({lower.get(), upper.get(), log_s.get(), log_scale.get(), bias.get(), sign.get(),
                                 permutation, matrix.get(), offset.get(), inverse.get(), logdet.get(), steps, c, type},
                                nullptr),
           {&matrix, &offset, &inverse, &logdet});
    record(cuda::launch_compose_vjp({lower.get(), upper.get(), log_s.get(), log_scale.get(), bias.get(), sign.get(),
                                     permutation, matrix.get(), offset.get(), logdet.get(), dlower.get(),
                                     dupper.get(), dlog_s.get(), dlog_scale.get(), dbias.get(), steps, c, type},
                                    nullptr),
           {&dlower, &dupper, &dlog_s, &dlog_scale, &dbias});
}

}  // namespace

// Arguments: what to run, or nothing for all of it.
int main(int count, char** arguments) {
    const auto wanted = [&](const char* name) { return count < 2 || !std::strcmp(arguments[1], name); };
    for (Type type : {Type::f32, Type::f64}) {
        for (int64_t c : {1, 2, 6, 12, 20, 24, 48, 70, 96}) {
            const bool own_kernels = type == Type::f32 && c % 12 == 0;
            // The last number is not a multiple of any kernel's tile, and more than one.
            for (int64_t pixels : {0, 1, own_kernels ? 291 : 67}) {
                if (wanted("mixes")) mixes(type, pixels, c);
                if (c % 2 || !wanted("couplings")) continue;
                for (Scale scale : {Scale::softclamp, Scale::sigmoid, Scale::additive}) {
                    for (Type h_type : {Type::f32, Type::bf16, Type::f16, Type::f64}) {
                        if ((type == Type::f64) == (h_type == Type::f64)) couplings(type, h_type, scale, 2, pixels, c);
                    }
                }
            }
        }
        for (int64_t c : {1, 2, 12, 40}) {
            if (wanted("compositions")) compositions(type, 2, c);
        }
        for (int64_t size : {0, 1, 1000, 4096, 4099, 20000}) {
            for (int64_t skipped : {0, 1}) {
                if (wanted("pointwise")) pointwise(type, size, skipped);
            }
        }
    }
    std::printf("%lld launches, results %016" PRIx64 "\n", static_cast<long long>(launches), hash);
}
