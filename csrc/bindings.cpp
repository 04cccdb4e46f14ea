// The Python module: integers in, exceptions out, the GIL released while the loops run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "params.h"

namespace py = pybind11;
using namespace flowkern;

namespace {

using Pointer = std::uintptr_t;

void* address(Pointer p) { return reinterpret_cast<void*>(p); }

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

Type type_of(int code) {
    require(code >= 0 && code <= 3, "the element type must be 0 (fp32), 1 (fp64), 2 (bf16) or 3 (fp16)");
    return Type(code);
}

Type state_type(int code) {
    require(code == 0 || code == 1, "a state must be fp32 (0) or fp64 (1)");
    return Type(code);
}

Type network_type(int code, Type state) {
    Type type = type_of(code);
    require(state == Type::f32 ? type != Type::f64 : type == Type::f64,
            "the network's output must be fp64 beside an fp64 state, and fp32, bf16 or fp16 beside an fp32 one");
    return type;
}

Scale scale_of(int code) {
    require(code >= 0 && code <= 2, "the scale must be 0 (softclamp), 1 (sigmoid) or 2 (additive)");
    return Scale(code);
}

void check_sizes(int threads, int64_t samples, int64_t pixels, int64_t channels) {
    require(threads >= 1, "the number of threads must be at least 1");
    require(samples >= 0 && pixels >= 0 && channels >= 1, "sizes must not be negative, and channels at least 1");
}

// Arrays of `count` elements; an array without elements may be anywhere.
template <class... P>
void check_arrays(int64_t count, P... pointers) {
    require(count == 0 || ((pointers != 0) && ...), "a pointer is null");
}

void mix(int threads, int type, int64_t pixels, int64_t channels, bool inverse, Pointer x, Pointer matrix, int64_t row,
         int64_t column, Pointer offset, Pointer y) {
    check_sizes(threads, 1, pixels, channels);
    check_arrays(pixels, x, y);
    check_arrays(1, matrix, offset);
    Mix m{address(x), address(offset), {address(matrix), row, column}, address(y), pixels, channels, inverse, state_type(type)};
    py::gil_scoped_release release;
    cpu::active().mix(m, threads);
}

void mix_vjp(int threads, int type, int64_t pixels, int64_t channels, bool inverse, bool given_input, Pointer v, Pointer g,
             Pointer matrix, int64_t row, int64_t column, Pointer inverse_matrix, int64_t inverse_row, int64_t inverse_column,
             Pointer offset, Pointer rebuilt, Pointer dv, Pointer dmatrix, Pointer doffset) {
    check_sizes(threads, 1, pixels, channels);
    check_arrays(pixels, v, g, dv);
    check_arrays(given_input ? 0 : pixels, rebuilt);
    check_arrays(1, matrix, inverse_matrix, offset, dmatrix, doffset);
    MixVjp m{address(v), address(g), address(offset), {address(matrix), row, column},
             {address(inverse_matrix), inverse_row, inverse_column},
             given_input ? nullptr : address(rebuilt), address(dv), address(dmatrix), address(doffset),
             pixels, channels, inverse, given_input, state_type(type)};
    py::gil_scoped_release release;
    cpu::active().mix_vjp(m, threads);
}

void couple(int threads, int type, int h_type, int64_t samples, int64_t pixels, int64_t channels, int scale, double alpha,
            bool inverse, Pointer x, Pointer h, Pointer matrix, int64_t row, int64_t column, Pointer offset, Pointer y,
            Pointer logdet) {
    check_sizes(threads, samples, pixels, channels);
    require(channels % 2 == 0, "a coupling needs an even number of channels");
    check_arrays(samples * pixels, x, h, y);
    check_arrays(samples, logdet);
    check_arrays(matrix ? 1 : 0, offset);
    const Type state = state_type(type);
    Couple m{address(x), address(h), address(y), address(logdet), address(offset), {address(matrix), row, column},
             samples, pixels, channels, alpha, scale_of(scale), inverse, state, network_type(h_type, state)};
    py::gil_scoped_release release;
    cpu::active().couple(m, threads);
}

void couple_vjp(int threads, int type, int h_type, int64_t samples, int64_t pixels, int64_t channels, int scale,
                double alpha, bool inverse, bool given_input, Pointer v, Pointer g, Pointer h, Pointer glogdet,
                Pointer rebuilt, Pointer dv, Pointer dh) {
    check_sizes(threads, samples, pixels, channels);
    require(channels % 2 == 0, "a coupling needs an even number of channels");
    check_arrays(samples * pixels, v, g, h, dv, dh);
    check_arrays(samples, glogdet);
    check_arrays(given_input ? 0 : samples * pixels, rebuilt);
    const Type state = state_type(type);
    CoupleVjp m{address(v), address(g), address(h), address(glogdet), given_input ? nullptr : address(rebuilt),
                address(dv), address(dh), samples, pixels, channels, alpha, scale_of(scale), inverse, given_input, state,
                network_type(h_type, state)};
    py::gil_scoped_release release;
    cpu::active().couple_vjp(m, threads);
}

void shrink(int threads, int type, int64_t size, Pointer z, Pointer g, Pointer lambda, Pointer result, Pointer dlambda) {
    check_sizes(threads, 1, size, 1);
    check_arrays(size, z, result);
    check_arrays(1, lambda);
    check_arrays(dlambda ? size : 0, g);
    Shrink m{address(z), address(g), address(lambda), address(result), address(dlambda), size, state_type(type)};
    py::gil_scoped_release release;
    cpu::active().shrink(m, threads);
}

void consistency(int threads, int type, int64_t size, Pointer x, Pointer y, Pointer g, Pointer mu, Pointer result,
                 Pointer dy, Pointer dmu) {
    check_sizes(threads, 1, size, 1);
    check_arrays(size, x, y, result);
    check_arrays(1, mu);
    check_arrays(dmu ? size : 0, g, dy);
    Consistency m{address(x), address(y), address(g), address(mu), address(result), address(dy), address(dmu), size,
                  state_type(type)};
    py::gil_scoped_release release;
    cpu::active().consistency(m, threads);
}

std::vector<std::string> instruction_sets(bool supported_only) {
    std::vector<std::string> names;
    for (const cpu::InstructionSet* set = cpu::begin(); set != cpu::end(); set++) {
        if (set->supported || !supported_only) names.push_back(set->name);
    }
    return names;
}

void select_isa(const std::string& name) {
    if (cpu::select(name.c_str())) return;
    std::string known;
    for (const std::string& n : instruction_sets(true)) known += (known.empty() ? "'" : ", '") + n + "'";
    throw std::invalid_argument("instruction set '" + name + "' is not one that this build and machine support: " + known);
}

py::dict build_config() {
    py::dict config;
    config["version"] = FLOWKERN_VERSION;
    config["compiler"] = FLOWKERN_COMPILER;
    config["openmp"] = openmp_built();
    config["isa_compiled"] = instruction_sets(false);
    config["isa_supported"] = instruction_sets(true);
    config["isa_active"] = cpu::active().name;
    return config;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    if (openmp_built() && !openmp_loaded()) {
        throw py::import_error("flowkern._C runs on the OpenMP threads that torch loads: import torch (or flowkern) first");
    }
    module.def("mix", &mix);
    module.def("mix_vjp", &mix_vjp);
    module.def("couple", &couple);
    module.def("couple_vjp", &couple_vjp);
    module.def("shrink", &shrink);
    module.def("consistency", &consistency);
    module.def("build_config", &build_config, "What was compiled, and what runs: a dict.");
    module.def("select_isa", &select_isa, "Use one instruction set from now on. Raises ValueError where it can't run.");
}
