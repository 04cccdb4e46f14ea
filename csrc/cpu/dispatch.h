// The CPU's entry points, for the instruction set chosen at run time.
#pragma once
#include "../params.h"

namespace flowkern::cpu {

struct InstructionSet {
    const char* name;
    bool supported;  // by this machine
    void (*mix)(const Mix&, int threads);
    void (*mix_vjp)(const MixVjp&, int threads);
    void (*couple)(const Couple&, int threads);
    void (*couple_vjp)(const CoupleVjp&, int threads);
    void (*shrink)(const Shrink&, int threads);
    void (*consistency)(const Consistency&, int threads);
};

// All that were compiled, best first.
const InstructionSet* begin();
const InstructionSet* end();

// The one in use: the best supported one, or what `select` chose. `select` returns false where there is none such.
const InstructionSet& active();
bool select(const char* name);

}  // namespace flowkern::cpu
