// The chain of a level's steps in one call, out of the loops of the instruction set in use.
#pragma once
#include "../params.h"

namespace flowkern::cpu {

// Both want an instruction set with loops for networks of the chain's type, and at least one step and one number.
void chain(const ChainRun&, int threads);
void chain_vjp(const ChainVjp&, int threads);

}  // namespace flowkern::cpu
