// Run-time choice among the instruction sets the kernels were compiled for.
//
// Every file of csrc/cpu/kernels/ is compiled once per level, its code in `namespace mf::MF_ISA`. A kernel header
// declares its functions for all levels, the op file calls the right one:
//
//   kernels/scale.h     MF_KERNEL(template <typename T> void scale(const T* x, T a, T* y, int64_t n);)
//   kernels/scale.cpp   namespace mf::MF_ISA {
//                       template <typename T> void scale(const T* x, T a, T* y, int64_t n) { ... }
//                       template void scale<float>(const float*, float, float*, int64_t);   // one line per type
//                       }
//   scale.cpp           MF_DISPATCH(scale<float>)(x, a, y, n);
//
// CMakeLists.txt defines MF_HAVE_<LEVEL> for those that are compiled: for a library of one machine its best level
// alone. `amxbf16` is `avx512bf16` with the tile products of csrc/cpu/amx/ beside it, not a build of its own of every
// file.
#pragma once

#include <cstdint>

namespace mf {

enum class Isa : int { none = -1, portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amxbf16 = 4 };

// The best level that is compiled in, that this processor has and that MAMLPP_FAST_ISA (read once) allows.
// A level out of reach gives the best one below it; an unknown name is refused by mamlpp_fast/_native.py.
Isa isa();

// For a library without a level for this processor, as one compiled for another may be.
[[noreturn]] void no_level();

}  // namespace mf

#ifdef MF_HAVE_PORTABLE
#define MF_PORTABLE(...) __VA_ARGS__
#else
#define MF_PORTABLE(...)
#endif
#ifdef MF_HAVE_AVX2
#define MF_AVX2(...) __VA_ARGS__
#else
#define MF_AVX2(...)
#endif
#ifdef MF_HAVE_AVX512
#define MF_AVX512(...) __VA_ARGS__
#else
#define MF_AVX512(...)
#endif
#ifdef MF_HAVE_AVX512BF16
#define MF_AVX512BF16(...) __VA_ARGS__
#else
#define MF_AVX512BF16(...)
#endif

// Declares the same functions in the namespace of every compiled level, and of the portable one for their types.
#define MF_KERNEL(...)                         \
  namespace mf::portable {                     \
  __VA_ARGS__                                  \
  }                                            \
  MF_AVX2(namespace mf::avx2{__VA_ARGS__})     \
  MF_AVX512(namespace mf::avx512{__VA_ARGS__}) \
  MF_AVX512BF16(namespace mf::avx512bf16{__VA_ARGS__})

// The function pointer for this machine; `decltype` of the portable one, so an overload set is refused.
#define MF_DISPATCH(...)                                                                                     \
  ([]() -> decltype(&mf::portable::__VA_ARGS__) {                                                            \
    switch (mf::isa()) {                                                                                     \
      MF_AVX512BF16(case mf::Isa::amxbf16 : case mf::Isa::avx512bf16 : return &mf::avx512bf16::__VA_ARGS__;) \
      MF_AVX512(case mf::Isa::avx512 : return &mf::avx512::__VA_ARGS__;)                                     \
      MF_AVX2(case mf::Isa::avx2 : return &mf::avx2::__VA_ARGS__;)                                           \
      MF_PORTABLE(case mf::Isa::portable : return &mf::portable::__VA_ARGS__;)                               \
      default:                                                                                               \
        mf::no_level();                                                                                      \
    }                                                                                                        \
  }())
