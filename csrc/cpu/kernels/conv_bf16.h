// Elements of two bfloat16 for the kernels of conv_direct.cpp: a product is vdpbf16ps, two multiply-adds a lane.
//
// It adds both products to the float32 sum with one rounding to nearest even each, whatever MXCSR says, and takes
// denormals, in and out, as zeros.
#pragma once

#include "conv_kernels.h"
#include "conv_micro.h"

#ifdef __AVX512BF16__

#include <immintrin.h>

namespace mf::MF_ISA {

template <>
struct Vec<mf::conv::Pair> {
  using Pair = mf::conv::Pair;
  static constexpr int size = MF_VECTOR_BYTES / static_cast<int>(sizeof(Pair));
  typedef uint32_t Register __attribute__((vector_size(MF_VECTOR_BYTES)));

  Register v;

  static MF_INLINE Vec broadcast(Pair x) { return {Register{} + static_cast<uint32_t>(x)}; }
  static MF_INLINE Vec load(const Pair* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(Register));
    return r;
  }
  MF_INLINE void store(Pair* p) const { std::memcpy(p, &v, sizeof(Register)); }

  // a.first * b.first + a.second * b.second + c
  friend MF_INLINE Vec<float> fma(Vec a, Vec b, Vec<float> c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};

namespace conv {

using mf::conv::Pair;

template <>
struct Element<Pair> {
  using Acc = float;
  using Stored = uint16_t;
  static constexpr int values = 2;
};

/// Elements of the values at `from` and at `from + next`; the second values are zeros where `next` is 0.
MF_INLINE void interleave(Pair* to, const uint16_t* from, int64_t next, int64_t n) {
  if (next == 0) {
    for (int64_t c = 0; c < n; ++c) to[c] = static_cast<Pair>(from[c]);
  } else {
    for (int64_t c = 0; c < n; ++c) to[c] = static_cast<Pair>(from[c] | uint32_t{from[next + c]} << 16);
  }
}

/// Interleaves `n` elements and fills up to `width` with zeros.
inline void copy_padded(Pair* to, const uint16_t* from, int64_t next, int64_t n, int64_t width) {
  if (n == kPanel<Pair> && width == n) return interleave(to, from, next, kPanel<Pair>);
  interleave(to, from, next, n);
  for (int64_t c = n; c < width; ++c) to[c] = Pair{0};
}

MF_INLINE void copy_rows(Pair* to, const uint16_t* from, int64_t next) { interleave(to, from, next, kMaxRows); }

}  // namespace conv
}  // namespace mf::MF_ISA

#endif
