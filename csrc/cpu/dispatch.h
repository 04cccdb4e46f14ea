// The CPU's entry points, for the instruction set chosen at run time.
#pragma once
#include "../params.h"

namespace flowkern::cpu {

// The coupling network, in fp32 and with bf16 factors.
struct NetworkLoops {
    int64_t (*packed_size)(Type, int64_t few, int64_t hidden, int64_t out, int64_t height, int64_t width);
    void (*fold)(const NetworkFold&, int threads);
    void (*trace)(const NetworkTrace&, int threads);
    void (*vjp)(const NetworkVjp&, int threads);
    int64_t (*replay_bytes)(const NetworkReplay&, int threads);
    void (*replay)(const NetworkReplay&, int threads);
};

struct InstructionSet {
    const char* name;
    bool supported;  // by this machine
    bool preferred;  // to what follows, if supported
    void (*mix)(const Mix&, int threads);
    void (*mix_vjp)(const MixVjp&, int threads);
    void (*couple)(const Couple&, int threads);
    void (*couple_vjp)(const CoupleVjp&, int threads);
    void (*shrink)(const Shrink&, int threads);
    void (*consistency_vjp)(const Consistency&, int threads);
    void (*compose)(const Compose&, int threads);
    void (*compose_vjp)(const ComposeVjp&, int threads);
    const NetworkLoops* network;  // null where PyTorch's convolutions serve
};

// All that were compiled, best first.
const InstructionSet* begin();
const InstructionSet* end();

// The one in use: the first that is supported and preferred, or what `select` chose. `select` returns false where there is none such.
const InstructionSet& active();
bool select(const char* name);

}  // namespace flowkern::cpu
