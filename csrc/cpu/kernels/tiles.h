// Neighbouring channels as registers: whole ones and the last, partial one. Lives in mf::MF_ISA like vec.h.
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

// A whole register of neighbouring channels.
template <typename T>
struct Whole {
  using V = Vec<T>;
  typedef uint8_t Bytes __attribute__((vector_size(V::size)));

  MF_INLINE V load(const T* p) const { return V::load(p); }
  MF_INLINE void store(V v, T* p) const { v.store(p); }
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

// The last channels, fewer than a register.
template <typename T>
struct Part {
  using V = Vec<T>;
  int n;

  MF_INLINE V load(const T* p) const { return V::load(p, n); }
  MF_INLINE void store(V v, T* p) const { v.store(p, n); }
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

}  // namespace mf::MF_ISA
