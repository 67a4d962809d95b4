#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace mf {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

Isa best_supported() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#ifdef MF_HAVE_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  const bool avx2 = false;
#endif
#ifdef MF_HAVE_AVX512
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  const bool avx512 = false;
#endif
#ifdef MF_HAVE_AVX512BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return Isa::avx512bf16;
  }
#endif
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa choose() {
  const Isa best = best_supported();
  const char* wanted = std::getenv("MAMLPP_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (int level = 0; level < 4; ++level) {
    if (std::string(wanted) == kNames[level]) {
      return std::min(best, static_cast<Isa>(level));
    }
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa level) { return kNames[static_cast<int>(level)]; }

}  // namespace mf

// For mamlpp_fast/_native.py. A function of C rather than an operation: torch's headers take ten seconds to read.
extern "C" __attribute__((visibility("default"))) const char* mamlpp_fast_isa() { return mf::isa_name(mf::isa()); }
