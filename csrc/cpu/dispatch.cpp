#include "dispatch.h"

#include <atomic>
#include <cstring>

#define DECLARE(isa)                          \
    namespace flowkern::isa {                 \
    void mix(const Mix&, int);                \
    void mix_vjp(const MixVjp&, int);         \
    void couple(const Couple&, int);          \
    void couple_vjp(const CoupleVjp&, int);   \
    void shrink(const Shrink&, int);          \
    void consistency(const Consistency&, int); \
    }
#define ENTRY(isa, supported) \
    {#isa, supported, isa::mix, isa::mix_vjp, isa::couple, isa::couple_vjp, isa::shrink, isa::consistency}

DECLARE(baseline)
#ifdef FLOWKERN_X86
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace flowkern::cpu {
namespace {

const InstructionSet sets[] = {
#ifdef FLOWKERN_X86
    ENTRY(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")),
    ENTRY(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    ENTRY(baseline, true),
};

const InstructionSet* best() {
    for (const InstructionSet& set : sets) {
        if (set.supported) return &set;
    }
    return end() - 1;
}

std::atomic<const InstructionSet*> chosen{nullptr};

}  // namespace

const InstructionSet* begin() { return sets; }
const InstructionSet* end() { return sets + sizeof sets / sizeof *sets; }

const InstructionSet& active() {
    const InstructionSet* set = chosen;
    return set ? *set : *(chosen = best());
}

bool select(const char* name) {
    for (const InstructionSet& set : sets) {
        if (set.supported && !strcmp(set.name, name)) {
            chosen = &set;
            return true;
        }
    }
    return false;
}

}  // namespace flowkern::cpu
