// Register-blocked product shared by every convolution kernel: MR rows times NV vectors of accumulators.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "transpose.h"
#include "vec.h"

namespace mf::MF_ISA::conv {

/// Double precision is for checks: half as wide a block is half as many kernels to compile, and one step for all a
/// third.
template <class T>
constexpr int kMaxVectors = MF_VECTOR_BYTES == 64 && !std::is_same_v<T, double> ? 4 : 2;
constexpr int kMaxRows = 6;
template <class T>
constexpr int kLanes = Vec<T>::size;
template <class T>
constexpr int kPanel = kMaxVectors<T> * kLanes<T>;

/// How kernels of T take their operands: sums are Acc, memory holds Stored, `values` of them an element of T.
template <class T>
struct Element {
  using Acc = T;
  using Stored = T;
  static constexpr int values = 1;
};
template <class T>
using Acc = typename Element<T>::Acc;
template <class T>
using Stored = typename Element<T>::Stored;
template <class T>
constexpr int kValues = Element<T>::values;

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
  Acc<T>* out[kMaxRows];
};

/// Reduction steps of the row pointers known when compiled; the panel is then dense. kAnyStep leaves both to the
/// caller.
constexpr int kAnyStep = 0;
template <class T, int Step>
constexpr int kCompiledStep = std::is_same_v<T, double> ? kAnyStep : Step;

template <class T, int MR, int NV, int Step>
void multiply(const Block<T>& block, const Segment* segments, int64_t count, int64_t step_a, const T* panel,
              int64_t step_b, bool accumulate) {
  constexpr int W = kLanes<T>;
  if constexpr (Step != kAnyStep) {
    step_a = Step;
    step_b = NV * W;
  }
  Vec<Acc<T>> acc[MR][NV];
  const T* row[MR];
  for (int i = 0; i < MR; ++i) {
    row[i] = block.rows[i];
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<Acc<T>>::zero();
  }
  for (int64_t s = 0; s < count; ++s) {
    const int64_t start = segments[s].a, len = segments[s].len;
    const T* b = panel + segments[s].b;
    // Unrolled: a core shared with a second hardware thread is short of instruction slots, not of FMA units.
#pragma GCC unroll 4
    for (int64_t k = 0; k < len; ++k) {
      Vec<T> right[NV];
      for (int v = 0; v < NV; ++v) right[v] = Vec<T>::load(b + k * step_b + v * W);
      for (int i = 0; i < MR; ++i) {
        const Vec<T> left = Vec<T>::broadcast(row[i][start + k * step_a]);
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(left, right[v], acc[i][v]);
      }
    }
  }
  // Adding whole partial sums, not continuing the old chain, keeps the rounding error of long reductions small.
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      Acc<T>* to = block.out[i] + v * W;
      (accumulate ? Vec<Acc<T>>::load(to) + acc[i][v] : acc[i][v]).store(to);
    }
}

template <class T>
using Multiply = void (*)(const Block<T>&, const Segment*, int64_t, int64_t, const T*, int64_t, bool);

template <class T, int NV, int Step>
inline Multiply<T> pick_rows(int rows) {
  switch (rows) {
    case 1:
      return multiply<T, 1, NV, Step>;
    case 2:
      return multiply<T, 2, NV, Step>;
    case 3:
      return multiply<T, 3, NV, Step>;
    case 4:
      return multiply<T, 4, NV, Step>;
    case 5:
      return multiply<T, 5, NV, Step>;
    default:
      return multiply<T, 6, NV, Step>;
  }
}

/// The block kernel of `rows` rows and `vectors` vectors.
template <class T, int Step>
inline Multiply<T> pick(int rows, int vectors) {
  if constexpr (kMaxVectors<T> > 2) {
    if (vectors == 4) return pick_rows<T, 4, Step>(rows);
    if (vectors == 3) return pick_rows<T, 3, Step>(rows);
  }
  return vectors == 2 ? pick_rows<T, 2, Step>(rows) : pick_rows<T, 1, Step>(rows);
}

/// Runs a block whose last vector is only partly valid: through a private tile, so that nothing is written past
/// `lanes`.
template <class T>
inline void multiply_partial(Multiply<T> kernel, Block<T> block, int rows, int64_t lanes, const Segment* segments,
                             int64_t count, int64_t step_a, const T* panel, int64_t step_b, bool accumulate) {
  alignas(64) Acc<T> tile[kMaxRows][kPanel<T>];
  Acc<T>* out[kMaxRows];
  for (int i = 0; i < rows; ++i) {
    out[i] = block.out[i];
    block.out[i] = tile[i];
  }
  kernel(block, segments, count, step_a, panel, step_b, false);
  for (int i = 0; i < rows; ++i)
    for (int64_t c = 0; c < lanes; ++c) out[i][c] = accumulate ? out[i][c] + tile[i][c] : tile[i][c];
}

/// Copies `n` values and fills up to `width` with zeros; no element has a second value at `next`.
template <class T>
inline void copy_padded(T* to, const T* from, [[maybe_unused]] int64_t next, int64_t n, int64_t width) {
  if (n == kPanel<T> && width == n) {
    for (int v = 0; v < kMaxVectors<T>; ++v) Vec<T>::load(from + v * kLanes<T>).store(to + v * kLanes<T>);
    return;
  }
  for (int64_t c = 0; c < n; ++c) to[c] = from[c];
  for (int64_t c = n; c < width; ++c) to[c] = T(0);
}

/// The same for a whole block of rows.
template <class T>
MF_INLINE void copy_rows(T* to, const T* from, [[maybe_unused]] int64_t next) {
  memcpy(to, from, kMaxRows * sizeof(T));
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

}  // namespace mf::MF_ISA::conv
