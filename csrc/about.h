// What was compiled, and by what.
#pragma once

namespace flowkern {

struct About {
    const char *version, *compiler;
    const char *cuda, *cuda_compiler;  // compute capabilities; null where the kernels are left out
    const char* cuda_missing;          // why they are
};

extern const About about;

}  // namespace flowkern
