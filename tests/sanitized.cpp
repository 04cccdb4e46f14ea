// Runs every CPU loop on arrays of exactly the size it may touch. Built with sanitizers by test_sanitized.py: a read or
// write one element too far ends the program.
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "../csrc/cpu/dispatch.h"
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
        isa.consistency({x.get(), y.get(), g.get(), strength.get(), result.get(), other.get(), d, size, type}, 2);
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
    std::printf("%lld couplings on %s\n", static_cast<long long>(calls), isa.name);
}
