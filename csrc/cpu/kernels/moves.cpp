#include "moves.h"

#include "transpose.h"

namespace mf::MF_ISA {

template <typename T>
void move_in(const int64_t* rows, int64_t columns, int64_t begin, int64_t end, const T* own, T scale, T* kernels) {
  using V = Vec<T>;
  constexpr int W = V::size;
  const V factor = V::broadcast(scale);
  int64_t o = begin;
  for (; o + W <= end; o += W) {
    const T* from = own + o * columns;
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      V r[W];
      for (int i = 0; i < W; ++i) r[i] = V::load(from + i * columns + j);
      exchange_blocks<T, W / 2>(r);
      for (int i = 0; i < W; ++i) (r[i] * factor).store(kernels + rows[j + i] + o);
    }
    for (; j < columns; ++j)
      for (int64_t i = 0; i < W; ++i) kernels[rows[j] + o + i] = scale * from[i * columns + j];
  }
  for (; o < end; ++o)
    for (int64_t j = 0; j < columns; ++j) kernels[rows[j] + o] = scale * own[o * columns + j];
}

template <typename T>
void move_out(const int64_t* rows, int64_t columns, int64_t begin, int64_t end, const T* kernels, T scale,
              const T* plus, T* own) {
  using V = Vec<T>;
  constexpr int W = V::size;
  const V factor = V::broadcast(scale);
  const auto one = [&](int64_t o, int64_t j) {
    const T value = scale * kernels[rows[j] + o];
    own[o * columns + j] = plus == nullptr ? value : plus[o * columns + j] + value;
  };
  int64_t o = begin;
  for (; o + W <= end; o += W) {
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      V r[W];
      for (int i = 0; i < W; ++i) r[i] = V::load(kernels + rows[j + i] + o);
      exchange_blocks<T, W / 2>(r);
      for (int i = 0; i < W; ++i) {
        const int64_t at = (o + i) * columns + j;
        const V value = r[i] * factor;
        (plus == nullptr ? value : V::load(plus + at) + value).store(own + at);
      }
    }
    for (; j < columns; ++j)
      for (int i = 0; i < W; ++i) one(o + i, j);
  }
  for (; o < end; ++o)
    for (int64_t j = 0; j < columns; ++j) one(o, j);
}

#define MF_INSTANTIATE(T)                                                               \
  template void move_in<T>(const int64_t*, int64_t, int64_t, int64_t, const T*, T, T*); \
  template void move_out<T>(const int64_t*, int64_t, int64_t, int64_t, const T*, T, const T*, T*);
MF_INSTANTIATE(float)
MF_INSTANTIATE(double)

}  // namespace mf::MF_ISA
