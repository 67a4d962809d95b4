// Matrices turned in registers, W x W values at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace mf::MF_ISA {

/// Exchanges the off-diagonal blocks of side H of a matrix held in W registers.
template <class T, int H>
MF_INLINE void exchange_blocks(Vec<T>* r) {
  constexpr int W = Vec<T>::size;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(MF_VECTOR_BYTES)));
  Mask low, high;
  for (int j = 0; j < W; ++j) {
    low[j] = (j & H) ? W + j - H : j;
    high[j] = (j & H) ? W + j : j + H;
  }
  for (int i = 0; i < W; ++i) {
    if (i & H) continue;
    const auto a = r[i].v, b = r[i + H].v;
    r[i].v = __builtin_shuffle(a, b, low);
    r[i + H].v = __builtin_shuffle(a, b, high);
  }
  if constexpr (H > 1) exchange_blocks<T, H / 2>(r);
}

/// Transposes W x W values in registers; row strides in elements.
template <class T>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int W = Vec<T>::size;
  Vec<T> r[W];
  for (int i = 0; i < W; ++i) r[i] = Vec<T>::load(from + i * from_stride);
  exchange_blocks<T, W / 2>(r);
  for (int i = 0; i < W; ++i) r[i].store(to + i * to_stride);
}

/// to[j][i] = from[i][j] for i < rows, j < columns.
template <class T>
inline void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int W = Vec<T>::size;
  int64_t i = 0;
  for (; i + W <= rows; i += W) {
    int64_t j = 0;
    for (; j + W <= columns; j += W)
      transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    for (; j < columns; ++j)
      for (int64_t k = i; k < i + W; ++k) to[j * to_stride + k] = from[k * from_stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

}  // namespace mf::MF_ISA
