// Glow's squeeze (section 3.6 of arXiv:1807.03039): an image's blocks of 2x2 pixels become pixels of four times the channels.
#pragma once
#include "../params.h"

namespace flowkern::cpu {

void squeeze(const Squeeze& m, int threads);

}  // namespace flowkern::cpu
