#include "pointwise.h"

#include "tiles.h"

namespace mf::MF_ISA {
namespace {

// Elementary functions. float32: polynomials, whose coefficients are least-squares fits of the relative error (below
// 4e-9, the Gaussian's tail 3e-8) in float64; float64, for checks: the C library's, number by number. A NaN stays one.

typedef Vec<float> F;
typedef Vec<double> D;

MF_INLINE F number(float x) { return F::broadcast(x); }

// c0 + c1 x + ...
template <int N>
MF_INLINE F polynomial(F x, const float (&c)[N]) {
  F sum = number(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) {
    sum = fma(sum, x, number(c[i]));
  }
  return sum;
}

typedef int32_t Int __attribute__((vector_size(MF_VECTOR_BYTES)));

// The nearest integer k of x, as a float and, added to 0x4b400000, in `bits`.
MF_INLINE F nearest(F x, Int* bits) {
  const F magic = number(12582912.f);  // 1.5 * 2^23: the last bit counts ones
  const F shifted = x + magic;
  *bits = reinterpret_cast<Int>(shifted.v);
  return shifted - magic;
}

MF_INLINE F exp_of(F x) {
  Int bits;
  const F inside = max(number(-87.3f), min(number(88.7f), x));
  const F k = nearest(inside * number(1.44269504f), &bits);
  const F r = fma(k, number(2.12194440e-4f), fma(k, number(-0.693359375f), inside));
  const F p = polynomial(
      r, {1.f, 1.f, 4.999998853e-01f, 1.666651787e-01f, 4.166954428e-02f, 8.368987231e-03f, 1.375115027e-03f});
  // 2^k in two factors: 2^128 is no float.
  const Int half = (bits - 0x4b400000) >> 1, rest = bits - 0x4b400000 - half;
  const F a = {reinterpret_cast<F::Register>((half + 127) << 23)},
          b = {reinterpret_cast<F::Register>((rest + 127) << 23)};
  const F value = p * a * b;
  return choose<float>(x.v < number(-87.3f).v, F::zero(),
                       choose<float>(x.v > number(88.7f).v, number(__builtin_inff()), value));
}

MF_INLINE F expm1_of(F x) {
  const F p = polynomial(
      x, {5.000000415e-01f, 1.666666442e-01f, 4.166532168e-02f, 8.333531645e-03f, 1.399721285e-03f, 1.986203566e-04f});
  const F small = fma(x * x, p, x), large = exp_of(x) - number(1);
  return choose<float>((x.v > number(-0.5f).v) & (x.v < number(0.5f).v), small, large);
}

MF_INLINE F tanh_of(F x) {
  const F z = x * x;
  const F p =
      polynomial(z, {-3.333328522e-01f, 1.333151267e-01f, -5.374465790e-02f, 2.065312452e-02f, -5.718962564e-03f});
  const F small = fma(x * z, p, x), large = number(1) - number(2) / (exp_of(x + x) + number(1));
  return choose<float>(z.v < number(0.375f).v, small, large);
}

MF_INLINE void sine_and_cosine(F x, F& sine, F& cosine) {
  constexpr float kLimit = 8192;  // beyond, what is left after taking quarter turns away is no longer exact
  bool far = false;
  for (int i = 0; i < F::size; ++i) {
    far |= !(x[i] > -kLimit && x[i] < kLimit);
  }
  if (far) {
    for (int i = 0; i < F::size; ++i) {
      sine.v[i] = __builtin_sinf(x[i]);
      cosine.v[i] = __builtin_cosf(x[i]);
    }
    return;
  }
  Int bits;
  const F k = nearest(x * number(0.636619772f), &bits);
  // Quarter turns in three parts, the first two with so few bits that their products with k are exact.
  const F r = fma(k, number(-7.54978995e-8f), fma(k, number(-4.83751297e-4f), fma(k, number(-1.5703125f), x)));
  const F rest = fma(k, number(-5.39030253e-15f), r), z = rest * rest;
  const F s = fma(rest * z, polynomial(z, {-1.666665507e-01f, 8.332181926e-03f, -1.951750555e-04f}), rest);
  const F tail = polynomial(z, {4.166664546e-02f, -1.388730643e-03f, 2.443209969e-05f});
  const F c = fma(z * z, tail, fma(z, number(-0.5f), number(1)));
  const Lanes<float> odd = (bits & 1) != 0, minus = (bits & 2) != 0, turned = ((bits + 1) & 2) != 0;
  const F upper = choose<float>(odd, c, s), lower = choose<float>(odd, s, c);
  sine = choose<float>(minus, -upper, upper);
  cosine = choose<float>(turned, -lower, lower);
}

// Distribution and density of the normal distribution: the tail is density * erfcx, a polynomial of 1 / (1 + 0.35 |x|).
MF_INLINE void normal(F x, F& below, F& density) {
  const F inside = max(number(-14.f), min(number(14.f), x)), size = max(inside, -inside);
  const F gauss = exp_of(inside * inside * number(-0.5f));
  const F t = number(1) / fma(size, number(0.35f), number(1));
  const F tail = gauss * polynomial(t, {-1.266673256e-06f, 1.396486590e-01f, 1.396146646e-01f, 1.210759277e-01f,
                                        1.016777634e-01f, -1.558403372e-02f, 1.497109482e-01f, -2.483449940e-01f,
                                        1.407360794e-01f, -2.853376291e-02f});
  below = choose<float>(x.v < F::Register{}, tail, number(1) - tail);
  density = gauss * number(0.398942280f);
}

template <typename Function>
MF_INLINE D each(D x, const Function& function) {
  for (int i = 0; i < D::size; ++i) {
    x.v[i] = function(x.v[i]);
  }
  return x;
}

MF_INLINE D exp_of(D x) {
  return each(x, [](double v) { return __builtin_exp(v); });
}
MF_INLINE D expm1_of(D x) {
  return each(x, [](double v) { return __builtin_expm1(v); });
}
MF_INLINE D tanh_of(D x) {
  return each(x, [](double v) { return __builtin_tanh(v); });
}
MF_INLINE void sine_and_cosine(D x, D& sine, D& cosine) {
  sine = each(x, [](double v) { return __builtin_sin(v); });
  cosine = each(x, [](double v) { return __builtin_cos(v); });
}
MF_INLINE void normal(D x, D& below, D& density) {
  below = each(x, [](double v) { return 0.5 * __builtin_erfc(v * -0.70710678118654752440); });
  density = each(x, [](double v) { return 0.39894228040143267794 * __builtin_exp(-0.5 * v * v); });
}

// The functions: value, slope and curvature; what is not used is not computed.
// -------------------------------------------

template <typename V>
struct Orders {
  V value, slope, curve;
};

// The logistic function and its slope, whose second factor is not taken as 1 - s: that would lose its digits.
template <typename T>
MF_INLINE void logistic(Vec<T> x, Vec<T>& s, Vec<T>& ds) {
  const Vec<T> one = Vec<T>::broadcast(1), e = exp_of(choose<T>(x.v > typename Vec<T>::Register{}, -x, x));
  const Vec<T> larger = one / (one + e), smaller = e * larger;
  s = choose<T>(x.v > typename Vec<T>::Register{}, larger, smaller);
  ds = larger * smaller;
}

template <Function F, typename T>
MF_INLINE Orders<Vec<T>> orders(Vec<T> x, Vec<T> a) {
  using V = Vec<T>;
  const auto num = [](double v) { return V::broadcast(static_cast<T>(v)); };
  const V one = num(1), two = num(2);
  if constexpr (F == Function::gelu) {
    V below, density;
    normal(x, below, density);
    // Where the density is zero its products are, whatever x is.
    const V near = max(num(-40), min(num(40), x));
    return {x * below, fma(near, density, below), density * (two - near * near)};
  } else if constexpr (F == Function::gelu_tanh) {
    const V c = num(1.5957691216057307118), near = max(num(-40), min(num(40), x)), square = near * near;
    const V d = c * fma(square, num(3 * 0.044715), one), dd = c * near * num(6 * 0.044715);
    V s, ds;
    logistic<T>(c * near * fma(square, num(0.044715), one), s, ds);
    return {x * s, fma(near * ds, d, s), ds * fma(near, fma((one - two * s) * d, d, dd), two * d)};
  } else if constexpr (F == Function::silu) {
    const V near = max(num(-800), min(num(800), x));
    V s, ds;
    logistic<T>(x, s, ds);
    return {x * s, fma(near, ds, s), ds * fma(near, one - two * s, two)};
  } else if constexpr (F == Function::sigmoid) {
    V s, ds;
    logistic<T>(x, s, ds);
    return {s, ds, ds * (one - two * s)};
  } else if constexpr (F == Function::tanh) {
    const V t = tanh_of(x), d = one - t * t;
    return {t, d, num(-2) * t * d};
  } else if constexpr (F == Function::elu) {
    const V rest = a * expm1_of(x), d = rest + a;
    return {choose<T>(x.v > V::zero().v, x, rest), choose<T>(x.v > V::zero().v, one, d),
            choose<T>(x.v > V::zero().v, V::zero(), d)};
  } else {
    V sine, cosine;
    sine_and_cosine(a * x, sine, cosine);
    const V first = F == Function::sine ? sine : cosine, next = F == Function::sine ? cosine : -sine;
    return {first, a * next, -(a * a * first)};
  }
}

// body(type of the function) for the one that is asked for.
template <typename Body>
MF_INLINE void chosen(Function f, const Body& body) {
#define MF_CASE(name)  \
  case Function::name: \
    return body.template operator()<Function::name>();
  switch (f) {
    MF_CASE(gelu)
    MF_CASE(gelu_tanh)
    MF_CASE(silu)
    MF_CASE(sigmoid)
    MF_CASE(tanh)
    MF_CASE(elu)
    MF_CASE(sine)
    MF_CASE(cosine)
  }
#undef MF_CASE
}

}  // namespace

template <typename T>
void pointwise(Function f, T a, const T* x, T* y, int64_t n) {
  const Vec<T> scale = Vec<T>::broadcast(a);
  chosen(f, [&]<Function F>() {
    each_register<T>(n, [&](auto tile, int64_t i) { tile.store(orders<F, T>(tile.load(x + i), scale).value, y + i); });
  });
}

template <typename T>
void pointwise_slope(Function f, T a, const T* x, const T* g, T* out, int64_t n) {
  const Vec<T> scale = Vec<T>::broadcast(a);
  chosen(f, [&]<Function F>() {
    each_register<T>(n, [&](auto tile, int64_t i) {
      tile.store(tile.load(g + i) * orders<F, T>(tile.load(x + i), scale).slope, out + i);
    });
  });
}

template <typename T>
void pointwise_bend(Function f, T a, const T* x, const T* g_dot, const T* g, const T* u, T* out, int64_t n) {
  const Vec<T> scale = Vec<T>::broadcast(a);
  chosen(f, [&]<Function F>() {
    each_register<T>(n, [&](auto tile, int64_t i) {
      const Orders<Vec<T>> at = orders<F, T>(tile.load(x + i), scale);
      tile.store(fma(tile.load(g_dot + i), at.slope, tile.load(g + i) * tile.load(u + i) * at.curve), out + i);
    });
  });
}

#define MF_INSTANTIATE(T)                                                         \
  template void pointwise<T>(Function, T, const T*, T*, int64_t);                 \
  template void pointwise_slope<T>(Function, T, const T*, const T*, T*, int64_t); \
  template void pointwise_bend<T>(Function, T, const T*, const T*, const T*, const T*, T*, int64_t);
MF_INSTANTIATE(float)
MF_INSTANTIATE(double)

}  // namespace mf::MF_ISA
