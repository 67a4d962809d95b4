// Neighbours in memory as registers: whole ones and the last, partial one. Lives in mf::MF_ISA like vec.h.
#pragma once

#include "vec.h"

namespace mf::MF_ISA {

// Result of comparing two registers; as integers, positions 0 to 3 in a pooling window.
template <typename T>
using Lanes = decltype(typename Vec<T>::Register{} > typename Vec<T>::Register{});

template <typename T>
MF_INLINE Vec<T> choose(Lanes<T> mask, Vec<T> yes, Vec<T> no) {
  return {mask ? yes.v : no.v};
}

// A whole register of neighbours, which memory may have in another type that Vec reads.
template <typename T>
struct Whole {
  using V = Vec<T>;
  typedef uint8_t Bytes __attribute__((vector_size(V::size)));
  static constexpr int n = V::size;

  template <typename S>
  MF_INLINE V load(const S* p) const {
    return V::load(p);
  }
  template <typename S>
  MF_INLINE void store(V v, S* p) const {
    v.store(p);
  }
  MF_INLINE Lanes<T> load_index(const uint8_t* p) const {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, Lanes<T>);
  }
  MF_INLINE void store_index(Lanes<T> index, uint8_t* p) const {
    const Bytes bytes = __builtin_convertvector(index, Bytes);
    __builtin_memcpy(p, &bytes, sizeof(bytes));
  }
};

// The last ones, fewer than a register.
template <typename T>
struct Part {
  using V = Vec<T>;
  int n;

  template <typename S>
  MF_INLINE V load(const S* p) const {
    return V::load(p, n);
  }
  template <typename S>
  MF_INLINE void store(V v, S* p) const {
    v.store(p, n);
  }
  MF_INLINE Lanes<T> load_index(const uint8_t* p) const {
    Lanes<T> index{};
    for (int i = 0; i < n; ++i) {
      index[i] = p[i];
    }
    return index;
  }
  MF_INLINE void store_index(Lanes<T> index, uint8_t* p) const {
    for (int i = 0; i < n; ++i) {
      p[i] = static_cast<uint8_t>(index[i]);
    }
  }
};

// body(Whole or Part, i) for the registers of n elements.
template <typename T, typename Body>
MF_INLINE void each_register(int64_t n, const Body& body) {
  constexpr int64_t size = Vec<T>::size;
  int64_t i = 0;
  for (; i + size <= n; i += size) {
    body(Whole<T>{}, i);
  }
  if (i < n) {
    body(Part<T>{static_cast<int>(n - i)}, i);
  }
}

}  // namespace mf::MF_ISA
