// Register-blocked product shared by every convolution kernel: MR rows times NV vectors of accumulators.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace mf::MF_ISA::conv {

#if MF_VECTOR_BYTES == 64
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 2;
#endif
constexpr int kMaxRows = 6;
template <class T>
constexpr int kLanes = Vec<T>::size;
template <class T>
constexpr int kPanel = kMaxVectors * kLanes<T>;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
/// Elements rounded up to whole cache lines.
template <class T>
inline int64_t round_line(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return divide_up(n, line) * line;
}

/// `len` steps of the reduction, the first at element offset `a` of every row pointer and `b` of the panel.
struct Segment {
  int64_t a, b, len;
};

/// Operands of one block: out[i][:] (+)= sum over segments of rows[i][a + k * step_a] * panel[b + k * step_b][:].
template <class T>
struct Block {
  const T* rows[kMaxRows];
  T* out[kMaxRows];
};

template <class T, int MR, int NV>
void multiply(const Block<T>& block, const Segment* segments, int64_t count, int64_t step_a, const T* panel,
              int64_t step_b, bool accumulate) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[MR][NV];
  const T* row[MR];
  for (int i = 0; i < MR; ++i) {
    row[i] = block.rows[i];
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>::zero();
  }
  for (int64_t s = 0; s < count; ++s) {
    int64_t at = segments[s].a;
    const int64_t end = at + segments[s].len * step_a;
    const T* b = panel + segments[s].b;
    for (; at != end; at += step_a, b += step_b) {
      Vec<T> right[NV];
      for (int v = 0; v < NV; ++v) right[v] = Vec<T>::load(b + v * W);
      for (int i = 0; i < MR; ++i) {
        const Vec<T> left = Vec<T>::broadcast(row[i][at]);
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(left, right[v], acc[i][v]);
      }
    }
  }
  // Adding whole partial sums, not continuing the old chain, keeps the rounding error of long reductions small.
  if (accumulate) {
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v) (Vec<T>::load(block.out[i] + v * W) + acc[i][v]).store(block.out[i] + v * W);
  } else {
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v) acc[i][v].store(block.out[i] + v * W);
  }
}

template <class T>
using Multiply = void (*)(const Block<T>&, const Segment*, int64_t, int64_t, const T*, int64_t, bool);

template <class T, int NV>
inline Multiply<T> pick_rows(int rows) {
  switch (rows) {
    case 1: return multiply<T, 1, NV>;
    case 2: return multiply<T, 2, NV>;
    case 3: return multiply<T, 3, NV>;
    case 4: return multiply<T, 4, NV>;
    case 5: return multiply<T, 5, NV>;
    default: return multiply<T, 6, NV>;
  }
}

/// The block kernel of `rows` rows and `vectors` vectors.
template <class T>
inline Multiply<T> pick(int rows, int vectors) {
  if constexpr (kMaxVectors > 2) {
    if (vectors == 4) return pick_rows<T, 4>(rows);
    if (vectors == 3) return pick_rows<T, 3>(rows);
  }
  return vectors == 2 ? pick_rows<T, 2>(rows) : pick_rows<T, 1>(rows);
}

/// Runs a block whose last vector is only partly valid: through a private tile, so that nothing is written past `lanes`.
template <class T>
inline void multiply_partial(Multiply<T> kernel, Block<T> block, int rows, int64_t lanes, const Segment* segments,
                             int64_t count, int64_t step_a, const T* panel, int64_t step_b, bool accumulate) {
  alignas(64) T tile[kMaxRows][kPanel<T>];
  T* out[kMaxRows];
  for (int i = 0; i < rows; ++i) {
    out[i] = block.out[i];
    block.out[i] = tile[i];
  }
  kernel(block, segments, count, step_a, panel, step_b, false);
  for (int i = 0; i < rows; ++i)
    for (int64_t c = 0; c < lanes; ++c) out[i][c] = accumulate ? out[i][c] + tile[i][c] : tile[i][c];
}

/// Copies `n` values and fills up to `width` with zeros.
template <class T>
inline void copy_padded(T* to, const T* from, int64_t n, int64_t width) {
  if (n == kPanel<T> && width == n) {
    for (int v = 0; v < kMaxVectors; ++v) Vec<T>::load(from + v * kLanes<T>).store(to + v * kLanes<T>);
    return;
  }
  for (int64_t c = 0; c < n; ++c) to[c] = from[c];
  for (int64_t c = n; c < width; ++c) to[c] = T(0);
}

/// Panels of channels_out: the widths are kPanel but for the last, which is the remainder in whole vectors.
template <class T>
struct Panels {
  explicit Panels(int64_t channels) : channels(channels), count(divide_up(channels, kPanel<T>)) {}
  int64_t begin(int64_t p) const { return p * kPanel<T>; }
  int64_t lanes(int64_t p) const { return p + 1 < count ? kPanel<T> : channels - begin(p); }
  int vectors(int64_t p) const { return static_cast<int>(divide_up(lanes(p), kLanes<T>)); }
  int64_t width(int64_t p) const { return vectors(p) * kLanes<T>; }
  int64_t channels, count;
};

/// Transposes W x W values in registers; row strides in elements.
template <class T>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int W = kLanes<T>;
  Vec<T> r[W];
  for (int i = 0; i < W; ++i) r[i] = Vec<T>::load(from + i * from_stride);
  for (int h = W / 2; h > 0; h /= 2)
    for (int i = 0; i < W; ++i) {
      if (i & h) continue;
      const Vec<T> a = r[i], b = r[i + h];
      Vec<T> low, high;
      for (int j = 0; j < W; ++j) {
        low.v[j] = (j & h) ? b.v[j - h] : a.v[j];
        high.v[j] = (j & h) ? b.v[j] : a.v[j + h];
      }
      r[i] = low;
      r[i + h] = high;
    }
  for (int i = 0; i < W; ++i) r[i].store(to + i * to_stride);
}

/// to[j][i] = from[i][j] for i < rows, j < columns.
template <class T>
inline void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int W = kLanes<T>;
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

}  // namespace mf::MF_ISA::conv
