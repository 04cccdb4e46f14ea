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
    void compose(const Compose&, int);        \
    void compose_vjp(const ComposeVjp&, int); \
    }
#define DECLARE_NETWORK(isa)                                          \
    namespace flowkern::isa {                                         \
    int64_t network_packed_size(Type, int64_t, int64_t, int64_t);     \
    void network_fold(const NetworkFold&, int);                       \
    void network_trace(const NetworkTrace&, int);                     \
    void network_vjp(const NetworkVjp&, int);                         \
    }
#define ENTRY(isa, supported, network) \
    {#isa, supported, isa::mix, isa::mix_vjp, isa::couple, isa::couple_vjp, isa::shrink, isa::consistency, \
     isa::compose, isa::compose_vjp, network}

DECLARE(baseline)
#ifdef FLOWKERN_X86
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
DECLARE_NETWORK(avx2)
DECLARE_NETWORK(avx512)
DECLARE_NETWORK(avx512bf16)
#endif

namespace flowkern::cpu {
namespace {

#ifdef FLOWKERN_X86
#define NETWORK(isa, bf16) {bf16, isa::network_packed_size, isa::network_fold, isa::network_trace, isa::network_vjp}

const NetworkLoops wide[] = {NETWORK(avx512bf16, true), NETWORK(avx512, false), NETWORK(avx2, false)};

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq");
}
#endif

const InstructionSet sets[] = {
#ifdef FLOWKERN_X86
    ENTRY(avx512bf16, has_avx512() && __builtin_cpu_supports("avx512bf16"), &wide[0]),
    ENTRY(avx512, has_avx512(), &wide[1]),
    ENTRY(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &wide[2]),
#endif
    ENTRY(baseline, true, nullptr),
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
