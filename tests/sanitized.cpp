// Runs every CPU loop on arrays of exactly the size it may touch. Built with sanitizers by test_sanitized.py: a read or
// write one element too far ends the program.
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <vector>

#include "../csrc/cpu/chain.h"
#include "../csrc/cpu/dispatch.h"
#include "../csrc/cpu/squeeze.h"
#include "arrays.h"

using namespace flowkern;

namespace {

void mixes(const cpu::InstructionSet& isa, Type type, int64_t pixels, int64_t c) {
    Array x(pixels * c, type), g(pixels * c, type), y(pixels * c, type), dv(pixels * c, type), matrix(c * c, type),
        inverse_matrix(c * c, type), offset(c, type), dmatrix(c * c, type), doffset(c, type);
    for (bool inverse : {false, true}) {
        isa.mix({x.get(), offset.get(), {matrix.get(), c, 1}, y.get(), pixels, c, inverse, type}, 2);
        for (bool given : {false, true}) {
            isa.mix_vjp({x.get(), g.get(), offset.get(), {matrix.get(), c, 1}, {inverse_matrix.get(), 1, c},
                         given ? nullptr : y.get(), dv.get(), dmatrix.get(), doffset.get(), pixels, c, inverse, given, type}, 2);
        }
    }
}

void couplings(const cpu::InstructionSet& isa, Type type, Type h_type, Scale scale, int64_t samples, int64_t pixels, int64_t c) {
    const int64_t all = samples * pixels, row = scale == Scale::additive ? c / 2 : c;
    Array x(all * c, type), g(all * c, type), y(all * c, type), dv(all * c, type), h(all * row, h_type), dh(all * row, h_type),
        logdet(samples, type), matrix(c * c, type), offset(c, type);
    for (bool inverse : {false, true}) {
        for (void* mixing : {static_cast<void*>(nullptr), matrix.get()}) {
            isa.couple({x.get(), h.get(), y.get(), logdet.get(), offset.get(), {mixing, c, 1}, samples, pixels, c, 1.0, scale,
                        inverse, type, h_type}, 2);
        }
        for (bool given : {false, true}) {
            isa.couple_vjp({x.get(), g.get(), h.get(), logdet.get(), given ? nullptr : y.get(), dv.get(), dh.get(), samples,
                            pixels, c, 1.0, scale, inverse, given, type, h_type}, 2);
        }
    }
}

void pointwise(const cpu::InstructionSet& isa, Type type, int64_t size) {
    Array x(size, type), y(size, type), g(size, type), result(size, type), other(size, type), strength(1, type), gradient(1, type);
    for (void* d : {static_cast<void*>(nullptr), gradient.get()}) {
        isa.shrink({x.get(), g.get(), strength.get(), result.get(), d, size, type}, 2);
    }
    isa.consistency_vjp({x.get(), y.get(), g.get(), strength.get(), result.get(), other.get(), gradient.get(), size, type}, 2);
}

// A dense image, in planes or channels-last.
void squeezes(Type type, int64_t samples, int64_t c, int64_t height, int64_t width) {
    Array x(samples * c * 4 * height * width, type), y(samples * c * 4 * height * width, type);
    const int64_t row = 2 * width, plane = 2 * height * row;
    cpu::squeeze({x.get(), y.get(), samples, c, height, width, c * plane, plane, row, 1, 2 * row, 2, type}, 2);
    cpu::squeeze({x.get(), y.get(), samples, c, height, width, c * plane, 1, c * row, c, 2 * c * row, 2 * c, type}, 2);
}

void compositions(const cpu::InstructionSet& isa, Type type, int64_t steps, int64_t c) {
    Array lower(steps * c * c, type), upper(steps * c * c, type), v(steps * c, type), matrix(steps * c * c, type),
        inverse(steps * c * c, type), offset(steps * c, type), logdet(1, type), dlower(steps * c * c, type),
        dupper(steps * c * c, type), dv(steps * c, type);
    std::unique_ptr<int64_t[]> permutation(new int64_t[steps * c]);
    for (int64_t i = 0; i < steps * c; i++) permutation[i] = (i + i / c) % c;
    isa.compose({lower.get(), upper.get(), v.get(), v.get(), v.get(), v.get(), permutation.get(), matrix.get(), offset.get(),
                 inverse.get(), logdet.get(), steps, c, type}, 2);
    isa.compose_vjp({lower.get(), upper.get(), v.get(), v.get(), v.get(), v.get(), permutation.get(), matrix.get(), offset.get(),
                     logdet.get(), dlower.get(), dupper.get(), dv.get(), dv.get(), dv.get(), steps, c, type}, 2);
}

// A network whose weights and images have gaps, so that strides are told apart; gradients wanted or not.
void networks(const cpu::InstructionSet& isa, Type type, int64_t samples, int64_t height, int64_t width, int64_t few, int64_t hidden,
              int64_t out, bool wanted) {
    const int64_t pixels = samples * height * width, pixel = few + 3;
    Array w1(hidden * few * 9, Type::f32), w2(hidden * hidden, Type::f32), w3(out * hidden * 9, Type::f32), v(hidden, Type::f32),
        u(out, Type::f32), g1(hidden * few * 9, Type::f32), g2(hidden * hidden, Type::f32), g3(out * hidden * 9, Type::f32),
        gs(hidden, Type::f32), gu(out, Type::f32), a((pixels - 1) * pixel + few, Type::f32),
        da((pixels - 1) * pixel + few, Type::f32), h(pixels * out, type), h1(pixels * hidden, type), h2(pixels * hidden, type),
        packed(isa.network->packed_size(type, few, hidden, out, height, width), Type::f32);
    const auto net = [&](const Array& x, const Array& y, const Array& z, const Array& s, const Array& t) {
        return Network{{x.get(), few * 9, 1, 3 * few, few}, {y.get(), hidden, 1, 1, 1}, {z.get(), hidden * 9, 9, 3, 1}, s.get(),
                       s.get(), s.get(), s.get(), t.get(), t.get(), few, hidden, out};
    };
    const auto image = [&](const Array& x) { return Image{x.get(), height * width * pixel, width * pixel, pixel}; };
    const Network network = net(w1, w2, w3, v, u);
    Network gradient = wanted ? net(g1, g2, g3, gs, gu) : Network{};
    float* folded = static_cast<float*>(packed.get());
    isa.network->fold({network, folded, height, width, type}, 2);
    for (bool keep : {false, true}) {
        isa.network->trace({folded, image(a), h.get(), keep ? h1.get() : nullptr, keep ? h2.get() : nullptr, samples, height, width,
                            few, hidden, out, type}, 2);
    }
    isa.network->vjp({network, gradient, image(a), image(da), h1.get(), h2.get(), h.get(), samples, height, width, type}, 2);
}

// A level's steps, forwards and backwards, every way of keeping, with all of what is kept in arrays of its own.
void chains(Type type, int64_t steps, int64_t samples, int64_t height, int64_t width, int64_t c, int64_t hidden, bool reverse) {
    const int64_t all = samples * height * width, few = c / 2;
    Array x(all * c, Type::f32), g(all * c, Type::f32), out(all * c, Type::f32), dx(all * c, Type::f32), logdet(samples, Type::f32),
        matrix(steps * c * c, Type::f32), offset(steps * c, Type::f32), dmatrix(steps * c * c, Type::f32),
        doffset(steps * c, Type::f32), w1(hidden * few * 9, Type::f32), w2(hidden * hidden, Type::f32),
        w3(c * hidden * 9, Type::f32), v(hidden, Type::f32), u(c, Type::f32);
    const auto numbers = [](const Array& a) { return static_cast<float*>(a.get()); };
    const Network network{{w1.get(), few * 9, 9, 3, 1}, {w2.get(), hidden, 1, 1, 1}, {w3.get(), hidden * 9, 9, 3, 1}, v.get(),
                          v.get(), v.get(), v.get(), u.get(), u.get(), few, hidden, c};
    const std::vector<Network> networks(steps, network), gradients(steps, Network{});
    for (int mode = 0; mode < 4; mode++) {  // recompute, with anchors, checkpoint, store
        const bool stored = mode > 1;
        std::vector<std::unique_ptr<Array>> arrays;
        const auto array = [&](int64_t channels, Type t) {
            arrays.push_back(std::make_unique<Array>(all * channels, t));
            return arrays.back()->get();
        };
        std::vector<Kept> kept(steps, Kept{});
        for (int64_t k = 0; k < steps; k++) {
            if (mode > 0 && k > 0) kept[k].state = array(c, Type::f32);
            if (mode == 3) kept[k] = {kept[k].state, array(c, type), array(hidden, type), array(hidden, type)};
        }
        const Chain chain{networks.data(), numbers(matrix), numbers(offset), numbers(matrix), steps, samples, height, width, c, 1.0,
                          Scale::softclamp, reverse, type, stored};
        cpu::chain({chain, numbers(x), kept.data(), numbers(out), numbers(logdet)}, 2);
        cpu::chain_vjp({chain, numbers(stored ? x : out), numbers(g), numbers(logdet), kept.data(), gradients.data(), numbers(dmatrix),
                        numbers(doffset), numbers(dx), stored ? nullptr : numbers(x)}, 2);
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (!cpu::select(arguments[1])) return 2;
    const cpu::InstructionSet& isa = cpu::active();
    if (count > 2) {  // one element too many, on purpose
        Array z(7, Type::f32), result(8, Type::f32), strength(1, Type::f32);
        isa.shrink({z.get(), nullptr, strength.get(), result.get(), nullptr, 8, Type::f32}, 1);
    }
    int64_t calls = 0;
    for (int64_t pixels : {0, 1, 31, 32, 33, 70}) {
        for (int64_t c : {1, 2, 3, 6, 10, 12, 24, 34, 48, 96}) {
            for (Type type : {Type::f32, Type::f64}) {
                mixes(isa, type, pixels, c);
                pointwise(isa, type, pixels * c * 3);
                for (Scale scale : {Scale::softclamp, Scale::sigmoid, Scale::additive}) {
                    for (Type h_type : {Type::f32, Type::bf16, Type::f16, Type::f64}) {
                        if (c % 2 || (type == Type::f64) != (h_type == Type::f64)) continue;
                        couplings(isa, type, h_type, scale, 1 + pixels % 3, pixels, c);
                        calls++;
                    }
                }
            }
        }
    }
    for (Type type : {Type::f32, Type::f64}) {
        for (int64_t c : {1, 2, 7, 12, 48}) compositions(isa, type, 1 + c % 3, c);
        for (int64_t c : {1, 3, 12}) squeezes(type, 2, c, 5, 1 + c % 4);
    }
    for (Type type : {Type::f32, Type::bf16}) {
        if (!isa.network) continue;
        for (int64_t width : {1, 7, 32, 600}) {
            for (int64_t hidden : {1, 5, 16, 33, 70}) {
                for (int64_t few : {1, 3, 6}) networks(isa, type, 1 + hidden % 2, width > 32 ? 2 : 19, width, few, hidden, 2 * few, few != 3);
            }
        }
        for (int64_t steps : {1, 2, 3}) {
            for (bool reverse : {false, true}) chains(type, steps, 1 + steps % 2, 7, 5, 2 * steps, 10 * steps, reverse);
        }
        chains(type, 1, 5, 24, 24, 6, 17, false);  // bands of different size, and an image that is left of two threads' four
        chains(type, 1, 9, 4, 4, 6, 17, true);     // several images at once
        chains(type, 1, 17, 16, 16, 4, 9, false);  // three ranges of sums a thread
        for (int64_t width : {2, 4, 10, 12, 600}) {  // by Winograd, in tiles of either form
            for (int64_t hidden : {32, 150}) networks(isa, type, 2, width > 32 ? 4 : 18, width, 3 + hidden % 4, hidden, 7, true);
            // Four tiles side by side.
            for (int64_t out : {4, 10, 12}) networks(isa, type, 2, width > 32 ? 4 : 18, width, 2, 144 + 4 * out, out, true);
        }
        for (bool reverse : {false, true}) {
            for (int64_t width : {10, 12}) chains(type, 2, 3, 6, width, 4, 40, reverse);
        }
        chains(type, 1, 3, 64, 40, 4, 9, false);   // an image that is left, in more ranges than the two before it
    }
    std::printf("%lld couplings on %s\n", static_cast<long long>(calls), isa.name);
}
