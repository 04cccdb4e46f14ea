#pragma once
#include "../../../csrc/cpu/convert.h"

struct __nv_bfloat16 {
    flowkern::FLOWKERN_ISA::BFloat16 number;
};

inline float __bfloat162float(__nv_bfloat16 from) {
    float to;
    convert(from.number, to);
    return to;
}

inline __nv_bfloat16 __float2bfloat16_rn(float from) {
    __nv_bfloat16 to;
    flowkern::FLOWKERN_ISA::convert(from, to.number);
    return to;
}
