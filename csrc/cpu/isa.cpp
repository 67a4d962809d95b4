#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#if defined(MF_HAVE_AMXBF16) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mf {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amxbf16"};

/// Whether the processor has tiles of bfloat16 and the kernel lets this process, its later threads included, use them.
bool amx() {
#if defined(MF_HAVE_AMXBF16) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;       // of CPUID 7.0 EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_supported(bool with_amx) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  // Of the processor; a level may be compiled without those below it.
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                       __builtin_cpu_supports("avx512vl");
#ifdef MF_HAVE_AVX512BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return with_amx && amx() ? Isa::amxbf16 : Isa::avx512bf16;
  }
#endif
#ifdef MF_HAVE_AVX512
  if (avx512) return Isa::avx512;
#endif
#ifdef MF_HAVE_AVX2
  if (avx2) return Isa::avx2;
#endif
#endif
  return Isa::portable;
}

Isa choose() {
  const char* text = std::getenv("MAMLPP_FAST_ISA");
  const std::string wanted = text == nullptr ? "" : text;
  Isa allowed = Isa::amxbf16;
  for (int level = 0; level < static_cast<int>(std::size(kNames)); ++level) {
    if (wanted == kNames[level]) allowed = static_cast<Isa>(level);
  }
  // The kernel is asked for tiles only where they are allowed.
  return std::min(best_supported(allowed == Isa::amxbf16), allowed);
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
