// One-dimensional transforms of Winograd's forms F(4, 3) to F(1, 3), and a tile's two axes of them.
#pragma once

#include "vec.h"

namespace mf::MF_ISA::conv::winograd {

using V = Vec<float>;

MF_INLINE V times(float c, V x) { return V::broadcast(c) * x; }
/// c * x + y
MF_INLINE V plus(float c, V x, V y) { return fma(V::broadcast(c), x, y); }

constexpr int kPixels = 4, kSide = kPixels + 2;  ///< of the largest tile along an axis: pixels out, and points

/// Points 0, 2/3, -2/3, 3/2, -3/2 and infinity: less than half the rounding error of 0, 1, -1, 2, -2 and infinity. The
/// pairs share their even and odd parts; the product of their squares is 1.
constexpr float a = 2.f / 3, b = 3.f / 2, aa = 4.f / 9, bb = 9.f / 4, aaa = 8.f / 27, bbb = 27.f / 8;
constexpr float both = 97.f / 36;                 // aa + bb
constexpr float apart = -65.f / 36;               // aa - bb
constexpr float na = -81.f / 130, nb = 8.f / 65;  // 1 / (2 aa (aa - bb)), 1 / (2 bb (bb - aa))

/// Whether tiles of `pixels` use a point. Those of fewer than 4 take some of the same points, with the same G: what it
/// lacks of their own is a factor in their B^T.
constexpr bool uses(int pixels, int point) {
  return pixels == 4 || point == 1 || point == 2 || point == 5 || (pixels == 3 ? point > 2 : pixels == 2 && point == 0);
}

/// One-dimensional transforms, named as in the derivation: `in` values become `out`, where `reads` and `writes`. Here
/// G on filters; the transposed G of the weight gradient; for tiles of M pixels B^T on data, A^T on products, and A.
struct Filter {
  static constexpr int in = 3, out = kSide;
  static constexpr bool reads(int) { return true; }
  static constexpr bool writes(int) { return true; }
  static MF_INLINE void line(const V* g, V* t) {
    const V even_a = times(na, plus(aa, g[2], g[0])), even_b = times(nb, plus(bb, g[2], g[0]));
    t[0] = g[0];
    t[1] = plus(na * a, g[1], even_a);
    t[2] = plus(-na * a, g[1], even_a);
    t[3] = plus(nb * b, g[1], even_b);
    t[4] = plus(-nb * b, g[1], even_b);
    t[5] = g[2];
  }
};

struct FilterGradient {
  static constexpr int in = kSide, out = 3;
  static constexpr bool reads(int) { return true; }
  static constexpr bool writes(int) { return true; }
  static MF_INLINE void line(const V* t, V* g) {
    const V even_a = times(na, t[1] + t[2]), odd_a = t[1] - t[2], even_b = times(nb, t[3] + t[4]), odd_b = t[3] - t[4];
    g[0] = t[0] + even_a + even_b;
    g[1] = plus(nb * b, odd_b, times(na * a, odd_a));
    g[2] = plus(bb, even_b, plus(aa, even_a, t[5]));
  }
};

template <int M>
struct Data {
  static constexpr int pixels = M, in = M + 2, out = kSide;
  static constexpr bool reads(int) { return true; }
  static constexpr bool writes(int point) { return uses(M, point); }
  static MF_INLINE void line(const V* d, V* t) {
    if constexpr (M == 4) {
      t[0] = plus(-both, d[2], d[0] + d[4]);
      t[5] = plus(-both, d[3], d[1] + d[5]);
      const V even_a = plus(-bb, d[2], d[4]), odd_a = plus(-bb, d[1], d[3]);
      t[1] = plus(a, odd_a, even_a);
      t[2] = plus(-a, odd_a, even_a);
      const V even_b = plus(-aa, d[2], d[4]), odd_b = plus(-aa, d[1], d[3]);
      t[3] = plus(b, odd_b, even_b);
      t[4] = plus(-b, odd_b, even_b);
    } else if constexpr (M == 3) {
      const V even_a = plus(aa, d[2], -d[0]), odd_a = plus(-bb, d[1], d[3]);
      t[1] = plus(a, odd_a, even_a);
      t[2] = plus(-a, odd_a, even_a);
      const V even_b = plus(bb, d[2], -d[0]), odd_b = plus(-aa, d[1], d[3]);
      t[3] = plus(b, odd_b, even_b);
      t[4] = plus(-b, odd_b, even_b);
      t[5] = plus(-both, d[2], d[0] + d[4]);
    } else if constexpr (M == 2) {
      const V even = times(apart, d[2]);
      t[0] = plus(-bb, d[2], d[0]);
      t[1] = plus(apart * a, d[1], even);
      t[2] = plus(-apart * a, d[1], even);
      t[5] = plus(-aa, d[1], d[3]);
    } else {
      const V even = times(apart * aa, d[0]);
      t[1] = plus(apart * a, d[1], even);
      t[2] = plus(-apart * a, d[1], even);
      t[5] = plus(-aa, d[0], d[2]);
    }
  }
};

template <int M>
struct Output {
  static constexpr int in = kSide, out = M;
  static constexpr bool reads(int point) { return uses(M, point); }
  static constexpr bool writes(int) { return true; }
  static MF_INLINE void line(const V* t, V* y) {
    const V even_a = t[1] + t[2];
    if constexpr (M == 1) {
      y[0] = even_a + t[5];
      return;
    }
    const V odd_a = t[1] - t[2];
    if constexpr (M == 2) {
      y[0] = t[0] + even_a;
      y[1] = plus(a, odd_a, t[5]);
      return;
    }
    const V even_b = t[3] + t[4], odd_b = t[3] - t[4];
    y[0] = M == 4 ? t[0] + even_a + even_b : even_a + even_b;
    y[1] = plus(b, odd_b, times(a, odd_a));
    y[2] = plus(bb, even_b, M == 3 ? plus(aa, even_a, t[5]) : times(aa, even_a));
    if constexpr (M == 4) y[3] = plus(bbb, odd_b, plus(aaa, odd_a, t[5]));
  }
};

template <int M>
struct Gradient {
  static constexpr int pixels = M, in = M, out = kSide;
  static constexpr bool reads(int) { return true; }
  static constexpr bool writes(int point) { return uses(M, point); }
  static MF_INLINE void line(const V* y, V* t) {
    t[0] = y[0];
    t[5] = y[M - 1];
    V even_a = y[0], even_b = y[0], odd_a = V::zero(), odd_b = V::zero();
    if constexpr (M > 1) odd_a = times(a, y[1]), odd_b = times(b, y[1]);
    if constexpr (M > 2) even_a = plus(aa, y[2], even_a), even_b = plus(bb, y[2], even_b);
    if constexpr (M > 3) odd_a = plus(aaa, y[3], odd_a), odd_b = plus(bbb, y[3], odd_b);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
  }
};

template <class Lines>
constexpr int written() {
  int count = 0;
  for (int o = 0; o < Lines::out; ++o) count += Lines::writes(o);
  return count;
}

/// Applies a transform along each axis of a tile, `Rows` down its columns first: reads `load(row, column)` once each,
/// or once a part, gives every result to `store(row, column, value)`. Between the axes are up to 6 x 6 values: too many
/// for 32 registers, so they are made in two parts. Of 16 registers two parts are too many as well, and cost.
template <class Rows, class Columns, class Load, class Store>
MF_INLINE void both_axes(const Load& load, const Store& store) {
  constexpr int between = written<Rows>() * Columns::in;
  constexpr int parts = MF_VECTOR_BYTES == 64 && between > 24 ? 2 : 1, own = Rows::out / parts;
#pragma GCC unroll 2
  for (int begin = 0; begin < Rows::out; begin += own) {
    V half[own][Columns::in];
#pragma GCC unroll 8
    for (int c = 0; c < Columns::in; ++c) {
      if (!Columns::reads(c)) continue;
      V column[Rows::in], result[Rows::out];
#pragma GCC unroll 8
      for (int r = 0; r < Rows::in; ++r)
        if (Rows::reads(r)) column[r] = load(r, c);
      Rows::line(column, result);
#pragma GCC unroll 8
      for (int r = 0; r < own; ++r)
        if (Rows::writes(begin + r)) half[r][c] = result[begin + r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < own; ++r) {
      if (!Rows::writes(begin + r)) continue;
      V result[Columns::out];
      Columns::line(half[r], result);
#pragma GCC unroll 8
      for (int c = 0; c < Columns::out; ++c)
        if (Columns::writes(c)) store(begin + r, c, result[c]);
    }
  }
}

}  // namespace mf::MF_ISA::conv::winograd
