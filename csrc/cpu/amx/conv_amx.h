// Convolutions of bfloat16 by AMX tiles, for the shapes that fill them; see docs/derivations/task_conv2d.md.
#pragma once

#include "kernels/conv_kernels.h"

namespace mf::amxbf16 {

/// Whether the kernels serve this product; the others are for the level below.
bool conv_serves(const mf::conv::Gather& p);
bool conv_serves(const mf::conv::Outer& p);

mf::conv::Kernels<mf::conv::Pair> conv_tiles();

/// As that of the levels: independent products in tiles alone; returns the floating-point operations done.
double bf16_peak(int64_t iterations);

}  // namespace mf::amxbf16
