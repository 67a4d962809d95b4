#include "linear_cross_entropy.h"

#include <math.h>

#include "tiles.h"
#include "transpose.h"

namespace mf::MF_ISA {
namespace {

MF_INLINE float exp_of(float x) { return ::expf(x); }
MF_INLINE double exp_of(double x) { return ::exp(x); }
MF_INLINE float log_of(float x) { return ::logf(x); }
MF_INLINE double log_of(double x) { return ::log(x); }

constexpr int kBlock = 4;  // results that share a loaded register; as many sums hide the latency of the addition

// Calls body(std::integral_constant<int, B>, first) for blocks of kBlock, then one by one.
template <typename Body>
MF_INLINE void each_block(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) body(std::integral_constant<int, kBlock>{}, i);
  for (; i < count; ++i) body(std::integral_constant<int, 1>{}, i);
}

}  // namespace

template <typename T>
void head_transpose(const T* x, int64_t rows, int64_t columns, T* out) {
  transpose(x, columns, rows, columns, out, rows);
}

template <typename T>
void head_products(const Head& s, const T* f, const T* wt, T* z) {
  using V = Vec<T>;
  for (int64_t n = 0; n < s.images; ++n, f += s.features, z += s.classes) {
    each_block(s.classes, [&](auto block, int64_t o) {
      constexpr int size = decltype(block)::value;
      V sums[size];
      for (int b = 0; b < size; ++b) sums[b] = V::zero();
      each_register<T>(s.features, [&](auto tile, int64_t i) {
        const V x = tile.load(f + i);
        for (int b = 0; b < size; ++b) sums[b] = fma(x, tile.load(wt + (o + b) * s.features + i), sums[b]);
      });
      for (int b = 0; b < size; ++b) z[o + b] += sums[b].sum();
    });
  }
}

template <typename T>
void head_combine(int64_t rows, int64_t terms, int64_t features, const T* factors, int64_t row, int64_t term,
                  const T* x, bool add, T* out) {
  using V = Vec<T>;
  each_block(rows, [&](auto block, int64_t r) {
    constexpr int size = decltype(block)::value;
    each_register<T>(features, [&](auto tile, int64_t i) {
      V sums[size];
      for (int b = 0; b < size; ++b) sums[b] = add ? tile.load(out + (r + b) * features + i) : V::zero();
      for (int64_t t = 0; t < terms; ++t) {
        const V v = tile.load(x + t * features + i);
        for (int b = 0; b < size; ++b) sums[b] = fma(V::broadcast(factors[(r + b) * row + t * term]), v, sums[b]);
      }
      for (int b = 0; b < size; ++b) tile.store(sums[b], out + (r + b) * features + i);
    });
  });
}

template <typename T>
T head_softmax(const Head& s, const T* z, const T* target, T scale, T* p, T* gz) {
  T chosen = 0;
  for (int64_t n = 0; n < s.images; ++n) {
    const int64_t at = n * s.classes;
    T top = z[at];
    for (int64_t o = 1; o < s.classes; ++o) top = z[at + o] > top ? z[at + o] : top;
    T total = 0;
    for (int64_t o = 0; o < s.classes; ++o) total += p[at + o] = exp_of(z[at + o] - top);
    const T level = top + log_of(total);
    for (int64_t o = 0; o < s.classes; ++o) {
      p[at + o] /= total;
      gz[at + o] = scale * (p[at + o] - target[at + o]);
      chosen += target[at + o] * (z[at + o] - level);
    }
  }
  return chosen;
}

template <typename T>
void head_softmax_tangent(const Head& s, const T* p, T scale, T* z_dot) {
  for (int64_t n = 0; n < s.images; ++n, p += s.classes, z_dot += s.classes) {
    T mean = 0;
    for (int64_t o = 0; o < s.classes; ++o) mean += p[o] * z_dot[o];
    for (int64_t o = 0; o < s.classes; ++o) z_dot[o] = scale * p[o] * (z_dot[o] - mean);
  }
}

#define MF_INSTANTIATE(T)                                                                                   \
  template void head_transpose<T>(const T*, int64_t, int64_t, T*);                                          \
  template void head_products<T>(const Head&, const T*, const T*, T*);                                      \
  template void head_combine<T>(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, const T*, bool, T*); \
  template T head_softmax<T>(const Head&, const T*, const T*, T, T*, T*);                                   \
  template void head_softmax_tangent<T>(const Head&, const T*, T, T*);
MF_INSTANTIATE(float)
MF_INSTANTIATE(double)

}  // namespace mf::MF_ISA
