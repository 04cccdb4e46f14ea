// A unit of its own, so that a new version or reason compiles nothing else anew.
#include "about.h"

namespace flowkern {

#ifdef FLOWKERN_CUDA
const About about{FLOWKERN_VERSION, FLOWKERN_COMPILER, FLOWKERN_CUDA, FLOWKERN_NVCC, nullptr};
#else
const About about{FLOWKERN_VERSION, FLOWKERN_COMPILER, nullptr, nullptr, FLOWKERN_NO_CUDA};
#endif

}  // namespace flowkern
