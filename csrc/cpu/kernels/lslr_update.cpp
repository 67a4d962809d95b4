#include "lslr_update.h"

#include "vec.h"

namespace mf::MF_ISA {
namespace {

// Calls body(i, load, store) for whole registers, and once more for the rest.
template <typename T, typename Body>
MF_INLINE void each_register(int64_t n, const Body& body) {
  using V = Vec<T>;
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) {
    body(i, [](const T* p) { return V::load(p); }, [](V v, T* p) { v.store(p); });
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    body(i, [rest](const T* p) { return V::load(p, rest); }, [rest](V v, T* p) { v.store(p, rest); });
  }
}

}  // namespace

template <typename T>
void lslr_update(const T* theta, const T* grad, T rate, T* out, int64_t n) {
  const auto minus = Vec<T>::broadcast(-rate);
  each_register<T>(
      n, [&](int64_t i, auto load, auto store) { store(fma(minus, load(grad + i), load(theta + i)), out + i); });
}

template <typename T>
void lslr_update_each(const T* theta, const T* grad, const T* rates, T* out, int64_t n) {
  each_register<T>(n, [&](int64_t i, auto load, auto store) {
    store(fma(-load(rates + i), load(grad + i), load(theta + i)), out + i);
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
  each_register<T>(n - i, [&](int64_t rest, auto load, auto store) {
    const V g = load(gout + i + rest);
    sums[0] = fma(g, load(grad + i + rest), sums[0]);
    store(minus * g, ggrad + i + rest);
  });
  return -((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

template <typename T>
void lslr_update_backward_each(const T* gout, const T* grad, const T* rates, T* ggrad, T* grates, int64_t n) {
  each_register<T>(n, [&](int64_t i, auto load, auto store) {
    const Vec<T> g = load(gout + i);
    store(fma(-g, load(grad + i), load(grates + i)), grates + i);
    store(-load(rates + i) * g, ggrad + i);
  });
}

template <typename T>
T lslr_update_double_backward(const T* a, T b, const T* gout, const T* grad, T rate, T* cgout, T* cgrad, int64_t n) {
  using V = Vec<T>;
  const auto minus = V::broadcast(-rate);
  const auto minus_b = V::broadcast(-b);
  V sum = V::zero();
  each_register<T>(n, [&](int64_t i, auto load, auto store) {
    const V along = load(a + i);
    const V g = load(gout + i);
    sum = fma(along, g, sum);
    store(fma(minus, along, minus_b * load(grad + i)), cgout + i);
    store(minus_b * g, cgrad + i);
  });
  return -sum.sum();
}

template <typename T>
void lslr_update_double_backward_each(const T* a, const T* b, const T* gout, const T* grad, const T* rates, T* cgout,
                                      T* cgrad, T* crates, int64_t n) {
  using V = Vec<T>;
  each_register<T>(n, [&](int64_t i, auto load, auto store) {
    const V along = load(a + i);
    const V g = load(gout + i);
    const V minus_b = -load(b + i);
    store(fma(-along, g, load(crates + i)), crates + i);
    store(minus_b * load(grad + i) - load(rates + i) * along, cgout + i);
    store(minus_b * g, cgrad + i);
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
