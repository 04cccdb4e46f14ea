// The Python module: integers in, exceptions out, the GIL released while the loops run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "about.h"
#include "arguments.h"
#include "cpu/chain.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/squeeze.h"
#include "params.h"

namespace py = pybind11;
using namespace flowkern;

namespace {

void check_threads(int threads) { require(threads >= 1, "the number of threads must be at least 1"); }

void mix(int threads, int type, int64_t pixels, int64_t channels, bool inverse, Pointer x, Pointer matrix, int64_t row,
         int64_t column, Pointer offset, Pointer y) {
    check_threads(threads);
    check_sizes(1, pixels, channels);
    check_arrays(pixels, x, y);
    check_arrays(1, matrix, offset);
    Mix m{address(x), address(offset), {address(matrix), row, column}, address(y), pixels, channels, inverse, state_type(type)};
    py::gil_scoped_release release;
    cpu::active().mix(m, threads);
}

void mix_vjp(int threads, int type, int64_t pixels, int64_t channels, bool inverse, bool given_input, Pointer v, Pointer g,
             Pointer matrix, int64_t row, int64_t column, Pointer inverse_matrix, int64_t inverse_row, int64_t inverse_column,
             Pointer offset, Pointer rebuilt, Pointer dv, Pointer dmatrix, Pointer doffset) {
    check_threads(threads);
    check_sizes(1, pixels, channels);
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
    check_threads(threads);
    check_sizes(samples, pixels, channels);
    check_couples(channels);
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
    check_threads(threads);
    check_sizes(samples, pixels, channels);
    check_couples(channels);
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

// strides: six, of a view (samples, channels, 2, 2, height, width).
void squeeze(int threads, int type, int64_t samples, int64_t channels, int64_t height, int64_t width, const std::vector<int64_t>& strides,
             Pointer x, Pointer y) {
    check_threads(threads);
    check_sizes(samples, height * width, channels);
    check_arrays(samples * height * width, x, y);
    require(strides.size() == 6, "an image's blocks have six strides");
    Squeeze m{address(x), address(y), samples, channels, height, width, strides[0], strides[1], strides[2], strides[3], strides[4],
              strides[5], state_type(type)};
    py::gil_scoped_release release;
    cpu::squeeze(m, threads);
}

void shrink(int threads, int type, int64_t size, Pointer z, Pointer g, Pointer lambda, Pointer result, Pointer dlambda) {
    check_threads(threads);
    check_sizes(1, size, 1);
    check_arrays(size, z, result);
    check_arrays(1, lambda);
    check_arrays(dlambda ? size : 0, g);
    Shrink m{address(z), address(g), address(lambda), address(result), address(dlambda), size, state_type(type)};
    py::gil_scoped_release release;
    cpu::active().shrink(m, threads);
}

void consistency_vjp(int threads, int type, int64_t size, Pointer x, Pointer y, Pointer g, Pointer mu, Pointer result,
                     Pointer dy, Pointer dmu) {
    check_threads(threads);
    check_sizes(1, size, 1);
    check_arrays(size, x, y, g, result, dy);
    check_arrays(1, mu, dmu);
    Consistency m{address(x), address(y), address(g), address(mu), address(result), address(dy), address(dmu), size,
                  state_type(type)};
    py::gil_scoped_release release;
    cpu::active().consistency_vjp(m, threads);
}

const int64_t* permutation_of(Pointer p, int64_t steps, int64_t channels) {
    const int64_t* permutation = static_cast<const int64_t*>(address(p));
    for (int64_t i = 0; i < steps * channels; i++) {
        require(permutation[i] >= 0 && permutation[i] < channels, "a permutation's entries must be channel numbers");
    }
    return permutation;
}

void compose(int threads, int type, int64_t steps, int64_t channels, Pointer lower, Pointer upper, Pointer log_s,
             Pointer log_scale, Pointer bias, Pointer sign, Pointer permutation, Pointer matrix, Pointer offset,
             Pointer inverse, Pointer logdet) {
    check_threads(threads);
    check_sizes(steps, 1, channels);
    check_arrays(1, lower, upper, log_s, log_scale, bias, sign, permutation, matrix, offset, inverse, logdet);
    Compose m{address(lower), address(upper), address(log_s), address(log_scale), address(bias), address(sign),
              permutation_of(permutation, steps, channels), address(matrix), address(offset), address(inverse),
              address(logdet), steps, channels, state_type(type)};
    py::gil_scoped_release release;
    cpu::active().compose(m, threads);
}

void compose_vjp(int threads, int type, int64_t steps, int64_t channels, Pointer lower, Pointer upper, Pointer log_s,
                 Pointer log_scale, Pointer bias, Pointer sign, Pointer permutation, Pointer dmatrix, Pointer doffset,
                 Pointer dlogdet, Pointer dlower, Pointer dupper, Pointer dlog_s, Pointer dlog_scale, Pointer dbias) {
    check_threads(threads);
    check_sizes(steps, 1, channels);
    check_arrays(1, lower, upper, log_s, log_scale, bias, sign, permutation, dmatrix, doffset, dlogdet, dlower, dupper,
                 dlog_s, dlog_scale, dbias);
    ComposeVjp m{address(lower), address(upper), address(log_s), address(log_scale), address(bias), address(sign),
                 permutation_of(permutation, steps, channels), address(dmatrix), address(doffset), address(dlogdet),
                 address(dlower), address(dupper), address(dlog_s), address(dlog_scale), address(dbias), steps, channels,
                 state_type(type)};
    py::gil_scoped_release release;
    cpu::active().compose_vjp(m, threads);
}

bool network_runs(int type) {
    return cpu::active().network && (type_of(type) == Type::f32 || type_of(type) == Type::bf16);
}

const cpu::NetworkLoops& network_loops(int type) {
    require(network_runs(type), "the instruction set in use has no loops for coupling networks of this type");
    return *cpu::active().network;
}

// The nine parameters, in flowkern.network's order, and the strides of the three weights, four each.
using Pointers = std::vector<Pointer>;
using Integers = std::vector<int64_t>;

Network network(const Pointers& p, const Integers& strides, int64_t few, int64_t hidden, int64_t out) {
    require(p.size() == 9 && strides.size() == 12, "the coupling network has nine parameters, three of them of four dimensions");
    require(few >= 1 && hidden >= 1 && out >= 1, "the coupling network needs at least one channel in every layer");
    const auto weight = [&](int parameter, int i) {
        const int64_t* s = strides.data() + 4 * i;
        // As the loops that pack number it.
        const int64_t kernel = i == 1 ? 1 : 3, rows = i == 2 ? out : hidden, columns = i == 0 ? few : hidden;
        require((rows - 1) * s[0] + (columns - 1) * s[1] + (kernel - 1) * (s[2] + s[3]) <= INT32_MAX,
                "a weight of a coupling network must span fewer than 2^31 numbers");
        return Weight{address(p[parameter]), s[0], s[1], s[2], s[3]};
    };
    return {weight(0, 0), weight(3, 1), weight(6, 2), address(p[1]), address(p[2]), address(p[4]), address(p[5]),
            address(p[7]), address(p[8]), few, hidden, out};
}

Image image(Pointer data, const Integers& strides) {
    require(strides.size() == 3, "an image has three strides: of samples, rows and pixels");
    return {address(data), strides[0], strides[1], strides[2]};
}

void check_all(const Pointers& pointers) {
    for (Pointer p : pointers) check_arrays(1, p);
}

int64_t network_packed_size(int type, int64_t few, int64_t hidden, int64_t out, int64_t height, int64_t width) {
    require(few >= 1 && hidden >= 1 && out >= 1, "the coupling network needs at least one channel in every layer");
    return network_loops(type).packed_size(type_of(type), few, hidden, out, height, width);
}

void network_fold(int threads, int type, int64_t few, int64_t hidden, int64_t out, int64_t height, int64_t width,
                  const Pointers& parameters, const Integers& strides, Pointer packed) {
    check_threads(threads);
    check_all(parameters);
    check_arrays(1, packed);
    NetworkFold m{network(parameters, strides, few, hidden, out), static_cast<float*>(address(packed)), height, width,
                  type_of(type)};
    const cpu::NetworkLoops& loops = network_loops(type);
    py::gil_scoped_release release;
    loops.fold(m, threads);
}

void network_trace(int threads, int type, int64_t samples, int64_t height, int64_t width, int64_t few, int64_t hidden,
                   int64_t out, Pointer packed, Pointer a, const Integers& a_strides, Pointer h, Pointer h1, Pointer h2) {
    check_threads(threads);
    require(samples >= 1 && height >= 1 && width >= 1, "the coupling network needs at least one pixel");
    check_arrays(1, packed, a, h);
    require((h1 == 0) == (h2 == 0), "either both hidden activations are kept or none");
    NetworkTrace m{static_cast<float*>(address(packed)), image(a, a_strides), address(h), address(h1), address(h2),
                   samples, height, width, few, hidden, out, type_of(type)};
    const cpu::NetworkLoops& loops = network_loops(type);
    py::gil_scoped_release release;
    loops.trace(m, threads);
}

void network_vjp(int threads, int type, int64_t samples, int64_t height, int64_t width, int64_t few, int64_t hidden,
                 int64_t out, const Pointers& parameters, const Integers& strides, const Pointers& gradients,
                 const Integers& gradient_strides, Pointer a, const Integers& a_strides, Pointer da,
                 const Integers& da_strides, Pointer h1, Pointer h2, Pointer dh) {
    check_threads(threads);
    require(samples >= 1 && height >= 1 && width >= 1, "the coupling network needs at least one pixel");
    check_all(parameters);
    check_arrays(1, a, da, h1, h2, dh);
    NetworkVjp m{network(parameters, strides, few, hidden, out), network(gradients, gradient_strides, few, hidden, out),
                 image(a, a_strides), image(da, da_strides), address(h1), address(h2), address(dh),
                 samples, height, width, type_of(type)};
    const cpu::NetworkLoops& loops = network_loops(type);
    py::gil_scoped_release release;
    loops.vjp(m, threads);
}

// Parameters of all steps in a row, or their gradients; `hidden` channels of each.
std::vector<Network> networks(const Pointers& p, const Integers& strides, int64_t few, const Integers& hidden, int64_t out) {
    const size_t steps = hidden.size();
    require(p.size() == 9 * steps && strides.size() == 12 * steps, "every step's coupling network has nine parameters");
    std::vector<Network> all;
    for (size_t k = 0; k < steps; k++) {
        const auto of = [&](const auto& list, size_t count) {
            return std::remove_cv_t<std::remove_reference_t<decltype(list)>>(list.begin() + k * count, list.begin() + (k + 1) * count);
        };
        all.push_back(network(of(p, 9), of(strides, 12), few, hidden[k], out));
    }
    return all;
}

std::vector<Kept> kept_of(const Pointers& p, size_t steps) {
    require(p.size() == 4 * steps, "a step keeps a state, h and two hidden activations, or null for what it doesn't");
    std::vector<Kept> all;
    for (size_t k = 0; k < steps; k++) {
        const Pointer* at = p.data() + 4 * k;
        require((at[2] == 0) == (at[3] == 0), "either both hidden activations are kept or none");
        require((at[1] == 0) == (p[1] == 0), "either every step's h is kept or none");
        all.push_back({address(at[0]), address(at[1]), address(at[2]), address(at[3])});
    }
    return all;
}

// (type, samples, height, width, channels, scale, alpha, reverse, stored), the same for both directions.
using Settings = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int, double, bool, bool>;

Chain chain_of(const Settings& s, const std::vector<Network>& networks, Pointer matrix, Pointer offset, Pointer inverse) {
    const auto [type, samples, height, width, channels, scale, alpha, reverse, stored] = s;
    require(!networks.empty() && samples >= 1 && height >= 1 && width >= 1, "a chain needs at least one step and one pixel");
    check_sizes(samples, height * width, channels);
    check_couples(channels);
    check_arrays(1, matrix, offset, inverse);
    network_loops(type);
    const auto numbers = [](Pointer p) { return static_cast<const float*>(address(p)); };
    return {networks.data(), numbers(matrix), numbers(offset), numbers(inverse), int64_t(networks.size()), samples, height, width,
            channels, alpha, scale_of(scale), reverse, type_of(type), stored};
}

int64_t network_outputs(const Settings& s) {
    return scale_of(std::get<5>(s)) == Scale::additive ? std::get<4>(s) / 2 : std::get<4>(s);
}

void chain(int threads, const Settings& settings, const Integers& hidden, const Pointers& parameters, const Integers& strides,
           Pointer matrix, Pointer offset, Pointer inverse, Pointer x, const Pointers& kept, Pointer out, Pointer logdet) {
    check_threads(threads);
    check_all(parameters);
    check_arrays(1, x, out, logdet);
    const auto steps = networks(parameters, strides, std::get<4>(settings) / 2, hidden, network_outputs(settings));
    const auto left = kept_of(kept, steps.size());
    ChainRun m{chain_of(settings, steps, matrix, offset, inverse), static_cast<const float*>(address(x)), left.data(),
               static_cast<float*>(address(out)), static_cast<float*>(address(logdet))};
    py::gil_scoped_release release;
    cpu::chain(m, threads);
}

void chain_vjp(int threads, const Settings& settings, const Integers& hidden, const Pointers& parameters, const Integers& strides,
               const Pointers& gradients, const Integers& gradient_strides, Pointer matrix, Pointer offset, Pointer inverse,
               Pointer boundary, Pointer g, Pointer glogdet, const Pointers& kept, Pointer dmatrix, Pointer doffset, Pointer dx,
               Pointer rebuilt) {
    check_threads(threads);
    check_all(parameters);
    check_arrays(1, boundary, g, glogdet, dmatrix, doffset, dx);
    const int64_t few = std::get<4>(settings) / 2, outputs = network_outputs(settings);
    const auto steps = networks(parameters, strides, few, hidden, outputs);
    const auto wanted = networks(gradients, gradient_strides, few, hidden, outputs);
    const auto left = kept_of(kept, steps.size());
    const Chain chain = chain_of(settings, steps, matrix, offset, inverse);
    require((rebuilt == 0) == chain.stored, "the input is rebuilt where it is not stored");
    const auto numbers = [](Pointer p) { return static_cast<float*>(address(p)); };
    ChainVjp m{chain, numbers(boundary), numbers(g), numbers(glogdet), left.data(), wanted.data(), numbers(dmatrix),
               numbers(doffset), numbers(dx), numbers(rebuilt)};
    py::gil_scoped_release release;
    cpu::chain_vjp(m, threads);
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
    config["version"] = about.version;
    config["compiler"] = about.compiler;
    config["openmp"] = openmp_built();
    config["isa_compiled"] = instruction_sets(false);
    config["isa_supported"] = instruction_sets(true);
    config["isa_active"] = cpu::active().name;
    config["cuda"] = about.cuda;
    config["cuda_compiler"] = about.cuda_compiler;
    config["cuda_missing"] = about.cuda_missing;
    return config;
}

}  // namespace

#ifdef FLOWKERN_BIND_CUDA
void bind_cuda(py::module_ module);  // cuda/bindings.cpp
#endif

PYBIND11_MODULE(_C, module) {
    if (openmp_built() && !openmp_loaded()) {
        throw py::import_error("flowkern._C runs on the OpenMP threads that torch loads: import torch (or flowkern) first");
    }
    module.def("mix", &mix);
    module.def("mix_vjp", &mix_vjp);
    module.def("couple", &couple);
    module.def("couple_vjp", &couple_vjp);
    module.def("squeeze", &squeeze);
    module.def("shrink", &shrink);
    module.def("consistency_vjp", &consistency_vjp);
    module.def("compose", &compose);
    module.def("compose_vjp", &compose_vjp);
    module.def("network_runs", &network_runs, "Whether the instruction set in use has loops for networks of a type.");
    module.def("network_packed_size", &network_packed_size);
    module.def("network_fold", &network_fold);
    module.def("network_trace", &network_trace);
    module.def("network_vjp", &network_vjp);
    module.def("chain", &chain);
    module.def("chain_vjp", &chain_vjp);
    module.def("kept_scratch", &kept_scratch, "Bytes of scratch memory that threads have used and keep for their next call.");
    module.def("count_scratch_afresh", &count_scratch_afresh, "Have kept_scratch tell what is used from now on.");
    module.def("build_config", &build_config, "What was compiled, and what runs: a dict.");
    module.def("select_isa", &select_isa, "Use one instruction set from now on. Raises ValueError where it can't run.");
#ifdef FLOWKERN_BIND_CUDA
    bind_cuda(module.def_submodule("cuda", "The pixel ops on a GPU."));
#endif
}
