#include "isa.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
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

/// Whether a level is compiled in and this processor has it.
bool reachable(Isa level) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                       __builtin_cpu_supports("avx512vl");
#endif
  switch (level) {
    // The tiles stand beside the kernels of the level below.
    MF_AVX512BF16(case Isa::amxbf16 : return avx512 && __builtin_cpu_supports("avx512bf16") && amx();
                  case Isa::avx512bf16 : return avx512 && __builtin_cpu_supports("avx512bf16");)
    MF_AVX512(case Isa::avx512 : return avx512;)
    MF_AVX2(case Isa::avx2 : return avx2;)
    MF_PORTABLE(case Isa::portable : return true;)
    default:
      return false;
  }
}

Isa choose() {
  const char* text = std::getenv("MAMLPP_FAST_ISA");
  const std::string wanted = text == nullptr ? "" : text;
  int level = static_cast<int>(std::size(kNames)) - 1;
  for (int i = level; i >= 0; --i) {
    if (wanted == kNames[i]) level = i;
  }
  // From the highest that is allowed: the kernel is asked for tiles only where they are.
  while (level >= 0 && !reachable(static_cast<Isa>(level))) --level;
  return static_cast<Isa>(level);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

void no_level() { throw std::runtime_error("the native library has no kernels for this processor"); }

}  // namespace mf

// For mamlpp_fast/_native.py. A function of C rather than an operation: torch's headers take ten seconds to read.
extern "C" __attribute__((visibility("default"))) const char* mamlpp_fast_isa() {
  return mf::isa() == mf::Isa::none ? "" : mf::kNames[static_cast<int>(mf::isa())];
}
