#include "dispatch.h"

#include <atomic>
#include <cstring>
#ifdef FLOWKERN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define DECLARE(isa)                          \
    namespace flowkern::isa {                 \
    void mix(const Mix&, int);                \
    void mix_vjp(const MixVjp&, int);         \
    void couple(const Couple&, int);          \
    void couple_vjp(const CoupleVjp&, int);   \
    void shrink(const Shrink&, int);          \
    void consistency_vjp(const Consistency&, int); \
    void compose(const Compose&, int);        \
    void compose_vjp(const ComposeVjp&, int); \
    }
#define DECLARE_NETWORK(isa)                                          \
    namespace flowkern::isa {                                         \
    int64_t network_packed_size(Type, int64_t, int64_t, int64_t, int64_t, int64_t); \
    void network_fold(const NetworkFold&, int);                       \
    void network_trace(const NetworkTrace&, int);                     \
    void network_vjp(const NetworkVjp&, int);                         \
    int64_t network_replay_bytes(const NetworkReplay&, int);          \
    void network_replay(const NetworkReplay&, int);                   \
    }
#define ENTRY(name, isa, supported, preferred, network) \
    {name, supported, preferred, isa::mix, isa::mix_vjp, isa::couple, isa::couple_vjp, isa::shrink, isa::consistency_vjp, \
     isa::compose, isa::compose_vjp, network}

DECLARE(baseline)
#ifdef FLOWKERN_X86
DECLARE(avx2)
DECLARE(avx512)
DECLARE_NETWORK(avx2)
DECLARE_NETWORK(avx512)
#endif
#ifdef FLOWKERN_AVX512BF16
DECLARE(avx512bf16)
DECLARE_NETWORK(avx512bf16)
#endif
#ifdef FLOWKERN_AMX
DECLARE_NETWORK(amx)
#endif

namespace flowkern::cpu {
namespace {

#ifdef FLOWKERN_X86
#define NETWORK(isa) {isa::network_packed_size, isa::network_fold, isa::network_trace, isa::network_vjp, \
                      isa::network_replay_bytes, isa::network_replay}

const NetworkLoops wide[] = {NETWORK(avx512), NETWORK(avx2)};
#ifdef FLOWKERN_AVX512BF16
const NetworkLoops wide_bf16 = NETWORK(avx512bf16);
#endif
#ifdef FLOWKERN_AMX
const NetworkLoops tiled = NETWORK(amx);
#endif

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq");
}
#ifdef FLOWKERN_AVX512BF16
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Whether the instruction that adds two bf16 products multiplies more in a time than fp32's does. On Intel's processors with
// tiles, also where a virtual machine hides the tiles, it multiplies half as much, and bf16 networks are faster in fp32. Cooper
// Lake's, which have no tiles, are taken for fast as Intel says; not measured.
bool has_fast_avx512bf16() {
    return has_avx512bf16() && (!__builtin_cpu_is("intel") || __builtin_cpu_is("cooperlake"));
}
#endif
#endif

#ifdef FLOWKERN_AMX
// Whether the processor multiplies bf16 on tiles, and Linux lets this process use them, which it has to be asked for once.
// Containers may refuse.
bool has_amx() {
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

const InstructionSet sets[] = {
#ifdef FLOWKERN_AMX
    ENTRY("amx", avx512bf16, has_amx(), true, &tiled),  // tiles are for the network's products
#endif
#ifdef FLOWKERN_AVX512BF16
    ENTRY("avx512bf16", avx512bf16, has_avx512bf16(), has_fast_avx512bf16(), &wide_bf16),
#endif
#ifdef FLOWKERN_X86
    ENTRY("avx512", avx512, has_avx512(), true, &wide[0]),
    ENTRY("avx2", avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), true, &wide[1]),
#endif
    ENTRY("baseline", baseline, true, true, nullptr),
};

const InstructionSet* best() {
    for (const InstructionSet& set : sets) {
        if (set.supported && set.preferred) return &set;
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
