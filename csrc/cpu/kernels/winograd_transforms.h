// One-dimensional transforms of Winograd's forms F(4, 3) and F(3, 3), and a tile's two axes of them.
#pragma once

#include "vec.h"

namespace mf::MF_ISA::conv::winograd {

using V = Vec<float>;

MF_INLINE V times(float c, V x) { return V::broadcast(c) * x; }
/// c * x + y
MF_INLINE V plus(float c, V x, V y) { return fma(V::broadcast(c), x, y); }

/// One-dimensional transforms of F(m, 3), named as in the derivation: B^T on data, G on filters, A^T on products, and
/// the transposed A and G^T of the weight gradient.
template <int M>
struct Transform;

/// Points 0, 2/3, -2/3, 3/2, -3/2 and infinity: less than half the rounding error of 0, 1, -1, 2, -2 and infinity. The
/// pairs share their even and odd parts; the product of their squares is 1.
template <>
struct Transform<4> {
  static constexpr float a = 2.f / 3, b = 3.f / 2, aa = 4.f / 9, bb = 9.f / 4, aaa = 8.f / 27, bbb = 27.f / 8;
  static constexpr float both = 97.f / 36;                 // aa + bb
  static constexpr float na = -81.f / 130, nb = 8.f / 65;  // 1 / (2 aa (aa - bb)), 1 / (2 bb (bb - aa))

  static MF_INLINE void data(const V* d, V* t) {
    t[0] = plus(-both, d[2], d[0] + d[4]);
    t[5] = plus(-both, d[3], d[1] + d[5]);
    const V even_a = plus(-bb, d[2], d[4]), odd_a = plus(-bb, d[1], d[3]);
    t[1] = plus(a, odd_a, even_a);
    t[2] = plus(-a, odd_a, even_a);
    const V even_b = plus(-aa, d[2], d[4]), odd_b = plus(-aa, d[1], d[3]);
    t[3] = plus(b, odd_b, even_b);
    t[4] = plus(-b, odd_b, even_b);
  }
  static MF_INLINE void filter(const V* g, V* t) {
    const V even_a = times(na, plus(aa, g[2], g[0])), even_b = times(nb, plus(bb, g[2], g[0]));
    t[0] = g[0];
    t[1] = plus(na * a, g[1], even_a);
    t[2] = plus(-na * a, g[1], even_a);
    t[3] = plus(nb * b, g[1], even_b);
    t[4] = plus(-nb * b, g[1], even_b);
    t[5] = g[2];
  }
  static MF_INLINE void output(const V* t, V* y) {
    const V even_a = t[1] + t[2], odd_a = t[1] - t[2], even_b = t[3] + t[4], odd_b = t[3] - t[4];
    y[0] = t[0] + even_a + even_b;
    y[1] = plus(b, odd_b, times(a, odd_a));
    y[2] = plus(bb, even_b, times(aa, even_a));
    y[3] = plus(bbb, odd_b, plus(aaa, odd_a, t[5]));
  }
  static MF_INLINE void gradient(const V* y, V* t) {
    const V even_a = plus(aa, y[2], y[0]), odd_a = plus(aaa, y[3], times(a, y[1]));
    const V even_b = plus(bb, y[2], y[0]), odd_b = plus(bbb, y[3], times(b, y[1]));
    t[0] = y[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = y[3];
  }
  static MF_INLINE void filter_gradient(const V* t, V* g) {
    const V even_a = times(na, t[1] + t[2]), odd_a = t[1] - t[2], even_b = times(nb, t[3] + t[4]), odd_b = t[3] - t[4];
    g[0] = t[0] + even_a + even_b;
    g[1] = plus(nb * b, odd_b, times(na * a, odd_a));
    g[2] = plus(bb, even_b, plus(aa, even_a, t[5]));
  }
};

/// Points 0, 1, -1/2, -3/2 and infinity.
template <>
struct Transform<3> {
  static constexpr float n0 = -4.f / 3, n1 = 4.f / 15, n2 = 4.f / 3, n3 = -4.f / 15;

  static MF_INLINE void data(const V* d, V* t) {
    t[0] = plus(-0.75f, d[0], plus(-1.25f, d[1], d[2] + d[3]));
    t[1] = plus(0.75f, d[1], plus(2.f, d[2], d[3]));
    t[2] = plus(-1.5f, d[1], plus(0.5f, d[2], d[3]));
    t[3] = plus(-0.5f, d[1] + d[2], d[3]);
    t[4] = plus(-0.75f, d[1], plus(-1.25f, d[2], d[3] + d[4]));
  }
  static MF_INLINE void filter(const V* g, V* t) {
    t[0] = times(n0, g[0]);
    t[1] = times(n1, g[0] + g[1] + g[2]);
    t[2] = times(n2, plus(0.25f, g[2], plus(-0.5f, g[1], g[0])));
    t[3] = times(n3, plus(2.25f, g[2], plus(-1.5f, g[1], g[0])));
    t[4] = g[2];
  }
  static MF_INLINE void output(const V* t, V* y) {
    y[0] = (t[0] + t[1]) + (t[2] + t[3]);
    y[1] = plus(-1.5f, t[3], plus(-0.5f, t[2], t[1]));
    y[2] = plus(2.25f, t[3], plus(0.25f, t[2], t[1] + t[4]));
  }
  static MF_INLINE void gradient(const V* y, V* t) {
    t[0] = y[0];
    t[1] = y[0] + y[1] + y[2];
    t[2] = plus(0.25f, y[2], plus(-0.5f, y[1], y[0]));
    t[3] = plus(2.25f, y[2], plus(-1.5f, y[1], y[0]));
    t[4] = y[2];
  }
  static MF_INLINE void filter_gradient(const V* t, V* g) {
    const V u1 = times(n1, t[1]), u2 = times(n2, t[2]), u3 = times(n3, t[3]);
    g[0] = plus(n0, t[0], u1 + (u2 + u3));
    g[1] = plus(-1.5f, u3, plus(-0.5f, u2, u1));
    g[2] = plus(2.25f, u3, plus(0.25f, u2, u1 + t[4]));
  }
};

using Line = void (*)(const V*, V*);

/// Applies a one-dimensional transform from I to O points along both axes of a tile: reads `load(row, column)` once
/// each, or once a part, gives every result to `store(row, column, value)`. Between the axes are O x I values: 36 are
/// too many for 32 registers, so they are made in two parts. Of 16 registers two parts are too many as well, and cost.
template <int I, int O, Line line, class Load, class Store>
MF_INLINE void both_axes(const Load& load, const Store& store) {
  constexpr int parts = MF_VECTOR_BYTES == 64 && O * I > 32 ? 2 : 1, own = O / parts;
  static_assert(O % parts == 0);
#pragma GCC unroll 2
  for (int begin = 0; begin < O; begin += own) {
    V half[own][I];
#pragma GCC unroll 8
    for (int c = 0; c < I; ++c) {
      V column[I], result[O];
#pragma GCC unroll 8
      for (int r = 0; r < I; ++r) column[r] = load(r, c);
      line(column, result);
#pragma GCC unroll 8
      for (int r = 0; r < own; ++r) half[r][c] = result[begin + r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < own; ++r) {
      V result[O];
      line(half[r], result);
#pragma GCC unroll 8
      for (int c = 0; c < O; ++c) store(begin + r, c, result[c]);
    }
  }
}

}  // namespace mf::MF_ISA::conv::winograd
