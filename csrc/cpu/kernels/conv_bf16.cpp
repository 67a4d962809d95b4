// What the machine can do in bfloat16 at most.

#include "conv_bf16.h"

namespace mf::MF_ISA {

/// Independent products in registers alone; returns the floating-point operations done.
double bf16_peak([[maybe_unused]] int64_t iterations) {
#ifdef __AVX512BF16__
  using Pair = mf::conv::Pair;
  constexpr int chains = 12;
  Vec<float> acc[chains];
  const Vec<Pair> ones = Vec<Pair>::broadcast(static_cast<Pair>(0x3f803f80));
  for (int i = 0; i < chains; ++i) acc[i] = Vec<float>::broadcast(static_cast<float>(i));
  for (int64_t k = 0; k < iterations; ++k) {
    for (int i = 0; i < chains; ++i) acc[i] = fma(ones, ones, acc[i]);
  }
  float total = 0;
  for (int i = 0; i < chains; ++i) total += acc[i].sum();
  return total == 12345.f ? 0 : 4.0 * Vec<float>::size * chains * static_cast<double>(iterations);
#else
  return 0;
#endif
}

}  // namespace mf::MF_ISA
