#include "lslr_update.h"

#include "tiles.h"

namespace mf::MF_ISA {

template <typename T>
void lslr_update(const T* theta, const T* grad, T rate, T* out, int64_t n) {
  const auto minus = Vec<T>::broadcast(-rate);
  each_register<T>(
      n, [&](auto tile, int64_t i) { tile.store(fma(minus, tile.load(grad + i), tile.load(theta + i)), out + i); });
}

template <typename T>
void lslr_update_each(const T* theta, const T* grad, const T* rates, T* out, int64_t n) {
  each_register<T>(n, [&](auto tile, int64_t i) {
    tile.store(fma(-tile.load(rates + i), tile.load(grad + i), tile.load(theta + i)), out + i);
  });
}

template <typename T>
T lslr_update_backward(const T* gout, const T* grad, T rate, T* ggrad, int64_t n) {
  using V = Vec<T>;
  const auto minus = V::broadcast(-rate);
  // Four sums hide the latency of the addition.
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  const int64_t block = 4 * V::size;
  int64_t i = 0;
  for (; i + block <= n; i += block) {
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + j * V::size;
      const V g = V::load(gout + at);
      sums[j] = fma(g, V::load(grad + at), sums[j]);
      (minus * g).store(ggrad + at);
    }
  }
  each_register<T>(n - i, [&](auto tile, int64_t rest) {
    const V g = tile.load(gout + i + rest);
    sums[0] = fma(g, tile.load(grad + i + rest), sums[0]);
    tile.store(minus * g, ggrad + i + rest);
  });
  return -((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

template <typename T>
void lslr_update_backward_each(const T* gout, const T* grad, const T* rates, T* ggrad, T* grates, int64_t n) {
  each_register<T>(n, [&](auto tile, int64_t i) {
    const Vec<T> g = tile.load(gout + i);
    tile.store(fma(-g, tile.load(grad + i), tile.load(grates + i)), grates + i);
    tile.store(-tile.load(rates + i) * g, ggrad + i);
  });
}

template <typename T>
T lslr_update_double_backward(const T* a, T b, const T* gout, const T* grad, T rate, T* cgout, T* cgrad, int64_t n) {
  using V = Vec<T>;
  const auto minus = V::broadcast(-rate);
  const auto minus_b = V::broadcast(-b);
  V sum = V::zero();
  each_register<T>(n, [&](auto tile, int64_t i) {
    const V along = tile.load(a + i);
    const V g = tile.load(gout + i);
    sum = fma(along, g, sum);
    tile.store(fma(minus, along, minus_b * tile.load(grad + i)), cgout + i);
    tile.store(minus_b * g, cgrad + i);
  });
  return -sum.sum();
}

template <typename T>
void lslr_update_double_backward_each(const T* a, const T* b, const T* gout, const T* grad, const T* rates, T* cgout,
                                      T* cgrad, T* crates, int64_t n) {
  using V = Vec<T>;
  each_register<T>(n, [&](auto tile, int64_t i) {
    const V along = tile.load(a + i);
    const V g = tile.load(gout + i);
    const V minus_b = -tile.load(b + i);
    tile.store(fma(-along, g, tile.load(crates + i)), crates + i);
    tile.store(minus_b * tile.load(grad + i) - tile.load(rates + i) * along, cgout + i);
    tile.store(minus_b * g, cgrad + i);
  });
}

#define MF_INSTANTIATE(T)                                                                                         \
  template void lslr_update<T>(const T*, const T*, T, T*, int64_t);                                               \
  template void lslr_update_each<T>(const T*, const T*, const T*, T*, int64_t);                                   \
  template T lslr_update_backward<T>(const T*, const T*, T, T*, int64_t);                                         \
  template void lslr_update_backward_each<T>(const T*, const T*, const T*, T*, T*, int64_t);                      \
  template T lslr_update_double_backward<T>(const T*, T, const T*, const T*, T, T*, T*, int64_t);                 \
  template void lslr_update_double_backward_each<T>(const T*, const T*, const T*, const T*, const T*, T*, T*, T*, \
                                                    int64_t);
MF_INSTANTIATE(float)
MF_INSTANTIATE(double)

}  // namespace mf::MF_ISA
