#pragma once
#include "../../../csrc/cpu/convert.h"

struct __half {
    flowkern::FLOWKERN_ISA::Float16 number;
};

inline float __half2float(__half from) {
    float to;
    convert(from.number, to);
    return to;
}

inline __half __float2half_rn(float from) {
    __half to;
    flowkern::FLOWKERN_ISA::convert(from, to.number);
    return to;
}
