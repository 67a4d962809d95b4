// One register of T (float or double) on GCC/Clang vector extensions, as wide as the level this file is compiled for.
//
// Lives in mf::MF_ISA, so that code of different levels never shares a symbol. Everything is forced inline.
// a * b + c becomes one fused multiply-add where the level has it (-ffp-contract=fast); `fma` says it in words.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bf16.h"

#ifndef MF_ISA
#error "vec.h belongs in csrc/cpu/kernels/, which CMakeLists.txt compiles with -DMF_ISA=<level>"
#endif

#if defined(__AVX512F__)
#define MF_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MF_VECTOR_BYTES 32
#else
#define MF_VECTOR_BYTES 16
#endif

#define MF_INLINE inline __attribute__((always_inline))

namespace mf::MF_ISA {

template <typename T>
struct Vec {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
  static constexpr int size = MF_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T Register __attribute__((vector_size(MF_VECTOR_BYTES)));
  typedef uint32_t Words __attribute__((vector_size(MF_VECTOR_BYTES)));
  typedef uint16_t Halves __attribute__((vector_size(MF_VECTOR_BYTES / 2)));

  Register v;

  static MF_INLINE Vec zero() { return {Register{}}; }
  // x - 0 is x for every x, so no instruction; 0 + x is not (x = -0) and costs an addition in every inner loop.
  static MF_INLINE Vec broadcast(T x) { return {x - Register{}}; }

  // No alignment is asked for.
  static MF_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(Register));
    return r;
  }
  MF_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(Register)); }

  // The first n < size elements; the rest of a loaded register is 0, memory past n is neither read nor written.
  static MF_INLINE Vec load(const T* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) {
      r.v[i] = p[i];
    }
    return r;
  }
  MF_INLINE void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) {
      p[i] = v[i];
    }
  }

  // The same of bfloat16 in memory: widened, and rounded to nearest even by integers, alike at every level (the
  // instruction of AVX512-BF16 takes denormals for zeros). Every NaN becomes 0x7fc0, as in c10::BFloat16.
  static MF_INLINE Vec load(const Bf16* p)
    requires std::is_same_v<T, float>
  {
    Halves h;
    std::memcpy(&h, p, sizeof(h));
    return {reinterpret_cast<Register>(__builtin_convertvector(h, Words) << 16)};
  }
  MF_INLINE void store(Bf16* p) const
    requires std::is_same_v<T, float>
  {
    const Words w = reinterpret_cast<Words>(v);
    const Words rounded = (w + 0x7fff + (w >> 16 & 1)) >> 16;
    const Halves h = __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0, Halves);
    std::memcpy(p, &h, sizeof(h));
  }
  static MF_INLINE Vec load(const Bf16* p, int n)
    requires std::is_same_v<T, float>
  {
    Bf16 all[size] = {};
    for (int i = 0; i < n; ++i) {
      all[i] = p[i];
    }
    return load(all);
  }
  MF_INLINE void store(Bf16* p, int n) const
    requires std::is_same_v<T, float>
  {
    Bf16 all[size];
    store(all);
    for (int i = 0; i < n; ++i) {
      p[i] = all[i];
    }
  }

  MF_INLINE T operator[](int i) const { return v[i]; }

  friend MF_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend MF_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend MF_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend MF_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend MF_INLINE Vec operator-(Vec a) { return {-a.v}; }
  MF_INLINE Vec& operator+=(Vec b) {
    v += b.v;
    return *this;
  }
  MF_INLINE Vec& operator-=(Vec b) {
    v -= b.v;
    return *this;
  }
  MF_INLINE Vec& operator*=(Vec b) {
    v *= b.v;
    return *this;
  }

  // a * b + c
  friend MF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  // Where a is NaN the result is b, as in std::max(b, a).
  friend MF_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend MF_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  // x > 0 ? a : b, element by element.
  friend MF_INLINE Vec where_positive(Vec x, Vec a, Vec b) { return {x.v > Register{} ? a.v : b.v}; }

  MF_INLINE T sum() const {
    T s[size];
    std::memcpy(s, &v, sizeof(Register));
    for (int width = size / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) {
        s[i] += s[i + width];
      }
    }
    return s[0];
  }
};

}  // namespace mf::MF_ISA
